"""``vilg evaluate``: what a run has learnt, as figures and a picture; or how good a file of captions is."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vilg.cli.device import add_device_option, chosen_device
from megatron_vilg.cli.outputs import require_json_place, require_writable, write_json
from megatron_vilg.cli.tensor import WAIT_SECONDS
from megatron_vilg.config.world import read_world
from megatron_vilg.errors import ConfigError, DataError
from megatron_vilg.log import get_logger

if TYPE_CHECKING:
    import torch

    from megatron_vilg.config.schema import RunConfig
    from megatron_vilg.evaluate.pairs import EvalSet
    from megatron_vilg.evaluate.subject import Subject
    from megatron_vilg.generate.pipeline import Pipeline
    from megatron_vilg.parallel.replicas import Replicas

_log = get_logger(__name__)
_CAPTIONS = "captions"
_TABLE7 = "table7"
_SECTION = "sample."
_MEANT = {
    _CAPTIONS: ("references", "candidates", "json"),
    _TABLE7: ("load", "data", "out", "json", "max_prompts", "max_batch"),
    "": ("load", "data", "out", "samples_per_prompt", "max_prompts", "seed", "max_batch"),
}
"""The options that each task reads; ``--device`` aside."""
_DRAWS_ONE = ("rerank", "rerank_drawing_weight", "rerank_contrastive_weight", "caption_candidates")
"""Settings without meaning where one picture is drawn of each prompt and nothing captioned."""
_WITHOUT_SECONDS = "remove it to go on without the seconds of the stages"
_KV_BYTES = 2**31
"""Keys and values that may be kept at a time while drawing: the default of ``--max-batch``."""


def add_parser(subparsers: Any) -> None:
    """Register the verb; ``subparsers`` is what ``ArgumentParser.add_subparsers`` returns."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "evaluate",
        help="measure what a run has learnt",
        description="Draw and caption pairs that training has seen and pairs it has not, and write report.json, "
        "report.png and report.html. With the word `captions`: score a file of captions. With `table7`: compare "
        "two-stage and end-to-end runs as the paper's Table 7 does, in table7.png and table7.html. The pages plot what "
        "the instruments of a run showed (log.instruments_every).",
        epilog="example: vilg evaluate --load runs/demo --data data/demo --out runs/demo sample.temperature=0.7;  "
        "vilg evaluate captions --references R.jsonl --candidates C.jsonl --json scores.json;  "
        "vilg evaluate table7 --load runs/joint-0 runs/detached-0 --data data/demo --json table7.json --out report",
    )
    parser.add_argument(
        "words", nargs="*", metavar="captions | table7 | sample.option=value", help="task, or settings of drawing"
    )
    run_options = parser.add_argument_group("a run")
    run_options.add_argument(
        "--load", metavar="RUN", type=Path, nargs="+", help="run folder, or an exported folder; several for table7"
    )
    run_options.add_argument("--data", metavar="D", type=Path, help="the pairs that it was trained on")
    run_options.add_argument("--out", metavar="E", type=Path, help="folder for the report")
    run_options.add_argument("--samples-per-prompt", metavar="N", type=_positive, help="judged; default 1")
    run_options.add_argument("--max-prompts", metavar="N", type=_positive, help="of each kind; default 160")
    run_options.add_argument(
        "--max-batch",
        metavar="N",
        type=_positive,
        help="pictures drawn or captioned, and pairs measured, at a time; default: those whose keys and values fit "
        "2 GiB",
    )
    run_options.add_argument("--seed", metavar="S", type=int, help="what is looked at and drawn; default: train.seed")
    add_device_option(run_options)
    captions = parser.add_argument_group("captions")
    captions.add_argument("--references", metavar="R.jsonl", type=Path, help='lines {"id": .., "captions": [..]}')
    captions.add_argument("--candidates", metavar="C.jsonl", type=Path, help='lines {"id": .., "caption": ..}')
    captions.add_argument("--json", metavar="F", type=Path, help="file for the scores (also of table7); default: print")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Dispatch on the first word."""
    task = args.words[0] if args.words and args.words[0] in _MEANT else ""
    _refuse_unused(args, task)
    if task == _CAPTIONS:
        _need(args, f"evaluate {_CAPTIONS}", "references", "candidates")
        _score_captions(args)
    elif task == _TABLE7:
        _need(args, f"evaluate {_TABLE7}", "load", "data", "json")
        _table7(args)
    else:
        _need(args, "evaluate", "load", "data", "out")
        if len(args.load) > 1:
            raise ConfigError([f"--load: {len(args.load)} runs; only table7 takes several. Works: one run"])
        _report(args)


def _refuse_unused(args: argparse.Namespace, task: str) -> None:
    """Refuse what the task would not read."""
    what = f"`{f'vilg evaluate {task}'.strip()}`"
    works = ", ".join("--" + name.replace("_", "-") for name in _MEANT[task])
    options = {name for names in _MEANT.values() for name in names} - set(_MEANT[task])
    given = [name for name in sorted(options) if getattr(args, name) is not None]
    problems = [f"--{name.replace('_', '-')}: {what} has no use for it. Works: {works}" for name in given]
    if task == _CAPTIONS:
        problems += [f"{word}: {what} reads two files and draws nothing; leave it out" for word in args.words[1:]]
    if problems:
        raise ConfigError(problems)


def _need(args: argparse.Namespace, what: str, *names: str) -> None:
    missing = [f"--{name}" for name in names if getattr(args, name) is None]
    if missing:
        raise ConfigError([f"vilg {what} needs {' '.join(missing)}; vilg evaluate --help shows an example"])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _score_captions(args: argparse.Namespace) -> None:
    from megatron_vilg.evaluate.caption_files import compare_captions, read_candidates, read_references

    _require_places(args)
    figures = compare_captions(read_references(args.references), read_candidates(args.candidates))
    if args.json is None:
        print(json.dumps(figures, indent=1))
        return
    write_json(args.json, figures)
    _log.info("scores of %d captions: %s", figures["count"], args.json)


def _report(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    from megatron_vilg.parallel.launch import device_of, joined
    from megatron_vilg.parallel.replicas import Replicas

    world = read_world()
    changed = _drawing_settings(args.words)
    _require_places(args)
    device = device_of(world, chosen_device(args.device))
    with joined(world, device, WAIT_SECONDS):
        _measure(args, changed, device, Replicas.of_group(), started)


def _measure(
    args: argparse.Namespace, changed: dict[str, Any], device: torch.device, replicas: Replicas, started: float
) -> None:
    """Measure together with other processes; the main one writes the report."""
    from megatron_vilg.evaluate.curves import instrument_plots, read_metrics
    from megatron_vilg.evaluate.demo_report import FEATURE_NETWORK, make_report, write_report
    from megatron_vilg.evaluate.pairs import read_eval_set
    from megatron_vilg.evaluate.subject import EvaluationSettings
    from megatron_vilg.generate.pipeline import Pipeline
    from megatron_vilg.models.features import load_feature_network

    pipeline = Pipeline.load(args.load[0], device=device)
    config = _with_settings(pipeline.config, changed)
    pipeline.max_batch = _max_batch(args, config)
    pairs, scenes = read_eval_set(
        args.data,
        config.image_tokenizer.image_size,
        max_bad_share=config.data.max_bad_share,
        val_share=config.data.val_share,
    )
    pairs, scenes = _as_trained(args.load[0], args.data, pairs, scenes, config.data.max_bad_share)
    asked = {name: getattr(args, name) for name in ("seed", "samples_per_prompt", "max_prompts")}
    settings = EvaluationSettings(
        **{"seed": config.train.seed} | {name: value for name, value in asked.items() if value is not None}
    )
    network = load_feature_network(FEATURE_NETWORK) if pairs.labelled(range(len(pairs))) else None
    report = make_report(
        _subject(pipeline, config, replicas),
        pairs,
        network,
        settings,
        scenes=scenes,
        seconds=_seconds(args.load[0]),
        started=started,
        credits=_credits(pairs),
        plots=instrument_plots(read_metrics(args.load[0])),
    )
    if replicas.is_main:
        write_report(report, args.out)
        _log.info("report: %s", args.out / "report.png")


def _as_trained(load: Path, data: Path, pairs: EvalSet, scenes: EvalSet, max_share: float) -> tuple[EvalSet, EvalSet]:
    """The pairs, held against those that the run was trained on, as far as its token cache is there to say."""
    from megatron_vilg.checkpoint.sources import EXPORT_FOLDER
    from megatron_vilg.data.token_cache import TokenCache
    from megatron_vilg.evaluate.pairs import hold_against_training
    from megatron_vilg.train.same_pairs import require_own_tokens
    from megatron_vilg.train.stages import TOKENS

    run = load.resolve().parent if load.resolve().name == EXPORT_FOLDER else load
    if not (tokens := run / TOKENS).is_dir():
        _log.warning(
            "--load=%s: there is no %s, so which pairs were trained and which not is taken from --data=%s unchecked",
            *(load, tokens, data),
        )
        return pairs, scenes
    require_own_tokens(load, TokenCache.open(tokens))
    return hold_against_training(pairs, scenes, data, tokens, max_share)


def _table7(args: argparse.Namespace) -> None:
    from megatron_vilg.config.load import dump_run_config
    from megatron_vilg.evaluate.curves import instrument_plots, read_metrics
    from megatron_vilg.evaluate.demo_report import FEATURE_NETWORK
    from megatron_vilg.evaluate.frechet import FEATURE_SIDE
    from megatron_vilg.evaluate.pairs import read_eval_set
    from megatron_vilg.evaluate.subject import EvaluationSettings
    from megatron_vilg.evaluate.table7 import choose_pairs, measure_table7, require_enough, role_of
    from megatron_vilg.evaluate.table7_report import write_table7, write_table7_page
    from megatron_vilg.generate.pipeline import Pipeline
    from megatron_vilg.models.features import load_feature_network

    changed = _drawing_settings(args.words[1:], without=_DRAWS_ONE)
    _require_places(args)
    max_pairs = args.max_prompts or EvaluationSettings().max_prompts
    require_enough(max_pairs)
    runs = [Pipeline.load(path, device=chosen_device(args.device)) for path in args.load]
    config = _with_settings(runs[0].config, changed)
    pairs, scenes = read_eval_set(
        args.data,
        config.image_tokenizer.image_size,
        max_bad_share=config.data.max_bad_share,
        val_share=config.data.val_share,
    )
    for path, run in zip(args.load, runs, strict=True):
        run.max_batch = _max_batch(args, run.config)
        pairs, scenes = _as_trained(path, args.data, pairs, scenes, config.data.max_bad_share)
    choose_pairs(pairs, max_pairs)  # what is wrong with them is said before more is loaded
    network = load_feature_network(FEATURE_NETWORK)
    table = measure_table7(runs, pairs, network, max_pairs=max_pairs, settings=config.sample)
    table.figures |= {
        "network": f"{FEATURE_NETWORK}, last layer, mean over positions (1280 numbers), pictures at {FEATURE_SIDE} px",
        "drawing_settings": dataclasses.asdict(config.sample),
        "runs": [
            {"folder": path.name, "role": role_of(run.config), "seed": run.config.train.seed, "step": run.step}
            for path, run in zip(args.load, runs, strict=True)
        ],
        "config": dump_run_config(runs[0].config),
    }
    write_table7(table, args.json, None if args.out is None else args.out / "table7.png")
    if args.out is not None:
        plots = {
            f"{role_of(run.config)}, seed {run.config.train.seed}: {path}": instrument_plots(read_metrics(path))
            for path, run in zip(args.load, runs, strict=True)
        }
        write_table7_page(table, plots, args.out / "table7.html")
    _log.info("table 7: %s", args.json)


def _max_batch(args: argparse.Namespace, config: RunConfig) -> int:
    """Pictures at a time: as asked for, or what fits with the run's guidance."""
    from megatron_vilg.generate.cache import pictures_within
    from megatron_vilg.ops.sampling import part_weights

    rows = 2 + sum(1 for weight in part_weights(config.sample) if weight)
    return int(args.max_batch or pictures_within(config.model, _KV_BYTES, rows=rows))


def _require_places(args: argparse.Namespace) -> None:
    require_json_place(args.json)
    if args.out is not None:
        require_writable(args.out, f"--out={args.out}")


def _drawing_settings(words: list[str], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Fields of ``SampleConfig`` that ``sample.option=value`` give; other words and those ``without`` are refused."""
    from megatron_vilg.config.load import load_run_config
    from megatron_vilg.config.options import all_options

    can = [name for name in all_options() if name.startswith(_SECTION) and name.removeprefix(_SECTION) not in without]
    known = ", ".join(can)
    unused = {_SECTION + name for name in without}
    wrong = [
        f"{word}: of a trained run only drawing can be changed. Works: {known}."
        for word in words
        if not word.startswith(_SECTION)
    ]
    wrong += [
        f"{word}: here one picture is drawn of each prompt and none captioned, so it has no effect. Works: {known}."
        for word in words
        if word.partition("=")[0] in unused
    ]
    if wrong:
        raise ConfigError(wrong)
    given = load_run_config(overrides=words).sample
    names = {word.removeprefix(_SECTION).partition("=")[0] for word in words}
    return {name: getattr(given, name) for name in names}


def _with_settings(config: RunConfig, changed: dict[str, Any]) -> RunConfig:
    """The run's configuration with other settings of drawing."""
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, **changed))


def _subject(pipeline: Pipeline, config: RunConfig, replicas: Replicas) -> Subject:
    import torch
    from torch import Tensor

    from megatron_vilg.data.batch import PairBatch
    from megatron_vilg.evaluate.divided import DividedPipeline
    from megatron_vilg.evaluate.subject import Subject

    @torch.no_grad()
    def forward(batch: PairBatch) -> tuple[Tensor, Tensor]:
        text_ids, image_ids, text_len = batch.to(pipeline.device).rows()
        image_logits, text_logits = pipeline.model(text_ids, image_ids, text_len=text_len)
        return image_logits.cpu(), text_logits.cpu()

    divided = DividedPipeline(pipeline, replicas)
    parts = pipeline.image_tokenizer, pipeline.text_tokenizer
    heard = pipeline.reranker if config.sample.rerank and config.sample.rerank_contrastive_weight else None
    draws = pipeline.restyling if config.sample.restyle else None
    return Subject(
        divided,
        *parts,
        forward,
        config,
        max_batch=pipeline.max_batch,
        reranker=None if heard is None else heard.config,
        restyler=None if draws is None else draws.model.config,
        replicas=replicas,
    )


def _seconds(run_dir: Path) -> dict[str, float]:
    """Wall seconds of the run's stages, as far as they were written down."""
    from megatron_vilg.train.stages import SECONDS

    path = run_dir / SECONDS
    if not path.is_file():
        return {}
    try:
        seconds = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); {_WITHOUT_SECONDS}") from error
    if not isinstance(seconds, dict):
        raise DataError(f"{path}: holds no object of seconds by stage but {seconds!r:.60}; {_WITHOUT_SECONDS}")
    for stage, value in seconds.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"{path}: {stage}={value!r:.60} is no number of seconds; {_WITHOUT_SECONDS}")
    return {stage: float(value) for stage, value in seconds.items()}


def _credits(pairs: EvalSet) -> list[str]:
    """Whom to name beside pictures of the demo's sets."""
    from megatron_vilg.data.emoji import STYLES

    shown = {label.style for label in pairs.labels(pairs.labelled(range(len(pairs))))}
    return [f"{style.credit} ({style.licence})" for key, style in STYLES.items() if key in shown]
