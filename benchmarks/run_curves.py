"""What the instruments of a run showed, as one SVG: python benchmarks/run_curves.py RUN --out F.svg

``vilg evaluate`` puts the same plots on its page; this is for a document that shows nothing else of a run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vilg.evaluate.curves import instrument_plots, read_metrics
from megatron_vilg.evaluate.view import LinePlot

ACROSS = 3
MOST_NAMED = 6
"""More curves than this (layers) go from light to dark, without names."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; 0, or 2 if the run has nothing to show."""
    parser = argparse.ArgumentParser(prog="benchmarks/run_curves.py", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder with metrics.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="F.svg")
    options = parser.parse_args(arguments)
    plots = instrument_plots(read_metrics(options.run))
    if not plots:
        print(f"{options.run}: no lines of instruments; train with log.instruments_every=20", file=sys.stderr)
        return 2
    draw(plots, options.out)
    return 0


def draw(plots: Sequence[LinePlot], path: Path) -> None:
    """One panel per plot."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "curves", "svg.fonttype": "none"}  # the same run gives the same file
    from matplotlib import pyplot

    down = -(-len(plots) // ACROSS)
    figure, grid = pyplot.subplots(down, ACROSS, figsize=(12, 2.6 * down), layout="constrained", squeeze=False)
    for axes, plot in zip(grid.flat, plots, strict=False):
        _panel(axes, plot)
    for axes in grid.flat[len(plots) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _panel(axes: Any, plot: LinePlot) -> None:
    many = len(plot.curves) > MOST_NAMED
    for number, curve in enumerate(plot.curves):
        shade = {"color": (0.18, 0.44, 0.71, 0.25 + 0.75 * number / len(plot.curves))} if many else {}
        axes.plot(*zip(*curve.points, strict=True), lw=1.0, label=curve.name, **shade)
    axes.set_title(f"{plot.title} ({plot.unit})" + (", first layers lighter" if many else ""), fontsize=8)
    axes.set_ylim(plot.low, plot.high)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7)
    if 1 < len(plot.curves) <= MOST_NAMED:
        axes.legend(fontsize=6, frameon=False)


if __name__ == "__main__":
    sys.exit(main())
