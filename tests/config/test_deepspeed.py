"""What DeepSpeed is told, and what a user's file may add to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vilg.config.check import check
from megatron_vilg.config.deepspeed import deepspeed_config
from megatron_vilg.config.load import load_run_config
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.errors import ConfigError


def run_with(*overrides: str, file: Path | None = None) -> RunConfig:
    given = [f"train.deepspeed_config={file}"] if file else []
    return load_run_config(
        "demo", overrides=["train.engine=deepspeed", "optim.name=adamw", "train.batch_size=12", *overrides, *given]
    ).resolve()


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_our_options_in_deepspeed_s_words() -> None:
    run = run_with(
        "train.batch_size=48", "parallel.num_microbatches=3", "parallel.zero=2", "optim.grad_clip=0.5",
        "train.precision=bf16",
    )  # fmt: skip
    assert deepspeed_config(run, world_size=4) == {
        "train_batch_size": 48,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 2, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def test_offload_in_deepspeed_s_words(tmp_path: Path) -> None:
    both = run_with(
        "parallel.offload_optimizer=nvme", "parallel.offload_weights=cpu", f"parallel.offload_folder={tmp_path}"
    )
    zero = deepspeed_config(both, 2)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "nvme_path": str(tmp_path)}
    assert zero["offload_param"] == {"device": "cpu"}
    assert check(both, 2) == []
    short = run_with("parallel.cpu_offload=true")
    zero = deepspeed_config(short, 1)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu"} == zero["offload_param"]
    assert check(short, 1) == []
    assert (
        "offload_param"
        not in deepspeed_config(run_with("parallel.cpu_offload=true", "parallel.zero=2"), 1)["zero_optimization"]
    )


def test_a_file_adds_and_may_repeat_what_we_say(tmp_path: Path) -> None:
    content = {
        "train_batch_size": 12,
        "steps_per_print": 5,
        "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
        "aio": {"queue_depth": 8},
    }
    run = run_with(file=write(tmp_path / "ds.json", content))
    assert check(run, 2) == []
    found = deepspeed_config(run, 2)
    assert found["steps_per_print"] == 5 and found["aio"] == {"queue_depth": 8}
    assert found["zero_optimization"] == content["zero_optimization"] | {"memory_efficient_linear": False}


CONFLICTS = {
    "another stage": (
        {"zero_optimization": {"stage": 2}},
        "{f}: zero_optimization.stage is 2 there, and 3 here by parallel.zero. "
        "Works: one of them; leave zero_optimization.stage out of the file.",
    ),
    "another batch size": (
        {"train_micro_batch_size_per_gpu": 1},
        "{f}: train_micro_batch_size_per_gpu is 1 there, and 6 here by "
        "train.batch_size / (processes x parallel.num_microbatches). "
        "Works: one of them; leave train_micro_batch_size_per_gpu out of the file.",
    ),
    "offload that we do not have": (
        {"zero_optimization": {"offload_param": {"device": "cpu"}}},
        '{f}: zero_optimization.offload_param.device is "cpu" there, and nothing here by parallel.offload_weights. '
        "Works: one of them; leave zero_optimization.offload_param.device out of the file.",
    ),
    "an optimizer": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1}}},
        '{f}: optimizer.type is "AdamW" there, but here that is decided by optim.name, optim.lr, optim.betas, '
        "optim.eps and optim.weight_decay. Works: leave optimizer out of the file.",
    ),
    "tensor parallelism": (
        {"tensor_parallel": {"autotp_size": 2}},
        "{f}: tensor_parallel.autotp_size is 2 there, but here that is decided by parallel.tensor=1. "
        "Works: leave tensor_parallel out of the file.",
    ),
    "half precision": (
        {"fp16": {"enabled": True}},
        "{f}: fp16.enabled is true there, but here that is decided by train.precision. "
        "Works: leave fp16 out of the file.",
    ),
}


@pytest.mark.parametrize(("content", "message"), CONFLICTS.values(), ids=CONFLICTS)
def test_a_file_that_contradicts_is_refused_with_both_sides(content: Any, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "ds.json", content)
    run = run_with(file=file)
    assert message.format(f=file) in check(run, 2)
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(run, 2)
    assert message.format(f=file) in caught.value.problems


def test_all_contradictions_are_reported_at_once(tmp_path: Path) -> None:
    file = write(tmp_path / "ds.json", {"gradient_clipping": 7, "scheduler": {}, "zero_optimisation": {"stage": 3}})
    problems = [problem for problem in check(run_with(file=file), 2) if str(file) in problem]
    assert len(problems) == 3
    assert (
        "zero_optimisation is no key that can be passed on to DeepSpeed. Did you mean zero_optimization?" in problems[2]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory). Works: a JSON file with DeepSpeed's keys."),
        ("{", "is not JSON ("),
        ("[]", "holds no object. Works: a JSON file with DeepSpeed's keys."),
        ('{"aio": {"x": 1, "x": 2}}', "x occurs twice in one object"),
    ],
)
def test_files_that_cannot_be_read(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_text(content)
    found = [
        problem for problem in check(run_with(file=file), 2) if problem.startswith(f"train.deepspeed_config={file}: ")
    ]
    assert len(found) == 1 and message in found[0]
