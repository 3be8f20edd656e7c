"""Muon for the blocks and AdamW for the rest: what each updates, resuming, layouts."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW, Optimizer
from torch.optim import Muon as TorchMuon
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megatron_vilg.checkpoint.plan_sizes import canonical_tensors
from megatron_vilg.config.schema import OptimConfig, ParallelConfig, RunConfig
from megatron_vilg.parallel.estimate import estimate
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.parallel.update_cost import STEPS, newton_schulz_flops
from megatron_vilg.train.engine import NativeEngine
from megatron_vilg.train.muon import MOMENTUM, Muon, orthogonal
from megatron_vilg.train.optim import build_optimizer
from tests.helpers import run_distributed
from tests.tiny import tiny_batch, tiny_config, tiny_run
from tests.train.optimizer_case import losses, saved

LAYOUTS: dict[str, dict[str, Any]] = {
    "shard": {"shard": 2},
    "zero-1": {"shard": 2, "zero": 1},
    "replica": {"replica": 2, "shard": 1},
    "tensor": {"tensor": 2, "shard": 1},
    "pipeline": {"pipeline": 2, "shard": 1, "num_microbatches": 2},
    "tensor x shard": {"tensor": 2, "shard": 2},
}


def run_of(name: str = "muon", **parallel: Any) -> RunConfig:
    return dataclasses.replace(
        tiny_run(tiny_config(text_vocab_size=24, image_vocab_size=12), num_steps=60),
        optim=OptimConfig(name=name, lr=3e-3, warmup_steps=2, weight_decay=0.1),  # type: ignore[arg-type]
        parallel=ParallelConfig(**parallel),
    )


def in_layout(run: RunConfig, steps: range) -> list[float]:
    return losses(NativeEngine(run, build_mesh(run.parallel, "cpu")), steps)


def test_matrices_of_blocks_have_a_momentum_and_all_else_has_adams_moments() -> None:
    engine = NativeEngine(run_of())
    state = engine.state_dict()["optimizer"]
    names = {name: p.ndim for name, p in engine.named_parameters()}
    matrices = {name for name, ndim in names.items() if name.startswith("blocks.") and ndim == 2}
    assert len(matrices) == 6 * engine.run.model.num_layers
    assert state["momentum_buffer"].keys() == matrices
    assert state["exp_avg"].keys() == state["exp_avg_sq"].keys() == state["step"].keys() == names.keys() - matrices


def test_a_matrix_moves_along_the_nearest_orthogonal_one_as_far_as_adamw_would_and_decays() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(48, 16, generator=generator))
    before, weight.grad = weight.detach().clone(), torch.randn(48, 16, generator=generator)
    config = OptimConfig(name="muon", lr=0.01, weight_decay=0.5)
    bias = torch.nn.Parameter(torch.zeros(48))
    build_optimizer([("blocks.0.mlp.up.weight", weight), ("blocks.0.mlp.up.bias", bias)], config, "cpu").step()
    moved = (weight.detach() - before * (1 - 0.01 * 0.5)) / -0.01
    left, _, right = torch.linalg.svd(weight.grad, full_matrices=False)
    direction = left @ right
    assert torch.cosine_similarity(moved.flatten(), direction.flatten(), dim=0) > 0.97
    # The 16 singular values come out between 0.7 and 1.2, by which the root mean square differs from 0.2.
    assert moved.pow(2).mean().sqrt().item() == pytest.approx(0.2, rel=0.3)


def moved_by(build: Callable[[list[dict[str, Any]]], Optimizer], shape: tuple[int, int]) -> torch.Tensor:
    """What three updates change in a weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
    start = weight.detach().clone()
    optimizer = build([{"params": [weight], "weight_decay": 0.3}])
    for _ in range(3):
        weight.grad = torch.randn(shape, generator=generator)
        optimizer.step()
    return weight.detach() - start


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24)])
def test_bf16_moves_as_torchs_own_does_and_fp32_up_to_rounding(shape: tuple[int, int]) -> None:
    def torchs(groups: list[dict[str, Any]]) -> Optimizer:
        return TorchMuon(groups, lr=0.02, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")

    expected = moved_by(torchs, shape)
    assert torch.equal(moved_by(lambda groups: Muon(groups, 0.02, torch.bfloat16), shape), expected)
    exact = moved_by(lambda groups: Muon(groups, 0.02, torch.float32), shape)
    assert (exact - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_newton_schulz_in_fp32_equals_it_in_fp64(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = orthogonal(matrix)
    assert torch.linalg.svdvals(exact).sub(1).abs().max() < 0.35
    torch.testing.assert_close(orthogonal(matrix.float()).double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
@pytest.mark.parametrize(
    ("dtype", "small", "atol"),
    [(torch.float32, 1.0, 1e-5), (torch.float64, 1e-4, 1e-10)],
    ids=["fp32", "three large singular values, fp64"],
)
def test_steps_on_the_gram_matrix_are_those_on_the_matrix(
    shape: tuple[int, int], dtype: torch.dtype, small: float, atol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    large = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    matrix = (large + small * torch.randn(shape, generator=generator)).to(dtype)
    with Calls() as on_gram:
        found = orthogonal(matrix)
    monkeypatch.setattr("megatron_vilg.train.muon.GRAM_ASPECT", math.inf)
    with Calls() as on_matrix:
        expected = orthogonal(matrix)
    assert on_gram.found != on_matrix.found
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_bf16_takes_its_steps_on_the_matrix() -> None:
    matrix = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    with Calls() as calls:
        orthogonal(matrix)
    assert calls.found[torch.ops.aten.addmm.default] == 2 * STEPS


@pytest.mark.parametrize("in_bf16", [True, False])
@pytest.mark.parametrize("shape", [(8, 8), (8, 11), (12, 8), (32, 8), (8, 32)])
def test_the_planned_operations_are_those_a_profiler_counts(shape: tuple[int, int], in_bf16: bool) -> None:
    matrix = torch.randn(shape, dtype=torch.bfloat16 if in_bf16 else torch.float32)
    with FlopCounterMode(display=False) as counter:
        orthogonal(matrix)
    assert newton_schulz_flops(*shape, in_bf16=in_bf16) == counter.get_total_flops()


def test_a_kernel_is_updated_as_the_matrix_of_its_output_channels() -> None:
    generator = torch.Generator().manual_seed(4)
    start, gradient = torch.randn(2, 6, 4, 3, 3, generator=generator).unbind()
    kernel = torch.nn.Parameter(start.clone().contiguous(memory_format=torch.channels_last))
    matrix = torch.nn.Parameter(start.flatten(1).clone())
    kernel.grad = gradient.contiguous(memory_format=torch.channels_last)
    matrix.grad = gradient.flatten(1)
    Muon([{"params": [kernel, matrix], "weight_decay": 0.3}], 0.02, torch.float32).step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach(), rtol=0, atol=1e-6)
    assert not torch.equal(matrix.detach(), start.flatten(1))


class Calls(TorchDispatchMode):
    """Counts the operators that are called, and collects the dtypes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Any] = Counter()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found[func] += 1
        self.dtypes |= {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_is_computed_in_the_precision_of_the_run(precision: str) -> None:
    run = run_of()
    engine = NativeEngine(dataclasses.replace(run, train=dataclasses.replace(run.train, precision=precision)))
    for parameter in engine.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Calls() as calls:
        engine.optimizer.step()
    assert (torch.bfloat16 in calls.dtypes) == (precision == "bf16")


def test_what_is_no_matrix_of_a_block_is_updated_by_adamw() -> None:
    parameters = {
        name: torch.nn.Parameter(torch.ones(4, 4))
        for name in ("embed.text.weight", "heads.image.weight", "critic.weight")
    }
    assert isinstance(build_optimizer(parameters.items(), OptimConfig(name="muon"), "cpu"), AdamW)


def test_it_learns() -> None:
    found = losses(NativeEngine(run_of()), range(40))
    assert found[-1] < 0.8 * found[0]


def test_its_state_takes_the_bytes_that_were_planned() -> None:
    engine = NativeEngine(run_of())
    losses(engine, range(1))
    held = sum(tensor.nbytes for slot in engine.state_dict()["optimizer"].values() for tensor in slot.values())
    planned, adamw = (estimate(run_of(name), 1).ranks[0].memory["optimizer"] for name in ("muon", "adamw"))
    assert held == pytest.approx(planned, rel=0.01) and held < 0.7 * adamw


def test_its_checkpoint_holds_what_was_planned() -> None:
    slots = NativeEngine(run_of()).state_dict()["optimizer"]
    planned = {name for name in canonical_tensors(run_of()) if name.startswith("optimizer.")}
    assert planned == {f"optimizer.{slot}.{name}" for slot, tensors in slots.items() for name in tensors}


def test_a_resumed_run_repeats_a_straight_one_bit_for_bit(tmp_path: Path) -> None:
    straight = losses(NativeEngine(run_of()), range(4))
    assert [*saved(run_of(), tmp_path, range(2)), *saved(run_of(), tmp_path, range(2, 4))] == straight


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_losses_of_one_process(name: str) -> None:
    parallel = LAYOUTS[name]
    size = math.prod(parallel.get(axis, 1) for axis in ("tensor", "pipeline", "shard", "replica"))
    straight = losses(NativeEngine(run_of()), range(4))
    found = run_distributed(in_layout, size, run_of(**parallel), range(4))
    assert found[-1] == pytest.approx(straight, abs=1e-5)


@pytest.mark.parametrize("name", ["shard", "replica"])
def test_layouts_in_bf16_are_near_one_process(name: str) -> None:
    def in_bf16(**parallel: Any) -> RunConfig:
        run = run_of(**parallel)
        return dataclasses.replace(run, train=dataclasses.replace(run.train, precision="bf16"))

    straight = losses(NativeEngine(in_bf16()), range(4))
    assert run_distributed(in_layout, 2, in_bf16(**LAYOUTS[name]), range(4))[-1] == pytest.approx(straight, abs=1e-2)


def products_of_a_step(run: RunConfig) -> int:
    """Matrix products that this rank computes in one update."""
    engine = NativeEngine(run, build_mesh(run.parallel, "cpu"))
    for parameter in engine.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Calls() as calls:
        engine.optimizer.step()
    return sum(calls.found[operator] for operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default))


@pytest.mark.parametrize("parallel", [{"shard": 2}, {"replica": 2, "shard": 1}, {"tensor": 2, "shard": 1}], ids=str)
def test_ranks_divide_the_matrices_among_them(parallel: dict[str, int]) -> None:
    alone = products_of_a_step(run_of())
    square, oblong = 3 * STEPS, 1 + 5 + 4 + 2 * 4 + 1  # four of attention and two of the MLP, on their Gram matrices
    assert alone == (4 * square + 2 * oblong) * run_of().model.num_layers
    assert run_distributed(products_of_a_step, 2, run_of(**parallel)) == [alone // 2, alone // 2]


def test_shards_resume_in_another_layout(tmp_path: Path) -> None:
    straight = losses(NativeEngine(run_of()), range(4))
    found = [
        *run_distributed(saved, 2, run_of(), tmp_path, range(2))[0],
        *saved(run_of(), tmp_path, range(2, 3)),
        *run_distributed(saved, 2, run_of(zero=2), tmp_path, range(3, 4))[0],
    ]
    assert found == pytest.approx(straight, abs=1e-5)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    engine = NativeEngine(run_of())
    losses(engine, range(1))
    with torch.no_grad():
        engine.model.norm.bias[0] = math.inf  # type: ignore[union-attr]

    def flat() -> dict[str, torch.Tensor]:
        state = engine.state_dict()
        slots = {f"{slot} {n}": t for slot, tensors in state["optimizer"].items() for n, t in tensors.items()}
        return {name: tensor.clone() for name, tensor in (state["model"] | slots).items()}

    before = flat()
    assert engine.train_step(tiny_batch(engine.run.model)).skipped.item() == 1.0
    after = flat()
    assert all(torch.equal(before[name], after[name]) for name in before)
