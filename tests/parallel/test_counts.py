"""What a step sends and what it holds whole equal the formulas of docs/design.md, for every ZeRO number and axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from megatron_vilg.config.schema import RunConfig
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel import pipeline
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train import passes
from megatron_vilg.train.engine import NativeEngine
from tests.helpers import run_distributed
from tests.parallel.cases import BATCH, case_model, case_run
from tests.parallel.traffic import Traffic
from tests.tiny import tiny_batch

FLOAT, PIECES = 4, 2
MODEL = case_model(codebook_dim=0, num_text_slots=6)
"""All tables have an even number of rows, so that shards need no padding."""
SMALL = 2 * 8 + 3 * 4 + 4
"""All-reduces over a data axis: two counts int64, three totals, and the gradient norm."""


def step_of(run: RunConfig) -> tuple[NativeEngine, Callable[[int], Any]]:
    mesh = build_mesh(run.parallel, "cpu")
    engine = NativeEngine(run, mesh)
    size = BATCH // mesh.data_size
    share = slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)
    return engine, lambda seed: engine.train_step(tiny_batch(run.model, BATCH, seed).slice(share.start, share.stop))


def traffic_of_second_step(run: RunConfig) -> tuple[dict[Any, int], dict[Any, int], int]:
    """Calls and bytes by (kind, ranks), and the values of this rank's parts of the model."""
    engine, step = step_of(run)
    step(0)
    with Traffic() as traffic:
        step(1)
    return dict(traffic.calls), dict(traffic.bytes), sum(p.numel() for _, p in engine.named_parameters())


def run_of(**parallel: Any) -> RunConfig:
    return case_run(parallel, MODEL)


@pytest.mark.parametrize(
    ("zero", "gathers", "reductions"), [(1, 1, 1), (2, 1, PIECES), (3, 2 * PIECES, PIECES)], ids=["1", "2", "3"]
)
def test_zero_sends_what_its_number_says(zero: int, gathers: int, reductions: int) -> None:
    units = MODEL.num_layers + 1
    for calls, sent, values in run_distributed(traffic_of_second_step, 2, run_of(zero=zero, num_microbatches=PIECES)):
        assert calls == {
            ("gather", 2): gathers * units,
            ("reduce-scatter", 2): reductions * units,
            ("all-reduce", 2): 3,
        }
        assert sent == {
            ("gather", 2): gathers * values * FLOAT,
            ("reduce-scatter", 2): reductions * values * FLOAT,
            ("all-reduce", 2): SMALL,
        }


def test_tensor_ranks_exchange_hidden_states_and_three_numbers_per_row() -> None:
    model = MODEL
    layers, hidden = model.num_layers, 2 * BATCH * model.spec.length * model.width * FLOAT
    rows = BATCH * (model.spec.num_image_tokens + model.num_text_slots + 1)
    for calls, sent, _ in run_distributed(traffic_of_second_step, 2, run_of(tensor=2)):
        # A block gathers twice and reduces twice in either pass; gloo makes the embedding's exchange of width for
        # positions (two directions, two passes) out of gathers; the last block gathers for the heads.
        assert calls["gather", 2] == 4 * layers + 4 + 1 and calls["reduce-scatter", 2] == 4 * layers
        assert sent["gather", 2] == (4 * layers + 2 + 1) * hidden and sent["reduce-scatter", 2] == 4 * layers * hidden
        # Gradients of whole weights, four of norms and two of QK-norms per block; of either head the largest logit, the
        # three sums of each row and the hidden gradient; the gradient norm.
        assert calls["all-reduce", 2] == 6 * layers + 2 * 3 + 1
        whole = layers * (4 * model.width + 2 * model.head_dim)
        assert sent["all-reduce", 2] == (whole + rows * (1 + 3 + model.width) + 1) * FLOAT


def test_pipeline_stages_send_hidden_states_once_each_way() -> None:
    model = MODEL
    hidden = 2 * BATCH * model.spec.length * model.width * FLOAT
    for calls, sent, _ in run_distributed(traffic_of_second_step, 2, run_of(pipeline=2, num_microbatches=4)):
        assert calls == {("send", 2): 4, ("receive", 2): 4, ("all-reduce", 2): 2}
        assert sent == {("send", 2): hidden, ("receive", 2): hidden, ("all-reduce", 2): 3 * 4 + 4}


def local(tensor: Tensor) -> Tensor:
    """Without the other ranks of ``tp``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_bytes(models: list[ViLG]) -> tuple[int, int]:
    """Bytes of weights and of gradients that this rank now holds whole, by torch's own bookkeeping."""
    weights = gradients = 0
    for model in models:
        for module in model.modules():
            if not isinstance(module, FSDPModule):
                continue
            state: Any = fully_shard.state(module)  # type: ignore[attr-defined]
            # In torch 2.11 a module has one group, or none.
            groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
            for group in filter(None, groups):
                for held in group.fsdp_params:
                    whole: Tensor | None = getattr(held, "_unsharded_param", None)
                    if whole is None:
                        continue
                    weights += local(whole).untyped_storage().nbytes()
                    waiting = (whole.grad, held.unsharded_accumulated_grad)  # since torch 2.15 the same one
                    kept = {local(g).untyped_storage().data_ptr(): local(g).nbytes for g in waiting if g is not None}
                    gradients += sum(kept.values())
    return weights, gradients


def held_between_micro_batches(run: RunConfig) -> tuple[list[tuple[int, int]], int]:
    """Whole bytes before each backward pass but the first, and the bytes that this rank's shard group shares."""
    found: list[tuple[int, int]] = []
    engine, step = step_of(run)
    before = pipeline.before_backward

    def noted(model: ViLG, zero: Any, *, is_last: bool) -> None:
        found.append(whole_bytes(list(engine.parts)))
        before(model, zero, is_last=is_last)

    passes.before_backward = pipeline.before_backward = noted  # this process ends with the test
    step(0)
    shards = sum(local(p).numel() for _, p in engine.named_parameters())
    return found[1:], shards * engine.mesh.size("shard") * FLOAT


@pytest.mark.parametrize(
    "layout",
    [
        (2, {"num_microbatches": 2}),
        (4, {"num_microbatches": 4, "pipeline": 2}),
        pytest.param((4, {"num_microbatches": 2, "tensor": 2}), marks=pytest.mark.slow),
    ],
    ids=["data 2", "pipeline 2 x data 2", "tensor 2 x data 2"],
)
@pytest.mark.parametrize(("zero", "weights", "gradients"), [(1, 1, 1), (2, 1, 0), (3, 0, 0)], ids=["1", "2", "3"])
def test_zero_holds_what_its_number_says(
    zero: int, weights: int, gradients: int, layout: tuple[int, dict[str, int]]
) -> None:
    world_size, parallel = layout
    for found, size in run_distributed(held_between_micro_batches, world_size, run_of(zero=zero, **parallel)):
        assert len(found) == parallel["num_microbatches"] - 1
        assert found == [(weights * size, gradients * size)] * len(found)
