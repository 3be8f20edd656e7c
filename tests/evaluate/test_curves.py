"""From ``metrics.jsonl`` to plots: which curves stand together, what is marked, and files that cannot be read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_vilg.errors import DataError
from megatron_vilg.evaluate.curves import MOST_POINTS, instrument_plots, read_metrics, thinned
from megatron_vilg.evaluate.line_plot import render_plot, round_values
from megatron_vilg.evaluate.view import Curve, LinePlot


def metric_line(step: int, **changes: float | None) -> str:
    """A line of a joint run with a critic, twelve layers, at a log step at which the instruments looked."""
    values: dict[str, float | None] = {
        "loss/total": 9.0,
        "loss/text_to_image(nats/token)": 5.0 / step,
        "loss/image_to_text(nats/token)": 3.0 / step,
        **{f"attention/max_logit(layer {layer})": 1.0 + layer + step for layer in range(12)},
        "hidden/last_rms": 0.5,
        "log_z(text_to_image)": 6.0,
        "log_z(image_to_text)": 7.0,
        "gradient(text_to_image)": 1.0,
        "gradient(image_to_text)": 200.0,
        "gradient(reconstruction)": 0.1,
        "gradient/cosine(generation, reconstruction)": -0.2,
        **{f"update/weight({part})": 1e-3 for part in ("embed", "blocks", "norm", "heads", "reconstructor")},
        "critic/open(0-1)": 1.0,
        "loss/critic": 0.9,
        "loss/adversarial": -0.1,
        "critic/weight": 0.2,
    }
    return json.dumps({"step": step} | values | changes) + "\n"


def lines(*texts: str) -> list[dict[str, object]]:
    return [json.loads(text) for text in texts]


def test_every_instrument_has_its_plot() -> None:
    plots = instrument_plots(lines(metric_line(1), json.dumps({"step": 2, "loss/total": 3.0}), metric_line(10)))
    by_title = {plot.title: plot for plot in plots}
    assert list(by_title) == [
        "Cross-entropy",
        "Largest attention logit of each layer",
        "Size of the last block's output",
        "Mean log Z of both heads",
        "Gradient norm of each loss term",
        "Cosine of generation's and reconstruction's gradient",
        "Update over weight of each part",
        "Openness of the critic",
        "Losses of the critic",
        "Weight of the critic",
    ]
    layers = by_title["Largest attention logit of each layer"].curves
    assert [curve.name for curve in layers] == [f"layer {n}" for n in range(12)]
    assert layers[11].points == ((1, 13.0), (10, 22.0)), "lines without the metric are passed over"
    assert [c.name for c in by_title["Losses of the critic"].curves] == ["adversarial", "critic"]
    assert {c.name for c in by_title["Update over weight of each part"].curves} >= {"embed", "reconstructor"}
    assert {c.name for c in by_title["Cross-entropy"].curves} == {"text to image", "image to text"}


def test_runs_without_instruments_have_no_plots() -> None:
    assert instrument_plots(lines(json.dumps({"step": 1, "loss/total": 3.0, "critic/open(0-1)": 0.0}))) == ()
    assert instrument_plots([]) == ()


def test_values_that_are_not_finite_break_a_line_and_are_marked() -> None:
    found = instrument_plots(
        lines(*(metric_line(s, **{"hidden/last_rms": None if s == 3 else 2.0 * s}) for s in range(1, 7)))
    )
    (plot,) = (plot for plot in found if plot.title.startswith("Size"))
    assert math.isnan(plot.curves[0].points[2][1])
    drawn = render_plot(plot)
    assert drawn.count("<polyline") == 2 and drawn.count("×") == 1
    nothing = LinePlot("lost", "", (Curve("all", ((1, math.nan), (2, math.inf))),))
    assert render_plot(nothing).count("×") == 2


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 0.0], [-5.0, 3.0], [1e-6, 10.0], [1e30, 2e30], [7.0]])
def test_plots_are_well_formed_and_stay_inside(values: list[float]) -> None:
    points = tuple((100 * step, value) for step, value in enumerate(values))
    plot = LinePlot("<title> & co", "unit", (Curve("one", points), Curve("two", points)), "a note")
    root = ElementTree.fromstring(render_plot(plot).replace("&nbsp;", " "))
    (svg,) = root.iter("svg")
    _, _, width, height = (float(number) for number in svg.attrib["viewBox"].split())
    for line in svg.iter("polyline"):
        for place in line.attrib["points"].split():
            x, y = map(float, place.split(","))
            assert 0 <= x <= width and 0 <= y <= height
    assert len(list(svg.iter("text"))) >= 3, "there are numbers at the axes"


def test_layers_are_named_by_the_first_and_the_last() -> None:
    curves = tuple(Curve(f"layer {n}", ((0, float(n)), (1, float(n)))) for n in range(48))
    drawn = render_plot(LinePlot("logits", "", curves))
    caption = drawn[drawn.index("<figcaption>") :]
    assert "layer 0" in caption and "layer 47" in caption and "layer 1<" not in caption
    assert drawn.count("<polyline") == 48


def test_thinning_keeps_peaks_and_what_is_not_finite() -> None:
    points = [(step, 1.0) for step in range(5000)]
    points[1234], points[4000] = (1234, 99.0), (4000, math.inf)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 2
    assert (1234, 99.0) in kept and (4000, math.inf) in kept
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    assert thinned(points[:10]) == tuple(points[:10])


def test_round_values() -> None:
    assert round_values(0.0, 1000.0) == [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]
    assert round_values(-0.2, 0.3) == pytest.approx([-0.2, -0.1, 0.0, 0.1, 0.2, 0.3])


def test_files_of_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    file = tmp_path / "metrics.jsonl"
    file.write_text(metric_line(1) + metric_line(2) + '{"step": 3, "loss')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    for bad in ("{half\n", '{"loss/total": 1}\n', "[]\n"):
        file.write_text(metric_line(1) + bad + metric_line(2))
        with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
            read_metrics(tmp_path)
