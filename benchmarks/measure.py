"""Fair timing: one process, contenders in turn, CPU seconds (or synchronised wall seconds on a GPU), medians."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

OURS = "megatron_vilg"


@dataclass(frozen=True, slots=True)
class Goal:
    """What a row has to reach: a bound on the ratio to the peer, or on the value itself."""

    of: Literal["ratio", "value"]
    sign: Literal[">=", "<="]
    bound: float

    def met(self, row_value: float, ratio: float | None) -> bool:
        """Whether the bound holds. A bound on the ratio is not met without one."""
        number = ratio if self.of == "ratio" else row_value
        if number is None:
            return False
        return number >= self.bound if self.sign == ">=" else number <= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}{'x' if self.of == 'ratio' else ''}"


@dataclass(frozen=True, slots=True)
class Row:
    """One measured or counted number beside its peer's."""

    id: str
    metric: str
    value: float
    unit: str
    peer: str = ""
    peer_value: float | None = None
    goal: Goal | None = None
    limit: float | None = None
    """What the hardware or the pattern allows at best, in the row's unit."""
    less_is_better: bool = False
    counted: bool = False
    """True: a number that follows from sizes alone, no clock involved."""
    rounds: Mapping[str, list[float]] = field(default_factory=dict)
    """Seconds of every round, by contender."""

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer: 2 is twice as fast, or half of the bytes."""
        if self.peer_value is None:
            return None
        return self.peer_value / self.value if self.less_is_better else self.value / self.peer_value

    @property
    def share_of_limit(self) -> float | None:
        """1 is the limit itself."""
        if self.limit is None:
            return None
        return self.limit / self.value if self.less_is_better else self.value / self.limit

    @property
    def ok(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        return None if self.goal is None else self.goal.met(self.value, self.ratio)

    def record(self) -> dict[str, Any]:
        """The row as JSON."""
        return {
            "id": self.id,
            "metric": self.metric,
            "value": self.value,
            "unit": self.unit,
            "peer": self.peer or None,
            "peer_value": self.peer_value,
            "ratio": self.ratio,
            "limit": self.limit,
            "share_of_limit": self.share_of_limit,
            "goal": None if self.goal is None else str(self.goal),
            "ok": self.ok,
            "kind": "counted" if self.counted else "measured",
            "rounds_s": {name: [round(s, 6) for s in seconds] for name, seconds in self.rounds.items()},
        }


@dataclass(frozen=True, slots=True)
class Bench:
    """Where to measure, and how often."""

    device: torch.device
    rounds: int = 5
    tiny: bool = False
    """Smallest sizes, to see that everything runs; no figure means anything then."""

    @property
    def unit(self) -> str:
        """What a rate is counted against."""
        return "GPU-second" if self.device.type == "cuda" else "CPU-second"

    def now(self) -> float:
        """CPU seconds of this process; on a GPU wall seconds, once its queue is empty."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def interleave(
        self, contenders: Mapping[str, Callable[[], object]], rounds: int | None = None, warm_up: int = 1
    ) -> dict[str, list[float]]:
        """Seconds of every contender in every round, A-B-A-B, after ``warm_up`` uncounted rounds."""
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(warm_up + (rounds or self.rounds)):
            for name, run in contenders.items():
                gc.collect()
                start = self.now()
                run()
                if number >= warm_up:
                    seconds[name].append(self.now() - start)
        return seconds


def rate_rows(
    id: str,
    metric: str,
    unit: str,
    amounts: Mapping[str, float],
    seconds: Mapping[str, list[float]],
    goal: Goal | Mapping[str, Goal],
    limit: float | None = None,
) -> list[Row]:
    """One row per peer: ``amounts`` per median second, of ours and of the peer; one goal for all, or by peer."""
    rates = {name: amounts[name] / statistics.median(seconds[name]) for name in seconds}
    return [
        Row(
            id,
            metric,
            rates[OURS],
            unit,
            peer,
            rates[peer],
            goal if isinstance(goal, Goal) else goal.get(peer),
            limit,
            rounds={OURS: seconds[OURS], peer: seconds[peer]},
        )
        for peer in rates
        if peer != OURS
    ]


def time_rows(
    id: str,
    metric: str,
    seconds: Mapping[str, list[float]],
    goals: Mapping[str, Goal],
    limit: float | None = None,
) -> list[Row]:
    """One row per peer: median milliseconds, less is better."""
    medians = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return [
        Row(
            id,
            metric,
            medians[OURS],
            "ms",
            peer,
            medians[peer],
            goals.get(peer),
            limit,
            less_is_better=True,
            rounds={OURS: seconds[OURS], peer: seconds[peer]},
        )
        for peer in medians
        if peer != OURS
    ]
