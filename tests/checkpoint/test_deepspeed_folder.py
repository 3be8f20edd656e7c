from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.reshape import merge
from megatron_vilg.checkpoint.run_folder import write_run_folder
from megatron_vilg.checkpoint.sources import open_source
from megatron_vilg.checkpoint.tensors import read_whole
from megatron_vilg.config.load import write_run_folder_config
from megatron_vilg.config.schema import CheckpointConfig, ImageTokenizerConfig, RunConfig
from megatron_vilg.errors import CheckpointError
from tests.checkpoint.ckpt_source import assert_same, random_values
from tests.checkpoint.fake_deepspeed import write_deepspeed
from tests.tiny import tiny_config

CONFIG = tiny_config(codebook_dim=3, text_vocab_size=21)
TOKENIZER = ImageTokenizerConfig(image_size=32, codebook_size=11, codebook_dim=3)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_is_put_together_bit_by_bit(tmp_path: Path, stage: int, world: int) -> None:
    values = random_values(CONFIG)
    with open_source(write_deepspeed(tmp_path, CONFIG, values, stage=stage, world=world)) as source:
        assert source.format == f"DeepSpeed checkpoint (ZeRO {stage}, {world} ranks)"
        assert_same(source, values)
        assert source.verify() == []


def test_a_run_of_deepspeed_goes_on_with_our_trainer(tmp_path: Path) -> None:
    values = random_values(CONFIG)
    folder = write_deepspeed(tmp_path / "ds", CONFIG, values, stage=3, world=2)
    write_run_folder_config(RunConfig(model=CONFIG, image_tokenizer=TOKENIZER), folder)
    with open_source(folder) as source:
        merge(source, tmp_path / "whole", optimizer=True)
    with open_source(tmp_path / "whole") as source:
        assert source.manifest is not None
        assert (source.manifest.kind, source.manifest.step, source.manifest.samples_seen) == ("pretrain", 7, 70)
        write_run_folder(source, tmp_path / "run")
    newest = Checkpointer(tmp_path / "run" / "checkpoints", CheckpointConfig()).latest()
    assert newest is not None
    with open_source(newest) as source:
        assert_same(source, values)


def damaged(folder: Path, how: str) -> Path:
    step = folder / "global_step7"
    second = step / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    if how == "missing rank":
        second.unlink()
    elif how == "truncated":
        os.truncate(second, second.stat().st_size // 2)
    elif how == "flipped byte":
        content = bytearray(second.read_bytes())
        content[len(content) // 2] ^= 1
        second.write_bytes(content)
    elif how == "another latest":
        (folder / "latest").write_text("global_step9")
    elif how == "other shapes":
        first = step / "mp_rank_00_model_states.pt"
        content = torch.load(first, weights_only=False)
        content["param_shapes"][0]["embed.text.weight"] = torch.Size([25, 16])
        torch.save(content, first)
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing rank", "1 files .* of 2 ranks; the others are missing"),
        ("truncated", "is no whole file of torch.save"),
        ("flipped byte", "does not match its checksum; the file is damaged"),
        ("another latest", "names 'global_step9', and there is no such checkpoint"),
        ("other shapes", "parameters take .* numbers, the files hold .*; they do not belong together"),
    ],
)
def test_damage_is_named_and_nothing_is_written(tmp_path: Path, how: str, words: str) -> None:
    folder = write_deepspeed(tmp_path / "ds", CONFIG, random_values(CONFIG), stage=1, world=2)
    damaged(folder, how)
    with pytest.raises(CheckpointError, match=words), open_source(folder) as source:
        merge(source, tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["ds"]


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_files_of_exchanged_ranks_are_refused(tmp_path: Path, stage: int) -> None:
    folder = write_deepspeed(tmp_path / "ds", CONFIG, random_values(CONFIG), stage=stage, world=2)
    step = folder / "global_step7"
    first, second = (step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))
    contents = [torch.load(file, weights_only=False) for file in (first, second)]
    first.rename(step / "aside")
    second.rename(first)
    (step / "aside").rename(second)
    words = r"rank_0_mp_rank_00_optim_states.pt: was written as zero_pp_rank_1_.*, for another rank. Works: all files"
    with pytest.raises(CheckpointError, match=words):
        open_source(folder)
    torch.save(contents[0], second)
    torch.save(contents[1], first)
    if stage < 3:  # parts of stage 3 do not say whose they are once their names are gone
        with pytest.raises(CheckpointError, match="rank_0_.*: holds the part of another rank than its name says. Work"):
            open_source(folder)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_of_another_step_is_refused(tmp_path: Path, stage: int) -> None:
    folder = write_deepspeed(tmp_path / "ds", CONFIG, random_values(CONFIG), stage=stage, world=2)
    key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"

    def older(content: dict[str, Any]) -> None:
        for entry in content["optimizer_state_dict"][key]["state"].values():
            entry["step"] -= 1

    edit(folder / "global_step7" / "zero_pp_rank_1_mp_rank_00_optim_states.pt", older)
    words = r"rank_1_.*: was updated \[6.0, 6.0\] times, .*rank_0_.* \[7.0, 7.0\] times; .* different steps. Works: all"
    with pytest.raises(CheckpointError, match=words):
        open_source(folder)


def test_model_states_of_another_step_are_refused_and_skipped_steps_are_not(tmp_path: Path) -> None:
    values = random_values(CONFIG)
    folder = write_deepspeed(tmp_path / "ds3", CONFIG, values, stage=3, world=2)
    models = sorted((folder / "global_step7").glob("*_model_states.pt"))
    for file in models:
        edit(file, lambda content: content.update(global_steps=9, skipped_steps=2))
    open_source(folder).close()
    edit(models[1], lambda content: content.update(global_steps=8))
    with pytest.raises(CheckpointError, match="rank_1_.*: counts 6 updates .*, the optimizer.s files 7; .*Works: all"):
        open_source(folder)


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_by_rank_must_be_those_that_the_model_computed_with(tmp_path: Path, stage: int) -> None:
    values = random_values(CONFIG)
    folder = write_deepspeed(tmp_path / "ds", CONFIG, values, stage=stage, world=2)
    model = folder / "global_step7" / "mp_rank_00_model_states.pt"

    def in_bf16(content: dict[str, Any]) -> None:
        content["module"] = {name: value.bfloat16() for name, value in content["module"].items()}

    def another_step(content: dict[str, Any]) -> None:
        content["module"]["norm.weight"] = content["module"]["norm.weight"] * 1.5

    edit(model, in_bf16)
    with open_source(folder) as source:
        assert source.verify() == []
    edit(model, another_step)
    words = "1 weights in .* are not those of mp_rank_00_model_states.pt, model.norm.weight first: .*different steps"
    with open_source(folder) as source, pytest.raises(CheckpointError, match=words):
        merge(source, tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["ds"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_stage": "x"}, "optim_states.pt: is not what DeepSpeed writes .zero_stage is 'x'"),
        ({"partition_count": []}, "optim_states.pt: is not what DeepSpeed writes .partition_count is "),
        ({"partition_count": {}}, "2 files .* of 0 ranks"),
    ],
)
def test_values_that_make_no_sense_are_named(tmp_path: Path, changes, words: str) -> None:
    folder = write_deepspeed(tmp_path / "ds", CONFIG, random_values(CONFIG), stage=1, world=2)
    first = folder / "global_step7" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    edit(first, lambda content: content["optimizer_state_dict"].update(changes))
    with pytest.raises(CheckpointError, match=words):
        open_source(folder)
    (folder / "latest").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="latest: cannot be read .*utf-8.*Works: copy"):
        open_source(folder)


def test_a_flipped_byte_stops_the_way_to_the_trainer_too(tmp_path: Path) -> None:
    folder = write_deepspeed(tmp_path / "ds", CONFIG, random_values(CONFIG), stage=2, world=2)
    write_run_folder_config(RunConfig(model=CONFIG, image_tokenizer=TOKENIZER), folder)
    damaged(folder, "flipped byte")
    with (
        open_source(folder) as source,
        pytest.raises(CheckpointError, match="ds: damaged: .*rank_1_.* does not match its checksum"),
    ):
        write_run_folder(source, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["ds"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 5}, r"blocks.4.mlp.up.weight: missing"),
        ({"num_layers": 3}, r"blocks.3.mlp.up.weight: not part of this model"),
        ({"mlp_ratio": 2}, r"blocks.0.mlp.up.weight: has shape \[64, 16\], expected \[32, 16\]"),
    ],
)
def test_weights_must_be_those_of_the_configuration_beside_them(tmp_path: Path, changes, words: str) -> None:
    folder = write_deepspeed(tmp_path / "ds", CONFIG, random_values(CONFIG), stage=1, world=1)
    other = dataclasses.replace(CONFIG, **changes)
    write_run_folder_config(RunConfig(model=other, image_tokenizer=TOKENIZER), folder)
    with open_source(folder) as source:
        for write in (merge, write_run_folder):
            with pytest.raises(CheckpointError, match=f"(?s)does not fit its configuration.*{words}"):
                write(source, tmp_path / "result")
    assert [path.name for path in tmp_path.iterdir()] == ["ds"]


SCRIPT = """
import os, sys, torch
import torch.distributed as dist, torch.multiprocessing as mp
from deepspeed.ops import __compatible_ops__ as ops
import deepspeed
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from tests.tiny import tiny_config, tiny_model

def work(rank, world, stage, out):
    os.environ["LOCAL_RANK"] = str(rank)
    ops["deepspeed_shm_comm"] = False  # would be compiled
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=world)
    deepspeed.init_distributed(dist_backend="gloo")
    config = tiny_config(codebook_dim=3, text_vocab_size=21)
    model = tiny_model(config)
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == wide]} for wide in (True, False)]
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    settings["zero_allow_untested_optimizer"] = True
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups), config=settings, dist_init_required=False
    )
    for step in range(2):
        text = torch.randint(6, 21, (2, config.num_text_slots))
        codes = torch.randint(11, (2, 16))
        image, text = engine(text, codes, text_len=torch.full((2,), 5))
        engine.backward(image.square().mean() + text.square().mean())
        engine.step()
    engine.save_checkpoint(out, tag="two")

if __name__ == "__main__":
    world, stage, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    mp.start_processes(work, args=(world, stage, out), nprocs=world, start_method="fork")
    torch.save(get_fp32_state_dict_from_zero_checkpoint(out), out + ".fp32")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [(1, 2), (2, 3), (3, 2), (3, 3)])
def test_deepspeed_itself_agrees(tmp_path: Path, stage: int, world: int) -> None:
    pytest.importorskip("deepspeed")
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(root), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(tmp_path / "train.py"), str(world), str(stage), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.load(tmp_path / "out.fp32")
    with open_source(tmp_path / "out") as source:
        ours = {n.removeprefix("model."): read_whole(source, n) for n in source.tensors if n.startswith("model.")}
        assert len(source.tensors) == len(ours) + 3 * (len(ours) - 1)  # one buffer has no optimizer state
        assert source.verify() == []
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
