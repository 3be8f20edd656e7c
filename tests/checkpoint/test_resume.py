"""Runs stopped, taken through ``merge`` and ``shard``, and gone on with elsewhere: the losses of a run never stopped.

Elsewhere is another layout, ZeRO stage, engine and number of data ranks, and every step sees the samples it would have
seen. Native engines agree to 1e-6; DeepSpeed sums gradients and clips in another order, and is held to 1e-5.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vilg.checkpoint.image_tokenizer import image_tokenizer_hash, save_image_tokenizer
from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import read_sound_manifest
from megatron_vilg.checkpoint.sources import open_source
from megatron_vilg.checkpoint.verify import differences
from megatron_vilg.cli.main import main
from megatron_vilg.config.load import write_run_folder_config
from megatron_vilg.config.schema import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ParallelConfig,
    RunConfig,
)
from megatron_vilg.data.batch import PairBatch
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.models.vqgan import VQGAN
from megatron_vilg.parallel.mesh import Mesh, build_mesh
from megatron_vilg.train import pretrain as loop
from megatron_vilg.train.engine import Engine
from tests.helpers import run_distributed
from tests.parallel.cases import case_model
from tests.tiny import tiny_run
from tests.tiny_run import tiny_pictures
from tests.train.token_caches import CODES, write_cache

STEPS, STOP_AT, BATCH = 6, 3, 8
Leg = tuple[int, dict[str, Any], str]
"""Processes, options of ``parallel``, engine."""
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra `deepspeed` is not installed")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the token cache and the text tokenizer are."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def cache(home: Path) -> TokenCache:
    return write_cache(home / "tokens", {"train": 21})


@pytest.fixture(scope="module")
def run(cache: TokenCache) -> RunConfig:
    """21 pairs in batches of 8, so that the third step crosses the border of an epoch; clipping at work."""
    words = cache.settings["text_vocab_size"]
    sizes = {"text_vocab_size": words + words % 2, "image_vocab_size": CODES + CODES % 2, "codebook_dim": 0}
    return dataclasses.replace(
        tiny_run(case_model(**sizes), num_steps=STEPS, batch_size=BATCH),
        data=DataConfig(caption_dropout=0.2, image_input_noise=0.1, image_source_noise=0.1),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(every=1, tensorboard=False),
    )


@dataclasses.dataclass(frozen=True)
class Seen:
    """By step: pairs that this rank trained on, and the loss of all."""

    samples: dict[int, list[int]]
    losses: dict[int, float]


def go_on(run: RunConfig, cache: TokenCache, out: Path, stop_at: int) -> Seen:
    """Train from the newest checkpoint in ``out`` to the end of ``stop_at``, and save."""
    seen = Seen({}, {})
    step_of = loop.watched_step

    def noted(engine: Engine, batch: PairBatch, instruments: Any) -> Any:
        result = step_of(engine, batch, instruments)
        seen.samples[engine.step] = batch.sample_ids.tolist()
        seen.losses[engine.step] = float(result[0].loss)
        return result

    loop.watched_step = noted
    Mesh.any = lambda self, flag: max(seen.losses) >= stop_at  # type: ignore[method-assign]
    loop.pretrain(run, cache, out, mesh=build_mesh(run.parallel, "cpu"))
    dist.barrier()
    return seen


def leg(run: RunConfig, cache: TokenCache, out: Path, where: Leg, stop_at: int) -> dict[int, tuple[set[int], float]]:
    """By step: the pairs of all data ranks together, and the loss, which every rank must know."""
    world, parallel, engine = where
    run = dataclasses.replace(
        run, parallel=ParallelConfig(**parallel), train=dataclasses.replace(run.train, engine=engine)
    )
    ranks = run_distributed(go_on, world, run, cache, out, stop_at, timeout=600)
    assert all(rank.losses == pytest.approx(ranks[0].losses, abs=1e-7) for rank in ranks)
    return {
        step: (set().union(*(rank.samples[step] for rank in ranks)), ranks[0].losses[step]) for step in ranks[0].losses
    }


@pytest.fixture(scope="module")
def straight(run: RunConfig, cache: TokenCache, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """One process that is never stopped."""
    return leg(run, cache, tmp_path_factory.mktemp("straight"), (1, {}, "native"), STEPS)


def through_the_tools(run: RunConfig, folder: Path, ranks: tuple[int, int]) -> Path:
    """Merge, cut for ranks, merge again, make a run folder of it: nothing may change on the way."""
    if not (folder / "config.json").exists():
        write_run_folder_config(run, folder)
    names = [str(folder.with_name(f"{folder.name}-{name}")) for name in ("whole", "ranks", "run")]
    sizes = ["--target-tensor-parallel-size", str(ranks[0]), "--target-pipeline-parallel-size", str(ranks[1])]
    for command in (
        ["merge", "--load-dir", str(folder), "--save-dir", names[0], "--optimizer"],
        ["shard", "--load-dir", names[0], "--save-dir", names[1], "--optimizer", *sizes],
        ["shard", "--load-dir", names[1], "--save-dir", names[2], "--optimizer", "--to", "dcp"],
    ):
        assert main(["checkpoint", *command]) == 0
    with open_source(folder) as first, open_source(Path(names[2])) as last:
        assert first.tensors.keys() == last.tensors.keys()
        assert differences(first, last) == []
    return Path(names[2])


NATIVE = [
    pytest.param(
        (2, {"shard": 2, "zero": 3}, "native"), (4, {"tensor": 2, "shard": 2, "zero": 1}, "native"), id="fast"
    ),
    pytest.param(
        (8, {"tensor": 2, "pipeline": 2, "shard": 2, "num_microbatches": 2}, "native"),
        (4, {"shard": 4, "zero": 2}, "native"),
        id="2 x 2 x 2, then 4 data ranks",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        (4, {"shard": 4, "zero": 1}, "native"),
        (2, {"tensor": 2}, "native"),
        id="4 data ranks, then one",
        marks=pytest.mark.slow,
    ),
]
CROSSING = [
    pytest.param((2, {"shard": 2, "zero": 3}, "native"), (2, {"zero": 1}, "deepspeed"), id="native 3, DeepSpeed 1"),
    pytest.param(
        (2, {"zero": 1}, "deepspeed"),
        (4, {"tensor": 2, "pipeline": 2, "num_microbatches": 2}, "native"),
        id="DeepSpeed 1, native 2 x 2",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        (4, {"zero": 3}, "deepspeed"), (2, {"zero": 2}, "deepspeed"), id="DeepSpeed 3, 2", marks=pytest.mark.slow
    ),
    pytest.param(
        (4, {"tensor": 2, "shard": 2, "zero": 2}, "native"),
        (4, {"zero": 3}, "deepspeed"),
        id="native 2 x 1 x 2, DeepSpeed 3 on four",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("first", "second"), NATIVE)
def test_losses_go_on_in_another_layout(
    tmp_path: Path, cache: TokenCache, run: RunConfig, straight: dict[int, Any], first: Leg, second: Leg
) -> None:
    check(tmp_path, cache, run, straight, first, second, 1e-6)


@needs_deepspeed
@pytest.mark.parametrize(("first", "second"), CROSSING)
def test_losses_go_on_under_another_engine(
    tmp_path: Path, cache: TokenCache, run: RunConfig, straight: dict[int, Any], first: Leg, second: Leg
) -> None:
    check(tmp_path, cache, run, straight, first, second, 1e-5)


def check(
    tmp_path: Path,
    cache: TokenCache,
    run: RunConfig,
    straight: dict[int, Any],
    first: Leg,
    second: Leg,
    tolerance: float,
) -> None:
    found = leg(run, cache, tmp_path / "out", first, STOP_AT)
    again = through_the_tools(run, tmp_path / "out", (2, 3))
    newest = Checkpointer(again / "checkpoints", CheckpointConfig()).latest()
    assert newest is not None and read_sound_manifest(newest).samples_seen == STOP_AT * BATCH
    found |= leg(run, cache, again, second, STEPS)
    assert list(found) == list(straight) == list(range(1, STEPS + 1))
    for step, (samples, loss) in straight.items():
        assert found[step][0] == samples, f"step {step} sees other pairs"
        assert found[step][1] == pytest.approx(loss, abs=tolerance), f"step {step}"


def save_as_deepspeed(run: RunConfig, cache: TokenCache, out: Path, own: Path) -> Seen:
    """As :func:`go_on`, and the state after the last step also in DeepSpeed's own form."""
    engines: list[Any] = []
    build = loop.build_engine
    loop.build_engine = lambda *args: engines.append(build(*args)) or engines[-1]
    seen = go_on(run, cache, out, STOP_AT)
    engines[0]._engine.save_checkpoint(str(own), tag="three")
    return seen


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_folder_that_deepspeed_itself_wrote_goes_on_natively(
    tmp_path: Path, cache: TokenCache, home: Path, run: RunConfig, straight: dict[int, Any], zero: int
) -> None:
    """The configuration and both tokenizers are put beside it, as docs/checkpoints.md says."""
    theirs = dataclasses.replace(
        run, parallel=ParallelConfig(zero=zero), train=dataclasses.replace(run.train, engine="deepspeed")
    )
    shutil.copytree(home / "text_tokenizer", tmp_path / "own" / "text_tokenizer")
    pictures = tiny_pictures(grid_side=run.model.image_side, codebook_size=run.model.image_vocab_size)
    folder = save_image_tokenizer(VQGAN(pictures), tmp_path / "own" / "image_tokenizer")
    cache = copy.copy(cache)
    cache.settings = {**cache.settings, "image_tokenizer_sha256": image_tokenizer_hash(folder)}
    run_distributed(save_as_deepspeed, 2, theirs, cache, tmp_path / "out", tmp_path / "own", timeout=600)
    again = through_the_tools(run, tmp_path / "own", (1, 2))
    with open_source(tmp_path / "out") as ours, open_source(again) as others:
        assert differences(ours, others) == []
    found = leg(run, cache, again, (2, {"shard": 2}, "native"), STEPS)
    for step, (_, loss) in found.items():
        assert loss == pytest.approx(straight[step][1], abs=1e-5)
    assert list(found) == [4, 5, 6]
