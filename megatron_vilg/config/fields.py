"""Types of options: numbers with their limits, and how sections are checked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Coverage = Annotated[float, Field(ge=0.98, le=1.0)]  # SentencePiece refuses less
NonNegative = Annotated[float, Field(ge=0.0)]
Guidance = Annotated[float, Field(ge=0.0, le=1000.0)]  # so that guided logits stay finite
Positive = Annotated[float, Field(gt=0.0)]
Precision = Literal["auto", "fp32", "bf16"]

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
"""Unknown options are errors, and the text below a field is its meaning."""
