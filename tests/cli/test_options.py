from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator

import pytest

from megatron_vilg.cli.options import add_config_options, run_config_from_args
from megatron_vilg.errors import ConfigError


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    return parser


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the package logs, without its own handler."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_vilg.cli.options")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_origins_are_logged_once(parser: argparse.ArgumentParser, messages: list[str]) -> None:
    run = run_config_from_args(parser.parse_args(["--preset", "demo", "optim.lr=1e-3", "train.seed=4"]))
    assert (run.optim.lr, run.train.seed) == (1e-3, 4)
    assert messages == ["configuration: defaults < preset demo < 2 from the command line"]


def test_rules_are_checked_before_any_work(parser: argparse.ArgumentParser) -> None:
    with pytest.raises(ConfigError, match="model.num_heads=5: must divide"):
        run_config_from_args(parser.parse_args(["model.num_heads=5"]))


def test_number_of_processes_comes_from_the_launcher(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="does not give the number of processes, 4"):
        run_config_from_args(parser.parse_args(["--preset", "demo", "parallel.replica=3"]), is_joint=True)


def test_options_of_a_reconstructor_that_is_off_get_a_warning(
    parser: argparse.ArgumentParser, messages: list[str]
) -> None:
    idle = ["reconstructor.weight=2", "reconstructor.detach=true"]
    run_config_from_args(parser.parse_args([*idle, "reconstructor.enabled=true"]))
    run_config_from_args(parser.parse_args([]))
    assert not [message for message in messages if "reconstructor" in message]
    assert run_config_from_args(parser.parse_args(idle)).reconstructor.weight == 2.0
    (warning,) = [message for message in messages if "reconstructor" in message]
    expected = "reconstructor.weight, reconstructor.detach: nothing reads this without reconstructor.enabled=true"
    assert warning == expected
