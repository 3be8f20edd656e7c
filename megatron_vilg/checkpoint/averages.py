"""Some tensors of a source under other names, such as averaged weights in place of those of the last step.

A run that averages weights (``reconstructor.ema_decay``, ``image_tokenizer_train.weights_ema_decay``) exports the
averages, and its checkpoints hold both: training goes on from the weights of the last step, drawing takes the averages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch import Tensor

from megatron_vilg.checkpoint.manifest import FILE_NAME, Manifest
from megatron_vilg.checkpoint.tensors import MODEL, TensorSource, part_of

AVERAGES = {"average": "", "reconstructor_average": "reconstructor."}
"""First word of the names of averages, and what stands before the rest of the name in the model's own names."""
_VALUES = "values."
"""Second word of the name of an average; its count of steps has another."""


class Selected(TensorSource):
    """Some tensors of a source, under other names."""

    def __init__(self, source: TensorSource, names: Mapping[str, str], manifest: Manifest | None) -> None:
        super().__init__(source.path)
        self.source, self.names, self.manifest = source, names, manifest
        self.format, self.is_verified = source.format, source.is_verified
        self.tensors = {new: source.tensors[old] for new, old in names.items()}
        if manifest and not self.is_verified and source.manifest is not None and (source.path / FILE_NAME).is_file():
            self.manifest = dataclasses.replace(manifest, files=source.manifest.files)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See :meth:`TensorSource.rows`."""
        return self.source.rows(self.names[name], start, stop)

    def verify(self) -> list[str]:
        """See :meth:`TensorSource.verify`."""
        return self.source.verify()


def averages_in(names: Iterable[str]) -> dict[str, str]:
    """Full name of each weight that has an average, and the full name of that."""
    found = {}
    for name in names:
        part, _, rest = name.partition(".")
        if part in AVERAGES and rest.startswith(_VALUES):
            found[f"{MODEL}.{AVERAGES[part]}{rest.removeprefix(_VALUES)}"] = name
    return found


def as_exported(source: TensorSource) -> TensorSource:
    """What the run would export: averaged weights as the weights, where it averages any; else the source itself.

    Other parts stay, but for the averages. Whoever opened ``source`` closes it.
    """
    averages = averages_in(source.tensors)
    if not averages:
        return source
    names = {name: averages.get(name, name) for name in source.tensors if part_of(name) not in AVERAGES}
    return Selected(source, names, source.manifest)
