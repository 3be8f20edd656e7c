"""Two ways of training on the same batches, in turn: what each did, and how many steps one saves beside the other."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import Bench, Row
from benchmarks.run import describe, line, write_rows


@dataclass(slots=True)
class Course:
    """CPU seconds of each step, and by name of a held-out figure its values with the steps done."""

    seconds: list[float] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def note(self, name: str, step: int, value: float) -> None:
        """Add a held-out figure as it is after a step."""
        self.curves.setdefault(name, []).append((step, value))


def rows_of_curve(id: str, name: str, unit: str, ours: Course, peer: tuple[str, Course], prefix: str) -> Iterator[Row]:
    """Steps to the last value of the peer, and the last ones; less is better.

    The peer may have been there before its end, where its curve turned: its own first step there is what counts.
    """
    peer_name, theirs = peer
    end, bound = theirs.curves[name][-1]
    reached = _first_step(ours, name, bound)
    if reached is not None:  # otherwise there is no ratio, and the next row says by how much it was missed
        metric = f"{prefix}steps to {peer_name}'s last {name}, held out"
        yield Row(id, metric, reached, "steps", peer_name, _first_step(theirs, name, bound), less_is_better=True)
    metric = f"{prefix}{name} after {end} steps, held out"
    yield Row(id, metric, ours.curves[name][-1][1], unit, peer_name, bound, less_is_better=True)


def _first_step(course: Course, name: str, bound: float) -> int | None:
    return next((step for step, value in course.curves[name] if value <= bound), None)


def row_of_seconds(id: str, name: str, ours: Course, peer: tuple[str, Course], prefix: str) -> Row:
    """Median CPU seconds of a step."""
    peer_name, theirs = peer
    both = {name: ours.seconds, peer_name: theirs.seconds}
    value, peer_value = (statistics.median(seconds) for seconds in both.values())
    metric = f"{prefix}training step"
    return Row(id, metric, value, "CPU-seconds", peer_name, peer_value, less_is_better=True, rounds=both)


def show(bench: Bench, command: str, rows: Sequence[Row], courses: Mapping[str, Course], file: Path | None) -> None:
    """Print rows; where a file is given write them with their machine and command, and the curves that they are of."""
    for row in rows:
        print(line(row))
    if file is not None:
        curves = {name: course.curves for name, course in courses.items()}
        write_rows(file, describe(bench.device, command) | {"curves": curves}, rows)
