from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from megatron_vilg.config.load import (
    COMMAND_LINE,
    dump_run_config,
    load_run_config,
    load_with_origins,
    read_run_folder_config,
    write_run_folder_config,
)
from megatron_vilg.config.markup import read_yaml
from megatron_vilg.config.presets import PRESETS
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.errors import ConfigError


def problems_of(preset: str | None = None, file: Path | None = None, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run_config(preset, file, overrides)
    return list(caught.value.problems)


def test_without_anything_the_defaults_come_back() -> None:
    assert load_run_config() == RunConfig()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back_unchanged(name: str) -> None:
    assert load_run_config(name) == PRESETS[name]()


def test_default_then_preset_then_file_then_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim:\n  lr: 5e-4\n  weight_decay: 0.1\n")
    loaded = load_with_origins("demo", file, ["optim.lr=1e-4"])
    assert loaded.run.optim.lr == 1e-4
    assert loaded.run.optim.weight_decay == 0.1
    assert loaded.run.optim.warmup_steps == PRESETS["demo"]().optim.warmup_steps
    assert loaded.run.optim.eps == RunConfig().optim.eps
    origins = [loaded.origin(f"optim.{name}") for name in ("lr", "weight_decay", "warmup_steps", "eps")]
    assert origins == [COMMAND_LINE, str(file), "preset demo", "default"]


def test_the_last_of_two_settings_wins() -> None:
    assert load_run_config(overrides=["optim.lr=1", "optim.lr=2"]).optim.lr == 2.0


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4", ".1e-3", "+1e-4"])
def test_numbers_are_numbers(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"optim:\n  lr: {text}\n")
    assert load_run_config(file=file).optim.lr == pytest.approx(1e-4)
    assert load_run_config(overrides=[f"optim.lr={text}"]).optim.lr == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("text", "number"),
    [("010000", 10_000), ("0o17", 15), ("0x1F", 31), ("1_000", 1000), ("+7", 7), ("!!int 010", 10), ("0e0", 0.0)]
    + [("1_000.5", 1000.5), (".5", 0.5), ("5.", 5.0), ("1.e2", 100.0), ("!!float 3", 3.0), ("!!float 010", 10.0)]
    + [(text, text) for text in ("1:30", "1:30.5", "0b11", "1__0", "_1", "1_", "0o8", "e5", ".", "+0x1", "inf")],
)
def test_numbers_are_those_of_yaml_1_2(text: str, number: object, tmp_path: Path) -> None:
    assert read_yaml(text) == number and type(read_yaml(text)) is type(number)
    file = tmp_path / "run.yaml"
    file.write_text(f"log:\n  peak_tflops: {text}\n")
    if isinstance(number, str):
        message = f"log.peak_tflops={{}}: must be a number of at least 0, got the text '{text}'"
        assert problems_of(file=file)[0].startswith(message.format(f'"{text}"'))
        assert problems_of(overrides=(f"log.peak_tflops={text}",)) == [message.format(text) + "."]
    else:
        assert load_run_config(file=file).log.peak_tflops == number


@pytest.mark.parametrize("text", [".inf", "-.Inf", "+.INF", ".nan", ".NaN"])
def test_numbers_that_are_not_finite_are_called_so(text: str) -> None:
    value = read_yaml(text)
    assert isinstance(value, float) and not math.isfinite(value)
    assert problems_of(overrides=(f"log.peak_tflops={text}",))[0].endswith("which is not finite.")


def test_json_may_be_indented_with_tabs(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    run = load_run_config(overrides=["train.seed=5", "train.deepspeed_config=\U0001f600/a.json"])
    file.write_text(json.dumps(dump_run_config(run), indent="\t"))
    assert "\n\t\t" in file.read_text() and "\\ud83d\\ude00" in file.read_text()
    assert load_run_config(file=file) == run
    file.write_text('{\n\t"optim": {\n\t\t"lr": 1,\n\t\t"lr": 2\n\t}\n}')
    assert problems_of(file=file)[0].startswith(f"{file}: lr: is there twice (lines 3 and 4), and only one")


NOT_UTF_8 = "a\udcff"
"""What Python makes of a byte of the command line that is not UTF-8."""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"train.deepspeed_config={NOT_UTF_8}", "must be text, got the text 'a\\udcff', which is not UTF-8."),
        (f"preset={NOT_UTF_8}", "no such preset."),
        ("optim.lr=" + "[" * 1500, "must be a number above 0, got the text '[[["),
        ("optim.lr=" + "[" * 150 + "]" * 150, "must be a number above 0, got the list [[["),
        ("image_tokenizer.channel_multipliers=" + "[" * 1500, "must be a list such as [1, 2], each a whole number"),
        ("optim.lr=&a [*a]", "must be a number above 0, got the list [["),
        ("optim.lr=&a {b: *a}", "must be a number above 0, got a section."),
        ("optim.lr={2026-11-29: 1}", "must be a number above 0, got a section."),
        ("train.num_steps=0x" + "f" * 9999, "must be a whole number above 0, got the text '0xfff"),
    ],
)
def test_odd_values_are_one_problem(override: str, message: str) -> None:
    (problem,) = problems_of(overrides=(override,))
    path, _, text = override.partition("=")
    assert problem.startswith(f"{path}={text[:200]}") and message in problem and len(problem) < 800
    both = problems_of(overrides=(override, "model.width=wide"))
    assert len(both) == 2, "other mistakes are reported too"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim:\n  lr: " + "[" * 1500 + "]" * 1500, "{file}: is nested too deeply. Works: sections with options"),
        ("[" * 100_000 + "]" * 100_000, "{file}: is nested too deeply. Works: sections with options below them"),
        ("&a [*a]", "{file}: must hold sections such as `model:`, got the list [["),
        ("optim: &a [*a]", "optim=[["),
        ("&a {optim: *a}", "optim.optim={{'optim': {{'optim'"),
        ('{"train": {"deepspeed_config": "\\ud83d"}}', 'train.deepspeed_config="\\ud83d": must be text, got the text'),
        ("a: \udcff", "{file}: is not UTF-8 text (byte 3). Works: a YAML or JSON file in UTF-8."),
    ],
)
def test_odd_files_are_one_problem(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content, encoding="utf-8", errors="surrogateescape")
    (problem,) = problems_of(file=file)
    assert problem.startswith(message.format(file=file)) and len(problem) < 800


@pytest.mark.parametrize("text", ["[1, 2]", "1,2", "(1, 2)", "[1,2]"])
def test_lists_in_the_ways_people_type_them(text: str) -> None:
    run = load_run_config(overrides=[f"image_tokenizer.channel_multipliers={text}"])
    assert run.image_tokenizer.channel_multipliers == (1, 2)


def test_free_text_is_never_read_as_a_number() -> None:
    run = load_run_config(overrides=["image_tokenizer_train.perceptual_network=1e-4"])
    assert run.image_tokenizer_train.perceptual_network == "1e-4"


def test_aliases_in_both_spellings() -> None:
    run = load_run_config(overrides=["--lr", "1e-4", "--num-layers=3", "--tensor-model-parallel-size", "2"])
    assert (run.optim.lr, run.model.num_layers, run.parallel.tensor) == (1e-4, 3, 2)


def test_preset_named_in_the_file_or_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: demo\n")
    assert load_run_config(file=file) == PRESETS["demo"]()
    assert load_run_config(file=file, overrides=["preset=paper-10b"]) == PRESETS["paper-10b"]()
    assert load_run_config("e2e-300m", file) == PRESETS["e2e-300m"]()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layer=3", "model.num_layer=3: no such option. Did you mean model.num_layers?"),
        (
            "train.lr=3",
            "train.lr=3: no such option. Did you mean image_tokenizer_train.lr or reranker.lr or restyler.lr or "
            "optim.lr?",
        ),
        ("zzz.qqqqqq=3", "zzz.qqqqqq=3: no section 'zzz'. Works: model, ops, "),
        ("modle.widht=3", "modle.widht=3: no section 'modle'. Did you mean model.width? Works: model, "),
        ("optim.zzzzzz=3", "optim.zzzzzz=3: no such option. `vilg config` lists all options."),
        ("model.num_layers=true", "model.num_layers=true: must be a whole number above 0, got true."),
        ("model.num_layers=2.5", "model.num_layers=2.5: must be a whole number above 0, got the number 2.5."),
        ("model.num_layers=0", "model.num_layers=0: must be a whole number above 0, got the whole number 0."),
        ("model.num_layers=", "model.num_layers=: must be a whole number above 0, got nothing."),
        ("optim.lr=fast", "optim.lr=fast: must be a number above 0, got the text 'fast'."),
        ("optim.lr=.inf", "optim.lr=.inf: must be a number above 0, got the number inf, which is not finite."),
        ("model.dropout=1.5", "model.dropout=1.5: must be a number from 0 to 1, got the number 1.5."),
        ("model.qk_norm=1", "model.qk_norm=1: must be true or false, got the whole number 1."),
        ("model.pattern=ful", "model.pattern=ful: must be one of paper, full, got the text 'ful'."),
        (
            "optim.betas=0.9",
            "optim.betas=0.9: must be a list of 2, each a number from 0 to 1, got the list [0.9].",
        ),
        (
            "image_tokenizer.channel_multipliers=1,x",
            "image_tokenizer.channel_multipliers=1,x: must be a list such as [1, 2], each a whole number above 0, "
            'got the list [1, "x"].',
        ),
        (
            "image_tokenizer.channel_multipliers=[1,2",
            "image_tokenizer.channel_multipliers=[1,2: must be a list such as [1, 2], each a whole number above 0, "
            "got the text '[1,2'.",
        ),
        ("optim.lr=2026-13-13", "optim.lr=2026-13-13: must be a number above 0, got the text '2026-13-13'."),
        ("width", "width: must read section.option=value, for example optim.lr=1e-4."),
    ],
)
def test_each_mistake_on_the_command_line_has_its_message(override: str, message: str) -> None:
    (problem,) = problems_of(overrides=(override,))
    assert problem.startswith(message)


def test_unknown_preset_names_the_nearest() -> None:
    assert problems_of("demmo") == [
        "preset=demmo: no such preset. Did you mean demo? Works: " + ", ".join(PRESETS) + "."
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model:\n  widht: 3\n", "model.widht=3: no such option ({file}). Did you mean model.width?"),
        (
            "model:\n  width: wide\n",
            "model.width=\"wide\": must be a whole number above 0, got the text 'wide' ({file}).",
        ),
        ("model: 3\n", "model=3: is a section; write its options below it ({file})."),
        ("- model\n", '{file}: must hold sections such as `model:`, got the list ["model"].'),
        ("model: [\n", "{file}: is not YAML or JSON: "),
        ("optim:\n  lr:\n    peak: 1\n", 'optim.lr={{"peak": 1}}: must be a number above 0, got a section ({file}).'),
        ("optim:\n  lr: 2026-13-13\n", "{file}: is not YAML or JSON: month must be in 1..12"),
        (
            "model:\n  width: 8\noptim:\n  lr: 1\nmodel:\n  num_heads: 2\n",
            "{file}: model: is there twice (lines 1 and 5), and only one could count. Works: one model with everything",
        ),
        ('{"optim": {"lr": 1, "eps": 2, "lr": 3}}', "{file}: lr: is there twice (lines 1 and 1)"),
        ("learning_rate: 3\n", "learning_rate=3: no such option ({file})."),
    ],
)
def test_each_mistake_in_a_file_has_its_message(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    (problem,) = problems_of(file=file)
    assert problem.startswith(message.format(file=file))


def test_missing_file(tmp_path: Path) -> None:
    (problem,) = problems_of(file=tmp_path / "no.yaml")
    assert problem == f"{tmp_path / 'no.yaml'}: cannot be read (No such file or directory). Works: a YAML or JSON file."


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("# nothing yet\nmodel:\n")
    assert load_run_config(file=file) == RunConfig()


def test_all_problems_come_together(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  widht: 3\noptim:\n  lr: no number\n")
    problems = problems_of("demmo", file, ("train.batch_size=x", "nonsense"))
    starts = sorted(problem.split(":")[0].split("=")[0] for problem in problems)
    assert starts == ["model.widht", "nonsense", "optim.lr", "preset", "train.batch_size"]


def test_run_folder_round_trip(tmp_path: Path) -> None:
    run = load_run_config("demo", overrides=["optim.lr=1e-4", "optim.betas=[0.8,0.9]"])
    path = write_run_folder_config(run, tmp_path / "run")
    assert read_run_folder_config(tmp_path / "run") == run
    assert load_run_config(file=path) == run
    assert json.loads(path.read_text()) == dump_run_config(run)
    assert [file.name for file in path.parent.iterdir()] == ["config.json"]


def test_a_lost_node_leaves_no_empty_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is renamed must be on the disk before: else the name may outlive the content."""
    calls: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    write_run_folder_config(RunConfig(), tmp_path)
    assert calls == ["fsync", "replace"]


def test_run_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json: no such file. Works: the folder that `vilg train --out RUN`"):
        read_run_folder_config(tmp_path)


def test_run_folder_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": {"depth": 3}}')
    with pytest.raises(ConfigError, match=r"config.json: model.depth=3: no such option"):
        read_run_folder_config(tmp_path)
