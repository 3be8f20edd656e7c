"""What a report shows, apart from how: filled by the evaluation, drawn as PNG and written as HTML."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image


@dataclass(frozen=True, slots=True)
class Sample:
    """One drawn picture and the verdict on it."""

    picture: Image.Image
    concept: bool | None = None
    """Whether it shows the asked concept; None: not judged."""
    style: bool | None = None
    """Whether it has the asked style; None: not judged."""


@dataclass(frozen=True, slots=True)
class DrawnPrompt:
    """A prompt, the real picture that belongs to it, that picture through the image tokenizer, and drawn ones."""

    prompt: str
    note: str
    """A second, smaller line, for readers without Chinese."""
    real: Image.Image
    reconstruction: Image.Image
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class CaptionedPicture:
    """A picture with its true and its generated caption."""

    picture: Image.Image
    true: str
    generated: str

    @property
    def is_right(self) -> bool:
        """Whether the captions agree, white space apart."""
        return "".join(self.true.split()) == "".join(self.generated.split())


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts and pictures of one kind, shown side by side with the other kind, never mixed with it."""

    title: str
    subtitle: str
    prompts: tuple[DrawnPrompt, ...]
    captions: tuple[CaptionedPicture, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Figures as text; the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """One quantity over training steps."""

    name: str
    points: tuple[tuple[int, float], ...]
    """(step, value), steps rising, at least one; a value may be NaN or infinite."""


@dataclass(frozen=True, slots=True)
class LinePlot:
    """Curves of one unit that belong together."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    note: str = ""
    low: float | None = None
    """Lower end of the axis; None: from the values."""
    high: float | None = None


@dataclass(frozen=True, slots=True)
class ReportView:
    """One page."""

    title: str
    subtitle: str
    groups: tuple[Group, ...]
    tables: tuple[Table, ...]
    footer: tuple[str, ...] = field(default=())
    choice: str = ""
    """How the prompts and drawings that are shown were chosen."""
    plots: tuple[LinePlot, ...] = field(default=())
    """Of the run's training; on the HTML page only."""
