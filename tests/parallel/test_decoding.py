"""A model cut over ranks decodes as a whole one: logits, tokens, and what each rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vilg.checkpoint.share import load_share
from megatron_vilg.checkpoint.tensors import DictSource
from megatron_vilg.config.schema import ModelConfig, ParallelConfig, SampleConfig
from megatron_vilg.generate import decode
from megatron_vilg.generate.cache import kv_elements_stored
from megatron_vilg.generate.decode import Decoder, inference, prefill
from megatron_vilg.generate.static import StaticDecoder
from megatron_vilg.generate.text_to_image import Prompts, draw_ids
from megatron_vilg.generate.weights import JointAttention, PackedShare, can_pack, use_bf16
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel.decoding import cut_for_decoding
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.sequence import Direction
from tests.helpers import run_distributed
from tests.parallel.cases import case_model
from tests.tiny import tiny_batch, tiny_model

T2I, I2T = Direction.TEXT_TO_IMAGE, Direction.IMAGE_TO_TEXT
COUNT, SAMPLES = 3, 2
CASES: dict[str, dict[str, Any]] = {
    "row, column, convolution": {},
    "full": {"pattern": "full"},
    "wrapped convolution, wide window": {"conv_wrap": True, "conv_kernel": 5, "image_to_text_row": "window"},
    "no norm of heads, sandwich": {"qk_norm": False, "sandwich_norm": True, "segment_embedding": False},
    "vocabularies that do not divide": {"text_vocab_size": 23, "image_vocab_size": 13, "codebook_dim": 0},
}
GUIDED = SampleConfig(temperature=0.9, top_k=7, guidance=2.0, guidance_schedule="linear")


@dataclass(frozen=True)
class Answers:
    """What one rank, or one process alone, makes of a case."""

    cached: list[Tensor]
    """Teacher-forced logits of either direction [B, positions, V]; of pictures also by the recordable twin."""
    whole: list[Tensor]
    """The same from whole rows."""
    ids: Tensor
    """Drawn with guidance [B, n, N]."""
    kv_elements: int
    weights: int
    largest_read: int


class CountingSource(DictSource):
    """Says how many numbers were read at a time."""

    largest = 0

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = super().rows(name, start, stop)
        self.largest = max(self.largest, rows.numel())
        return rows


def whole_model(config: ModelConfig) -> ViLG:
    """Biases and norms at random too: at zero and one they would hide a mistake."""
    model = tiny_model(config)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in [*model.parameters(), *model.buffers()]:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False).eval()


def shared_model(config: ModelConfig, ranks: int) -> tuple[ViLG, int]:
    """This rank's share of ``whole_model``, and the most that was read at a time."""
    whole = {f"model.{name}": tensor for name, tensor in whole_model(config).state_dict().items()}
    mesh = build_mesh(ParallelConfig(tensor=ranks), "cpu")
    with torch.device("meta"):
        model = ViLG(config)
    cut_for_decoding(model, mesh.axis("tp"))
    model.to_empty(device="cpu")
    source = CountingSource(whole, None, Path("memory"))
    load_share(source, model.state_dict(), ranks=ranks, rank=mesh.rank("tp"))
    return model.eval(), source.largest


def answers(config: ModelConfig, ranks: int = 1) -> Answers:
    model, largest = (whole_model(config), 0) if ranks == 1 else shared_model(config, ranks)
    batch = tiny_batch(config, COUNT)
    text, codes, lengths = batch.text_ids[:, 0], batch.image_ids[:, 0], batch.text_len[:, 0]
    cached, whole = [], []
    with inference(model):
        for direction, source, target in ((T2I, text, codes), (I2T, codes, text)):
            prefix = prefill(model, direction, source, lengths).select(torch.arange(COUNT))
            for kind in (Decoder, StaticDecoder) if direction == T2I else (Decoder,):
                decoder = kind(model, prefix, 1)
                steps = [decoder.step(ids).clone() for ids in target.unbind(1)[:-1]]
                cached.append(torch.stack([prefix.logits, *steps], dim=1))
            whole.append(model.logits(text, codes, lengths, direction))
        prefix = prefill(model, T2I, text, torch.full_like(lengths, config.num_text_slots))
        decoder = Decoder(model, prefix, SAMPLES, joint=False)
    kept = [*decoder.shared_keys, *decoder.shared_values, *(s for c in decoder.caches for s in (c.keys, c.values))]
    ids = draw_ids(model, Prompts(text, lengths), GUIDED, num_images=SAMPLES, seed=4)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return Answers(cached, whole, ids, sum(x.numel() for x in kept), weights, largest)


def all_answers(ranks: int) -> list[Answers]:
    return [answers(case_model(**changes), ranks) for changes in CASES.values()]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["2 ranks", "4 ranks"])
def shared(request: pytest.FixtureRequest) -> tuple[int, list[list[Answers]]]:
    """Ranks, and by rank the answers of all cases."""
    return request.param, run_distributed(all_answers, request.param, request.param)


@pytest.mark.parametrize("case", CASES)
def test_shared_model_equals_whole_model(case: str, shared: tuple[int, list[list[Answers]]]) -> None:
    one = answers(case_model(**CASES[case]))
    assert one.cached[0].std() > 0.1 and len(one.ids.unique()) > 5
    for rank in shared[1]:
        mine = rank[list(CASES).index(case)]
        for found, expected in zip([*mine.cached, *mine.whole], [*one.cached, *one.whole], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(mine.ids, one.ids)


def test_all_ranks_have_the_same_bits(shared: tuple[int, list[list[Answers]]]) -> None:
    first, *others = shared[1]
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert all(map(torch.equal, [*mine.cached, *mine.whole], [*theirs.cached, *theirs.whole]))


def test_each_rank_holds_its_share(shared: tuple[int, list[list[Answers]]]) -> None:
    ranks, by_rank = shared
    config = case_model()
    one = answers(config)
    assert one.kv_elements == COUNT * kv_elements_stored(config, num_targets=SAMPLES)
    for rank in by_rank:
        assert rank[0].kv_elements * ranks == one.kv_elements
        copied = ranks * rank[0].weights - one.weights  # norms and biases behind sums, on every rank
        assert 0 < copied < 0.05 * ranks * one.weights
        assert rank[0].weights < one.weights / ranks * 1.1
        assert rank[0].largest_read <= 4 * config.width * config.width  # a piece, never all of the model


def names_of_a_share() -> str:
    mesh = build_mesh(ParallelConfig(tensor=2), "cpu")
    with torch.device("meta"):
        model = ViLG(case_model())
    cut_for_decoding(model, mesh.axis("tp"))
    return " ".join(name for name, _ in model.named_parameters())


def test_names_stay() -> None:
    expected = " ".join(name for name, _ in ViLG(case_model()).named_parameters())
    assert run_distributed(names_of_a_share, 2) == [expected] * 2


def messages_of_a_step() -> tuple[int, int]:
    """Sums and gathers of one step of the decoder."""
    model, _ = shared_model(case_model(), 2)
    batch = tiny_batch(model.config, COUNT)
    with inference(model):
        decoder = Decoder(model, prefill(model, T2I, batch.text_ids[:, 0], batch.text_len[:, 0]), 1)
        with torch.profiler.profile() as profiled:
            decoder.step(batch.image_ids[:, 0, 0])
    names = [event.name for event in profiled.events()]
    return names.count("c10d::allreduce_"), names.count("c10d::allgather_")


def test_a_step_exchanges_two_sums_per_block_and_two_gathers() -> None:
    layers = case_model().num_layers
    assert run_distributed(messages_of_a_step, 2) == [(2 * layers, 2)] * 2


def codes_of_the_first() -> list[Tensor]:
    """Codes that differ from rank to rank, made the same along either axis of 2 x 2 ranks."""
    mesh = build_mesh(ParallelConfig(tensor=2), "cpu")
    codes = torch.full((3, 2), torch.distributed.get_rank()).T
    return [mesh.same(codes, "tp"), mesh.same(codes, "shard"), codes]


def test_ranks_agree_on_the_value_of_the_first() -> None:
    found = [[int(x[1, 2]) for x in each] for each in run_distributed(codes_of_the_first, 4)]
    assert found == [[0, 0, 0], [0, 1, 1], [2, 0, 2], [2, 1, 3]]


def packed_and_plain(precision: str) -> list[Tensor]:
    """Logits of all steps with packed shares and with plain ones."""
    config = case_model()
    model, _ = shared_model(config, 2)
    batch = tiny_batch(config, COUNT)
    found = []
    for steps in (1, 10**9):
        decode.PACK_FROM_STEPS = steps
        with inference(model), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            decoder = Decoder(model, prefill(model, T2I, batch.text_ids[:, 0], batch.text_len[:, 0]), 1)
            expected = (steps == 1) and can_pack(torch.zeros(1))
            assert isinstance(decoder.blocks[0].attention, JointAttention) == expected
            assert isinstance(decoder.blocks[0].mlp.down, PackedShare) == expected
            assert isinstance(decoder.head, PackedShare) == expected
            found.append(torch.stack([decoder.step(ids) for ids in batch.image_ids[:, 0].unbind(1)[:-1]]))
    return found


@pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-5), ("bf16", 0.2)])
def test_packed_shares_equal_plain_shares(precision: str, within: float) -> None:
    for packed, plain in run_distributed(packed_and_plain, 2, precision):
        torch.testing.assert_close(packed, plain, atol=within, rtol=within)


def drawn_in_bf16() -> tuple[Tensor, Tensor]:
    """Last predictions of whole rows with weights in bf16, and in fp32."""
    config = case_model()
    model, _ = shared_model(config, 2)
    batch = tiny_batch(config, COUNT)
    rows = batch.text_ids[:, 0], batch.image_ids[:, 0], batch.text_len[:, 0], T2I
    exact = model.logits(*rows)
    use_bf16(model)
    with torch.autocast("cpu", torch.bfloat16):
        return model.logits(*rows), exact


def test_weights_in_bf16() -> None:
    (rounded, exact), (other, _) = run_distributed(drawn_in_bf16, 2)
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, other)
    assert (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()
