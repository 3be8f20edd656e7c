"""``vilg plan``: table, file, refusals with the nearest layout, proposals; without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vilg.cli.main import main
from megatron_vilg.config.check import check
from megatron_vilg.config.load import load_run_config

PAPER = ["plan", "--preset", "paper-10b"]


def test_table_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main([*PAPER, "--world-size", "64", "--json", str(file), "parallel.tensor=2"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert "9.666 B" in lines["model"] and "tensor 2 x pipeline 1 x replica 1 x shard 32" in lines["layout"]
    assert "fits 80 GiB" in lines["peak"] and "not measured" in lines["computed"]
    content = json.loads(file.read_text())
    assert content["layout"]["world_size"] == 64 and content["fits"]
    (rank,) = content["ranks"]
    assert set(rank["memory"]) == {"weights", "gradients", "optimizer", "activations", "logits", "buffers"}
    assert set(content["sent_bytes"]) == {"tp", "shard", "replica", "pp"}
    assert content["flops"]["kept"] < content["flops"]["dense"] < content["flops"]["executed"]
    seconds = content["seconds"]
    parts = sum(seconds[name] for name in ("compute", "idle", "tensor", "data"))
    assert seconds["step"] == pytest.approx(parts)


def test_what_is_too_large_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PAPER) == 1
    assert "DOES NOT FIT 80 GiB" in capsys.readouterr().out


def test_what_deepspeed_moves_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    tight = [*PAPER, "--world-size", "4", "--gpu-memory", "40", "parallel.num_microbatches=512"]
    tight += ["train.engine=deepspeed"]
    assert main(tight) == 1
    assert "main memory" not in capsys.readouterr().out
    assert main([*tight, "parallel.offload_optimizer=cpu"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("main memory")]
    assert "optimizer 18.41" in line and "weights" not in line


def test_samples_must_fit_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    """The first GPU has no place for a whole 10B model besides."""
    layout = [*PAPER, "--world-size", "32", "--gpu-memory", "40", "parallel.num_microbatches=4"]
    assert main(layout) == 0
    assert "samples" not in capsys.readouterr().out
    assert main([*layout, "train.sample_every=1000"]) == 1
    assert "samples        36.81 GiB: the whole model, on the first GPU every 1000 steps" in capsys.readouterr().out


def test_impossible_layouts_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PAPER, "--world-size", "16", "parallel.tensor=3"]) == 2
    error = capsys.readouterr().err
    assert "parallel.tensor=3: must divide model.num_heads=64" in error
    (line,) = [line for line in error.splitlines() if "nearest layout of 16 processes" in line]
    settings = [word for word in line.split() if word.startswith("parallel.")]
    assert "parallel.tensor=2" in settings or "parallel.tensor=4" in settings
    run = load_run_config("paper-10b", overrides=settings)
    assert check(run.resolve(text_vocab_size=18_000), 16) == []


def test_words_of_a_layout_take_back_a_schedule_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """They are pasted behind the command, whose own words stay."""
    command = [*PAPER, "--world-size", "16", "parallel.schedule=interleaved", "parallel.stages_per_rank=2"]
    memory = ["--gpu-memory", "200"]
    assert main([*command, *memory]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "nearest layout of 16 processes" in line]
    lines = [line]
    assert main([*command, *memory, "--propose"]) == 0
    lines += [line for line in capsys.readouterr().out.splitlines() if "parallel.tensor" in line]
    assert len(lines) == 6
    for line in lines:
        words = [word for word in line.split() if word.startswith("parallel.")]
        assert {"parallel.schedule=1f1b", "parallel.stages_per_rank=1"} <= set(words)
        assert main([*command, *memory, *words]) != 2, line


def test_proposals_fit_and_come_fastest_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main([*PAPER, "--world-size", "8", "--propose", "--gpu-memory", "141", "--json", str(file)]) == 0
    assert "8 GPUs of 141 GiB" in capsys.readouterr().out
    proposals = json.loads(file.read_text())["proposals"]
    seconds = [each["seconds"]["step"] for each in proposals]
    assert 1 <= len(proposals) <= 5 and seconds == sorted(seconds)
    for each in proposals:
        assert each["fits"] and each["layout"]["world_size"] == 8
        run = load_run_config("paper-10b", overrides=each["options"].split())
        assert check(run.resolve(text_vocab_size=18_000), 8) == []
    assert main([*PAPER, "--world-size", "2", "--propose", "--gpu-memory", "16"]) == 1
    assert "no layout fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--world-size", "0"], "--world-size=0: is no number of GPUs. Works: 1 to 1048576."),
        (["--world-size", "9999999999"], "--world-size=9999999999: is no number of GPUs. Works: 1 to 1048576."),
        (
            ["parallel.tensor=99999", "parallel.shard=99999"],
            "tensor x pipeline x replica x shard=9999800001: is no number",
        ),
        (["--gpu-memory", "nan"], "--gpu-memory=nan: is no quantity. Works: a finite number above 0."),
        (["--peak-tflops", "inf"], "--peak-tflops=inf: is no quantity."),
        (["--network-bandwidth", "-1"], "--network-bandwidth=-1.0: is no quantity."),
        (["--efficiency", "nan"], "--efficiency=nan: is no quantity."),
        (["--efficiency", "1.5"], "--efficiency=1.5: is a share of the peak"),
        (
            ["--json", f"{__file__}/f.json"],
            f"--json={__file__}/f.json: cannot be written ({__file__} is no folder)",
        ),
    ],
)
def test_messages(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "demo", *options]) == 2
    assert message in capsys.readouterr().err


def test_proposals_of_what_cannot_run_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    """No memory helps against a configuration that every layout refuses."""
    propose = [*PAPER, "--world-size", "16", "--propose"]
    assert main([*propose, "optim.warmup_steps=1000000"]) == 2
    out, error = capsys.readouterr()
    assert "optim.warmup_steps=1000000: must be below train.num_steps=430000" in error and "problem" in error
    assert "parallel." not in error and out == ""
    assert main([*propose[:2], "paper-10b", "--world-size", "256", "--propose", "train.batch_size=7"]) == 2
    assert "train.batch_size=7: cannot be divided over 256 GPUs in any layout" in capsys.readouterr().err


def test_offloading_is_not_called_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No time is estimated for it, which the line says, and what fits without comes first."""
    layout = [*PAPER, "--world-size", "8", "parallel.num_microbatches=128"]
    main(layout)
    assert "left out" not in capsys.readouterr().out
    main([*layout, "parallel.cpu_offload=true"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert line.endswith("left out: moving what is offloaded, and updating it there")
    file = tmp_path / "plan.json"
    for memory, needs_it in (("20", True), ("24", False)):
        words = ["--world-size", "8", "--propose", "--gpu-memory", memory, "--json", str(file)]
        assert main([*PAPER, *words, "parallel.cpu_offload=true"]) == 0
        assert "those with offloading last (left out:" in capsys.readouterr().out
        for each in json.loads(file.read_text())["proposals"]:
            assert each["seconds_leave_out_offload"] == needs_it
            settings = ["parallel.cpu_offload=true", *each["options"].split()]  # as pasted behind the command
            assert load_run_config("paper-10b", overrides=settings).parallel.cpu_offload == needs_it


def test_fp32_has_a_peak_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {}
    for precision in ("bf16", "fp32"):
        file = tmp_path / f"{precision}.json"
        words = [*PAPER, "--world-size", "8", "parallel.num_microbatches=128", f"train.precision={precision}"]
        main([*words, "--json", str(file)])
        seconds[precision] = json.loads(file.read_text())["seconds"]["compute"]
    assert seconds["fp32"] / seconds["bf16"] == pytest.approx(989 / 67)
    assert "67 TFLOP/s x 0.45" in capsys.readouterr().out


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; from megatron_vilg.cli.main import main; main(['plan', '--preset', 'paper-10b']);"
        "print(*({'torch', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr.strip() == ""


def test_a_reconstructor_is_part_of_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--preset", "e2e-300m", "--world-size", "8", "train.sample_every=0"]
    command += ["parallel.num_microbatches=32"]
    joint = [*command, "reconstructor.enabled=true", "--json", str(tmp_path / "joint.json")]
    assert main([*command, "--json", str(tmp_path / "alone.json")]) == main(joint) == 0
    alone, both = (line for line in capsys.readouterr().out.splitlines() if line.startswith("model"))
    assert "reconstructor" not in alone
    assert both.endswith(
        "0.391 B parameters, 0.302 B of them in blocks, 0.035 B in the reconstructor, on the last stage"
    )
    contents = [json.loads((tmp_path / name).read_text()) for name in ("alone.json", "joint.json")]
    assert [content["reconstructor_parameters"] for content in contents] == [0, 35_123_347]
    assert contents[1]["peak_bytes"] > contents[0]["peak_bytes"] + 1.9 * 2**30
    # 20 GiB hold 32 pairs of the generator alone, but not what their pictures keep.
    assert main([*command[:-1], "parallel.num_microbatches=2", "--gpu-memory", "20"]) == 0
    assert main([*command[:-1], "parallel.num_microbatches=2", "--gpu-memory", "20", "reconstructor.enabled=true"]) == 1
