"""The example scripts on a real SLURM of two nodes: signal, requeue, resume; a killed task; encoding; drawing; doctor.

Runs where SLURM is installed and this is root: ``make check-slurm``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vilg.checkpoint.export import load_model_folder
from megatron_vilg.cli.main import main
from tests.slurm.cluster import Cluster, running_cluster, why_not
from tests.train.test_stages import TINY, pairs

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(why_not()), reason=why_not())]
ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "slurm"
SMALL = ["--gres=none", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
STEPS = 40
WAIT = 900.0
"""Seconds that a job of a few steps may take on a machine with other work."""
LONG = [
    *TINY,
    f"train.num_steps={STEPS}",
    "train.eval_every=0",
    "train.sample_every=0",
    "checkpoint.every=100",
    "log.every=2",
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        running.environ |= {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        yield running


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with tokenizers and a token cache, so that jobs start training at once."""
    folder = tmp_path_factory.mktemp("slurm")
    pictures = pairs.__wrapped__(folder)  # type: ignore[attr-defined]
    assert main(["train", "--preset", "demo", "--data", str(pictures), "--out", str(folder / "run"), *TINY]) == 0
    shutil.rmtree(folder / "run" / "checkpoints")
    return folder


def training(prepared: Path, out: Path, *settings: str) -> list[str]:
    made = prepared / "run"
    tokenizers = [f"--{kind}-tokenizer={made / f'{kind}_tokenizer'}" for kind in ("text", "image")]
    return ["--preset", "demo", f"--data={made / 'tokens'}", f"--out={out}", *tokenizers, *LONG, *settings]


def log_of(prepared: Path, job: int) -> str:
    return (prepared / f"job-{job}.log").read_text()


def submit(cluster: Cluster, prepared: Path, script: str, *arguments: str, options: tuple[str, ...] = ()) -> int:
    log = f"--output={prepared}/job-%j.log"
    return cluster.sbatch(*SMALL, log, f"--chdir={prepared}", *options, str(SCRIPTS / script), *arguments)


def wait_for_step(run: Path, step: int, timeout: float) -> None:
    """Until the run's metrics have reached ``step``."""
    deadline = time.monotonic() + timeout
    metrics = run / "metrics.jsonl"
    while not (
        metrics.is_file() and any(json.loads(line)["step"] >= step for line in metrics.open() if line[-1] == "\n")
    ):
        assert time.monotonic() < deadline, f"{run} did not reach step {step}"
        time.sleep(0.1)


def last_loss(run: Path) -> tuple[int, float]:
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return line["step"], line["loss/total"]


def test_signalled_run_is_requeued_and_ends_like_a_straight_one(cluster: Cluster, prepared: Path) -> None:
    straight, stopped = prepared / "straight", prepared / "stopped"
    job = submit(cluster, prepared, "pretrain.sbatch", *training(prepared, straight))
    assert cluster.wait(job, ("COMPLETED", "FAILED"), WAIT) == "COMPLETED", log_of(prepared, job)
    job = submit(cluster, prepared, "pretrain.sbatch", *training(prepared, stopped))
    wait_for_step(stopped, 6, WAIT)
    cluster.run("scancel", "--signal=USR1", str(job))  # as SLURM does before the time limit
    assert cluster.wait(job, ("COMPLETED", "FAILED"), WAIT) == "COMPLETED", log_of(prepared, job)
    log = log_of(prepared, job)
    assert cluster.field(job, "Restarts") == "1" and "back into the queue" in log and ", start 2," in log
    assert "stopped by SIGUSR1 after step" in log and "resumed from" in log
    assert last_loss(stopped) == last_loss(straight) and last_loss(stopped)[0] == STEPS
    (_, one), (_, two) = (load_model_folder(run / "export") for run in (straight, stopped))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    for rank, node in enumerate(cluster.nodes):
        own = (stopped / "logs" / f"rank-{rank:04d}.log").read_text()
        assert own.count(f"rank {rank} of 2: node {node}") == 2, "each start leaves its line in the rank's own log"


def test_time_limit_requeues(cluster: Cluster, prepared: Path) -> None:
    """The signal that SLURM itself sends before the limit of one minute."""
    out = prepared / "limited"
    settings = training(prepared, out, "train.num_steps=1000000")
    job = submit(cluster, prepared, "pretrain.sbatch", *settings, options=("--time=1", "--signal=USR1@40"))
    log = prepared / f"job-{job}.log"
    deadline = time.monotonic() + WAIT
    while not log.exists() or "back into the queue" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.5)
    cluster.run("scancel", str(job))
    cluster.wait(job, ("CANCELLED",), 60)
    text = log.read_text()
    # The signal may come before the first step, even before Python can take it; nothing is lost then either.
    assert "Exited with exit code 75" in text and "stopped with code 75" in text
    if "stopped by SIGUSR1 after step" in text:
        assert any(path.name.startswith("step-") for path in (out / "checkpoints").iterdir())


def test_killed_task_ends_the_job_and_is_named(cluster: Cluster, prepared: Path) -> None:
    out = prepared / "killed"
    job = submit(cluster, prepared, "pretrain.sbatch", *training(prepared, out, "train.num_steps=1000000"))
    wait_for_step(out, 2, WAIT)
    (line,) = [line for line in (out / "logs" / "rank-0001.log").read_text().splitlines() if "rank 1 of 2" in line]
    pid = int(line.rsplit("process ", 1)[1])
    start = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert cluster.wait(job, ("FAILED", "COMPLETED"), WAIT) == "FAILED"
    assert time.monotonic() - start < 120
    log = log_of(prepared, job)
    assert "n2: task 1: Exited with exit code 137" in log, log
    assert f"LostRankError: rank 1 (node n2, process {pid}) gives no sign of life" in log, log
    assert cluster.field(job, "Restarts") == "0"
    assert "LostRankError" in (out / "logs" / "rank-0000.log").read_text()


@pytest.mark.parametrize("mistake", ["optim.lr=fast", "--data=nowhere"])
def test_a_mistake_ends_the_job_with_its_code_and_one_message(cluster: Cluster, prepared: Path, mistake: str) -> None:
    arguments = training(prepared, prepared / f"mistake-{mistake[:6]}")
    options = ("--ntasks-per-node=2",)
    job = submit(cluster, prepared, "pretrain.sbatch", *arguments, mistake, options=options)
    assert cluster.wait(job, ("FAILED", "COMPLETED"), WAIT) == "FAILED"
    log = log_of(prepared, job)
    assert cluster.field(job, "ExitCode") == "2:0" and cluster.field(job, "Restarts") == "0", log
    said = [line for line in log.splitlines() if "vilg train: " in line]
    assert len(said) == 1 and said[0].startswith("0: vilg train: "), log
    assert "frame #" not in log and "stopped by" not in log, log


def test_sigterm_with_torchrun_on_each_node_requeues(cluster: Cluster, prepared: Path) -> None:
    out = prepared / "terminated-4"
    settings = training(prepared, out, "train.num_steps=1000000")
    options = ("--ntasks-per-node=1", "--export=ALL,RANKS_PER_NODE=2")
    job = submit(cluster, prepared, "pretrain.sbatch", *settings, options=options)
    wait_for_step(out, 2, WAIT)
    cluster.run("scancel", "--signal=TERM", str(job))
    deadline = time.monotonic() + WAIT
    while "back into the queue" not in (log := log_of(prepared, job)):
        assert time.monotonic() < deadline and cluster.field(job, "JobState") != "FAILED", log
        time.sleep(0.5)
    cluster.run("scancel", str(job))
    assert "stopped by SIGTERM after step" in log and "stopped with code 75" in log, log


def test_array_job_encodes_and_ranks_draw(cluster: Cluster, prepared: Path) -> None:
    run = prepared / "run"
    tokenizers = [f"--{kind}-tokenizer={run / f'{kind}_tokenizer'}" for kind in ("text", "image")]
    sizes = [word for word in TINY if word.startswith(("image_tokenizer.", "model.", "data."))]
    arguments = [f"--data={prepared / 'pairs'}", f"--out={prepared / 'encoded'}", *tokenizers, "--preset", "demo"]
    log = f"--output={prepared}/encode-%A-%a.log"
    options = ("--nodes=1", "--array=0-2", log)
    job = submit(cluster, prepared, "encode.sbatch", *arguments, *sizes, "data.shard_size=4", options=options)
    prompts = prepared / "prompts.txt"
    prompts.write_text("红色\n绿色\n蓝色\n")
    drawing = [f"--load={run}", f"--prompt-file={prompts}", "-n", "2", f"--out={prepared / 'drawn'}"]
    second = submit(cluster, prepared, "generate.sbatch", *drawing)
    assert cluster.wait(second, ("COMPLETED", "FAILED"), WAIT) == "COMPLETED", log_of(prepared, second)
    record = json.loads((prepared / "drawn" / "generate.json").read_text())
    assert [entry["prompt"] for entry in record["prompts"]] == ["红色", "绿色", "蓝色"]
    assert main(["generate", *drawing[:-1], f"--out={prepared / 'alone'}"]) == 0
    for name in ("00000-00.png", "00002-01.png"):
        assert (prepared / "drawn" / name).read_bytes() == (prepared / "alone" / name).read_bytes()
    for task in range(3):
        text = (prepared / f"encode-{job}-{task}.log").read_text
        cluster.wait(job, ("COMPLETED", "FAILED"), WAIT)
        assert f"worker {task} of 3" in text()
    manifest = json.loads((prepared / "encoded" / "manifest.json").read_text())
    assert sum(manifest["pairs"].values()) == 12


def test_doctor_under_srun(cluster: Cluster, prepared: Path) -> None:
    command = [sys.executable, "-m", "megatron_vilg", "doctor", "--path", str(prepared), "--timeout", "60"]
    out = cluster.run("srun", "-N2", "-n4", *command, "parallel.tensor=2", timeout=WAIT)
    lines = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    assert lines["ranks"].strip() == "4 of 4 answer, 2 nodes"
    assert "every rank sees the files of all" in lines["shared folder"]
    assert "answers" in lines["axis tp"] and "answers" in lines["axis shard"]


def test_torchrun_on_each_node_is_requeued_and_resumes(cluster: Cluster, prepared: Path) -> None:
    """Two ranks from one task per node: the signal reaches them, their code reaches the script."""
    straight, stopped = prepared / "straight-4", prepared / "stopped-4"
    options = ("--ntasks-per-node=1", "--export=ALL,RANKS_PER_NODE=2")
    job = submit(cluster, prepared, "pretrain.sbatch", *training(prepared, straight), options=options)
    assert cluster.wait(job, ("COMPLETED", "FAILED"), WAIT) == "COMPLETED", log_of(prepared, job)
    job = submit(cluster, prepared, "pretrain.sbatch", *training(prepared, stopped), options=options)
    wait_for_step(stopped, 6, WAIT)
    cluster.run("scancel", "--signal=USR1", str(job))
    assert cluster.wait(job, ("COMPLETED", "FAILED"), WAIT) == "COMPLETED", log_of(prepared, job)
    log = log_of(prepared, job)
    assert cluster.field(job, "Restarts") == "1" and "back into the queue" in log, log
    assert "stopped by SIGUSR1 after step" in log and "resumed from" in log, log
    assert last_loss(stopped) == last_loss(straight) and last_loss(stopped)[0] == STEPS
    (_, one), (_, two) = (load_model_folder(run / "export") for run in (straight, stopped))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert len(list((stopped / "logs").glob("rank-*.log"))) == 4


def test_a_rank_killed_under_torchrun_ends_the_job_and_is_named(cluster: Cluster, prepared: Path) -> None:
    out = prepared / "killed-4"
    settings = training(prepared, out, "train.num_steps=1000000")
    options = ("--ntasks-per-node=1", "--export=ALL,RANKS_PER_NODE=2")
    job = submit(cluster, prepared, "pretrain.sbatch", *settings, options=options)
    wait_for_step(out, 2, WAIT)
    (line,) = [line for line in (out / "logs" / "rank-0003.log").read_text().splitlines() if "rank 3 of 4" in line]
    pid = int(line.rsplit("process ", 1)[1])
    os.kill(pid, signal.SIGKILL)
    assert cluster.wait(job, ("FAILED", "COMPLETED"), WAIT) == "FAILED"
    log = log_of(prepared, job)
    # Which node's agent gets which ranks depends on who comes first to their meeting.
    named = re.search(rf"LostRankError: rank 3 \(node n[12], process {pid}\) gives no sign of life", log)
    assert named, log
    assert cluster.field(job, "Restarts") == "0"
