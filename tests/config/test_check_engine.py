"""Which engine and which optimizer can do what; each message once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from megatron_vilg.config.check import check
from megatron_vilg.config.check_engine import apex_problem, missing_packages
from megatron_vilg.config.load import load_run_config

DEEPSPEED = "train.engine=deepspeed"
RULES = [
    (
        [DEEPSPEED, "parallel.pipeline=2"],
        2,
        "parallel.pipeline=2: DeepSpeed's own pipeline refuses ZeRO 2 and 3, so this engine has none. "
        "Works: 1, or train.engine=native.",
    ),
    (
        [DEEPSPEED, "parallel.tensor=2"],
        2,
        "parallel.tensor=2: DeepSpeed's AutoTP gives wrong gradients to weights that all ranks hold, such as the norms "
        "of queries and keys, so this engine has none. Works: 1, or train.engine=native.",
    ),
    (
        [DEEPSPEED, "parallel.replica=2"],
        2,
        "parallel.replica=2: this engine shards over all processes. Works: 1, or train.engine=native.",
    ),
    (
        [DEEPSPEED, "reconstructor.enabled=true"],
        1,
        "reconstructor.enabled=True: end-to-end training is the native engine's alone. "
        "Works: false, or train.engine=native.",
    ),
    (
        [DEEPSPEED, "parallel.reduce_precision=bf16"],
        2,
        "parallel.reduce_precision=bf16: DeepSpeed's own key communication_data_type says this. "
        "Works: fp32 with that key in train.deepspeed_config, or train.engine=native.",
    ),
    (
        ["parallel.reduce_precision=bf16", "parallel.zero=1", "parallel.num_microbatches=2"],
        2,
        "parallel.reduce_precision=bf16: with parallel.zero=1, parallel.num_microbatches=2 would be added up in bf16. "
        "Works: fp32, parallel.num_microbatches=1, or parallel.replica=1 with parallel.zero=2 or 3.",
    ),
    (
        ["parallel.reduce_precision=bf16", "parallel.replica=2", "parallel.num_microbatches=2"],
        2,
        "parallel.reduce_precision=bf16: with parallel.replica above 1, parallel.num_microbatches=2 would be added up "
        "in bf16. Works: fp32, parallel.num_microbatches=1, or parallel.replica=1 with parallel.zero=2 or 3.",
    ),
    (
        [DEEPSPEED, "log.instruments_every=50"],
        1,
        "log.instruments_every=50: the instruments look into the native engine's passes. "
        "Works: 0, or train.engine=native.",
    ),
    (
        [DEEPSPEED, "parallel.zero=2", "parallel.offload_weights=cpu"],
        2,
        "parallel.offload_weights=cpu: at parallel.zero=2 weights are whole on every process. "
        "Works: none, or parallel.zero=3.",
    ),
    (
        [DEEPSPEED, "parallel.zero=1", "parallel.offload_optimizer=nvme"],
        2,
        "parallel.offload_optimizer=nvme: DeepSpeed has it for parallel.zero=3 only, and it is 1. "
        "Works: none, cpu, or parallel.zero=3.",
    ),
    (
        [DEEPSPEED, "parallel.offload_optimizer=nvme"],
        2,
        "parallel.offload_folder=: must be a folder on a local disk, because something is offloaded to nvme. "
        "Works: an existing folder, or offload to cpu.",
    ),
    (
        [DEEPSPEED, "parallel.offload_optimizer=cpu", "parallel.offload_folder=/local"],
        2,
        "parallel.offload_folder=/local: nothing is offloaded to nvme. "
        "Works: leave it out, or parallel.offload_optimizer=nvme or parallel.offload_weights=nvme.",
    ),
    (
        ["parallel.offload_optimizer=cpu"],
        2,
        "parallel.offload_optimizer=cpu: is for train.engine=deepspeed. "
        "Works: none, parallel.cpu_offload=true, or train.engine=deepspeed.",
    ),
    (
        ["train.deepspeed_config=ds.json"],
        2,
        "train.deepspeed_config=ds.json: is for train.engine=deepspeed, which does not run here. "
        "Works: leave it out, or that engine.",
    ),
    (
        ["parallel.cpu_offload=true"],
        1,
        "parallel.cpu_offload=True: is for sharded weights, and there is one process. "
        "Works: false, more processes, or train.engine=deepspeed.",
    ),
    (
        [DEEPSPEED, "optim.name=adamw_8bit"],
        1,
        "optim.name=adamw_8bit: DeepSpeed cuts optimizer state where quantised blocks cannot be cut. "
        "Works: adamw, apex_fused_adam, or train.engine=native.",
    ),
    (
        ["optim.name=adamw_8bit", "model.width=320", "model.num_heads=5"],
        1,
        "optim.name=adamw_8bit: 256 neighbours in a row share a scale, and model.width / parallel.tensor is 320. "
        "Works: a multiple of 256, or optim.name=adamw.",
    ),
    (
        [DEEPSPEED, "optim.name=muon"],
        1,
        "optim.name=muon: DeepSpeed cuts matrices into flat pieces, and this optimizer needs whole ones. "
        "Works: adamw, apex_fused_adam, or train.engine=native.",
    ),
    (
        ["optim.name=muon", "parallel.cpu_offload=true"],
        2,
        "optim.name=muon: matrices would be gathered and multiplied on the CPU with parallel.cpu_offload=true. "
        "Works: false there, or optim.name=adamw.",
    ),
    (
        ["optim.name=apex_fused_adam"],
        2,
        "optim.name=apex_fused_adam: NVIDIA's kernel cannot read the sharded tensors of several processes. "
        "Works: adamw, one process, or train.engine=deepspeed.",
    ),
]


@pytest.mark.parametrize(("overrides", "world_size", "message"), RULES)
def test_rules(overrides: list[str], world_size: int, message: str) -> None:
    assert message in check(load_run_config("demo", overrides=overrides), world_size)


@pytest.mark.parametrize(
    "overrides",
    [
        [DEEPSPEED, "optim.name=adamw"],
        [DEEPSPEED, "optim.name=adamw", "parallel.zero=1"],
        [DEEPSPEED, "optim.name=adamw", "parallel.offload_weights=cpu"],
        ["optim.name=adamw_4bit"],
        ["optim.name=muon"],
    ],
)
def test_what_works(overrides: list[str]) -> None:
    for size in (1, 2):
        assert check(load_run_config("demo", overrides=overrides), size) == []


def test_missing_packages_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = load_run_config("demo", overrides=[DEEPSPEED, "optim.name=adamw_8bit"])
    assert missing_packages(run) == [
        "train.engine=deepspeed: DeepSpeed is not installed. "
        "Works: pip install 'megatron_vilg[deepspeed]', or train.engine=native.",
        "optim.name=adamw_8bit: torchao is not installed. "
        "Works: pip install 'megatron_vilg[lean]', or optim.name=adamw.",
    ]
    apex = missing_packages(load_run_config("demo", overrides=["optim.name=apex_fused_adam"]))
    assert apex[0].startswith(
        "optim.name=apex_fused_adam: Apex is not installed; `pip install apex` gives something else."
    )


def test_the_other_apex_of_the_package_index_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise ModuleNotFoundError('pyramid_mailer')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "apex" not in sys.modules
    problem = apex_problem()
    assert problem is not None
    assert f"the package apex in {package} is not NVIDIA's but the web toolkit" in problem
    assert "built from source (github.com/NVIDIA/apex)" in problem
    (package / "optimizers").mkdir()
    (package / "optimizers" / "fused_adam.py").touch()
    assert apex_problem() is None
