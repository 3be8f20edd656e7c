"""What ``precision=auto`` means for a run: settled once, by the hardware of all its processes, and kept on resuming."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_vilg.checkpoint.image_tokenizer import WORK_NAME
from megatron_vilg.checkpoint.manager import newest_manifest
from megatron_vilg.config.load import RUN_FILE
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.errors import ConfigError
from megatron_vilg.log import get_logger
from megatron_vilg.ops.precision import Precision, choose_precision
from megatron_vilg.parallel.launch import all_agree

log = get_logger(__name__)

Section = Literal["train", "image_tokenizer_train"]


def settle_precision(run: RunConfig, device: torch.device | str, run_dir: Path | None = None) -> RunConfig:
    """``run`` with ``fp32`` or ``bf16`` wherever it says ``auto``. All processes of a job make this call together.

    Args:
        run: checked configuration.
        device: where this process computes.
        run_dir: run folder; what an earlier start of the run settled on holds, so that a resumed run repeats a
            straight one on whatever machine.

    Raises:
        ConfigError: its ``config.json`` is damaged, and ``auto`` was asked for.
    """
    sections: tuple[Section, ...] = ("train", "image_tokenizer_train")
    for section in sections:
        options = getattr(run, section)
        if options.precision == "auto":
            precision = _settled(section, device, run_dir)
            run = dataclasses.replace(run, **{section: dataclasses.replace(options, precision=precision)})
    return run


def _settled(section: Section, device: torch.device | str, run_dir: Path | None) -> Precision:
    fastest, reason = choose_precision("auto", device)
    if (kept := _kept(section, run_dir)) is not None:
        log.info("%s.precision: %s (as this run began)", section, kept)
        if kept == "bf16" and fastest == "fp32":
            log.warning("%s, so this is slow here. %s.precision=fp32 is faster, and changes the run", reason, section)
        return kept
    if not all_agree(fastest == "bf16", device) and fastest == "bf16":
        fastest, reason = "fp32", "another process has no bfloat16 instructions"
    log.info("%s.precision: %s (%s)", section, fastest, reason)
    return fastest


def _kept(section: Section, run_dir: Path | None) -> Precision | None:
    """What an earlier start settled on: by the image tokenizer's checkpoints, or by ``RUN/config.json``.

    That file is written when the generator's training begins, and never by ``vilg train-vqgan``.
    """
    if run_dir is None:
        return None
    if section == "image_tokenizer_train":
        _, manifest = newest_manifest(run_dir / WORK_NAME / "checkpoints")
        if manifest is not None:
            return _settled_value(json.loads(str(manifest.counters.get("options", "{}"))).get("precision"))
    file = run_dir / RUN_FILE
    return _settled_value(_noted(file, section)) if file.is_file() else None


def _noted(file: Path, section: Section) -> object:
    """The precision of a section in ``RUN/config.json``."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        return content.get(section, {}).get("precision")
    except (OSError, ValueError, AttributeError) as error:
        rule = f"cannot be read ({error}), and would say what {section}.precision=auto was when this run began"
        works = f"the file as it was, or {section}.precision=fp32 or bf16, as the first lines of RUN/logs say"
        raise ConfigError([f"{file}: {rule}. Works: {works}"]) from error


def _settled_value(found: object) -> Precision | None:
    return found if found in ("fp32", "bf16") else None
