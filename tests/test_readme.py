"""What the documents promise: commands, options, files."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import pytest

from megatron_vilg.cli.main import VERBS, main
from megatron_vilg.config.check import check
from megatron_vilg.config.load import load_run_config
from megatron_vilg.config.options import all_options

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = (ROOT / "examples" / "quickstart.sh").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def commands(text: str) -> str:
    """The lines of all ``sh`` blocks, with continued lines joined and comments removed."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return re.sub(r"\s+#.*", "", blocks)


def settings(text: str) -> list[str]:
    """Words of the form ``section.option=value`` whose value holds no shell variable."""
    return re.findall(r"(?<![\w./-])[a-z_]+\.[a-z_]+=[\w.,]+", text)


def test_every_file_is_listed_with_its_purpose() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "readme_tree.py"))
    assert tool["rewritten"](README, tool["tree"]()) == README, "run `python tools/readme_tree.py`"


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (command,) = re.findall(r"^(make .*test)$", commands(README), re.MULTILINE)
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()
    assert "make demo\n" in (ROOT / ".ci" / "run").read_text()


def test_every_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    named = {word for line in re.findall(r"\bmake ([a-z -]+)", commands(text)) for word in line.split()}
    assert named <= targets
    assert {"setup", "demo", "demo-full", "test", "check", "check-slow", "check-slurm", "bench"} <= targets


@pytest.mark.parametrize("text", [commands(README), QUICKSTART], ids=["README.md", "quickstart.sh"])
def test_every_verb_exists(text: str) -> None:
    named = set(re.findall(r"(?:^|\|\s*)(?:vilg|\$VILG|\"\$\{launch\[@\]\}\") ([a-z-]+)", text, re.MULTILINE))
    assert len(named) >= 5
    assert named <= {verb.name for verb in VERBS}


@pytest.mark.parametrize("text", [commands(README), QUICKSTART], ids=["README.md", "quickstart.sh"])
def test_settings_shown_can_run(text: str) -> None:
    shown = settings(text)
    assert len(shown) >= 4
    assert check(load_run_config("demo", overrides=shown)) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_and_file_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    sections = {path.split(".")[0] for path in all_options() if "." in path}
    options = {path for path in re.findall(r"`([a-z_]+\.[a-z_]+)(?:=[^`]*)?`", text) if path.split(".")[0] in sections}
    assert [path for path in options if path not in all_options()] == []
    files = re.findall(r"`((?:megatron_vilg|tests|tools|examples|docs|benchmarks)/[\w./-]+)`", text)
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    missing = [name for name in files if not (ROOT / name).exists()]
    missing += [name for name in links if not (document.parent / name).exists() and not name.endswith(".png")]
    assert missing == []


def test_the_weights_of_z_loss_and_who_had_them_are_the_same_everywhere() -> None:
    parity = (ROOT / "docs" / "paper-parity.md").read_text(encoding="utf-8")
    row = r"`([\w-]+)`: `loss\.z_loss=(\S+)`, Chameleon's weight \(PaLM's is (\S+)\)"
    ((preset, stated, palm),) = re.findall(row, parity)
    assert load_run_config(preset).loss.z_loss == float(stated)
    meaning = all_options()["loss.z_loss"].meaning
    assert re.findall(r"(PaLM|Chameleon) (1e-\d)", meaning) == [("PaLM", palm), ("Chameleon", stated)]


def test_the_quickstart_is_sound_shell() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "examples" / "quickstart.sh")], check=True)
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


def launches_of_10b() -> list[str]:
    """Every command shown that trains or plans ``paper-10b``: documents, and comments of the job scripts."""
    texts = [commands(document.read_text(encoding="utf-8")) for document in DOCUMENTS]
    for script in (ROOT / "examples" / "slurm").glob("*.sbatch"):
        comments = re.findall(r"^# ?(.*)$", script.read_text(encoding="utf-8"), re.MULTILINE)
        texts.append("\n".join(comments).replace("\\\n", " "))
    lines = "\n".join(texts).splitlines()
    return [
        line for line in lines if "--preset paper-10b" in line and re.search(r"vilg train|vilg plan|pretrain", line)
    ]


def plan_of(command: str) -> list[str]:
    """What ``vilg plan`` is asked to answer whether a launch fits: nodes of eight GPUs of 80 GiB, or one of 141 GB."""
    if "vilg plan" in command:
        return command.split("vilg ")[1].split()
    size = ["--gpu-memory", f"{141e9 / 2**30}"]
    if "pretrain.sbatch" in command:
        script = (ROOT / "examples" / "slurm" / "pretrain.sbatch").read_text(encoding="utf-8")
        asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\d+)$", script, re.MULTILINE))
        asked |= dict(re.findall(r"--([a-z-]+)=(\d+)", command))
        size = ["--world-size", str(int(asked["nodes"]) * int(asked["ntasks-per-node"]))]
    return ["plan", "--preset", "paper-10b", *size, *settings(command)]


@pytest.mark.parametrize("command", launches_of_10b())
def test_layouts_shown_for_10b_fit(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan_of(command)) == 0, capsys.readouterr().out


def test_no_launch_of_10b_is_overlooked() -> None:
    shown = launches_of_10b()
    found = {name: sum(name in command for command in shown) for name in ("pretrain.sbatch", "vilg train", "vilg plan")}
    assert found["pretrain.sbatch"] == 2 and found["vilg train"] == 1 and found["vilg plan"] >= 7
