"""DeepSpeed's own checkpoints (ZeRO 1, 2 and 3, data parallel) put together in fp32, without DeepSpeed.

Their files are pickles and are read as data. Stages 1 and 2 cut the concatenation of a parameter group into equal
parts; stage 3 cuts every parameter on its own, and a rank's parts follow each other (``utils/zero_to_fp32.py`` of
DeepSpeed 0.19 has the same two layouts).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vilg.checkpoint.files import sha256_of
from megatron_vilg.checkpoint.inert import Described, Record
from megatron_vilg.checkpoint.manifest import REMEDY, TOKENIZERS, Manifest
from megatron_vilg.checkpoint.tensors import MODEL, OPTIMIZER, TensorInfo, TensorSource, pieces
from megatron_vilg.checkpoint.torch_file import TorchFile
from megatron_vilg.config.load import RUN_FILE, read_run_folder_config
from megatron_vilg.errors import CheckpointError

LATEST = "latest"
STATES = "*_optim_states.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")
ONE_SAVE = "Works: all files of one step, as one save_checkpoint wrote them"


@dataclass(frozen=True, slots=True)
class Piece:
    """A flat tensor in some file."""

    file: TorchFile
    tensor: Described


class Stream:
    """Flat tensors behind each other, read as one."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = pieces
        self.ends = list(itertools.accumulate(piece.tensor.shape[0] for piece in pieces))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, count: int) -> list[Tensor]:
        """Numbers ``start`` to ``start + count``, in as many parts as they lie in."""
        found = []
        while count > 0:
            index = bisect.bisect_right(self.ends, start)
            if index == len(self.pieces):
                raise CheckpointError(f"{self.pieces[-1].file.path}: holds fewer numbers than its parameters need")
            piece = self.pieces[index]
            first = start - (self.ends[index] - piece.tensor.shape[0])
            taken = min(count, piece.tensor.shape[0] - first)
            found.append(piece.file.rows(piece.tensor, first, first + taken))
            start, count = start + taken, count - taken
        return found


@dataclass(frozen=True, slots=True)
class Cut:
    """A parameter in streams: whole in one (stages 1 and 2), or an equal part in each rank's (stage 3)."""

    streams: tuple[Stream, ...]
    offset: int
    share: int
    """Numbers of it in each stream."""

    def read(self, start: int, count: int) -> Tensor:
        """Numbers ``start`` to ``start + count`` of the parameter."""
        found = []
        while count > 0:
            rank, first = divmod(start, self.share)
            taken = min(count, self.share - first)
            found += self.streams[rank].read(self.offset + first, taken)
            start, count = start + taken, count - taken
        return found[0] if len(found) == 1 else torch.cat(found)


class DeepSpeedSource(TensorSource):
    """A folder that ``engine.save_checkpoint`` wrote: weights in fp32, and Adam's moments where they are.

    Args:
        path: the folder with ``latest``, or that of one step.

    Raises:
        CheckpointError: ranks are missing, files are damaged or of different steps or ranks, or it is a layout that is
            not read (tensor or pipeline parallelism of DeepSpeed, no ZeRO).
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._folder = _step_folder(path)
        self._ranks = [self._file(file) for file in _rank_files(self._folder)]
        self._states = [_mapping(file, "optimizer_state_dict") for file in self._ranks]
        self._stage = _number(self._ranks[0], self._states[0], "zero_stage")
        names = ["mp_rank_00_model_states.pt"]
        if self._stage == 3:
            names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(len(self._ranks))]
        found = [self._folder / name for name in names]
        found = [f if f.is_file() else f.with_name(f"bf16_{f.name}") for f in found]
        self._models = [self._file(file) for file in found]
        self._check_ranks()
        self.format = f"DeepSpeed checkpoint (ZeRO {self._stage}, {len(self._ranks)} ranks)"
        self._cuts: dict[str, Cut] = {}
        self._whole: dict[str, Piece] = {}
        self._steps: dict[str, float] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._find()
        tensors = {name: TensorInfo(self._shapes[name], torch.float32) for name in (*self._cuts, *self._whole)}
        tensors |= {name: TensorInfo((), torch.float32) for name in self._steps}
        self.tensors = tensors
        self.manifest = self._manifest()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See :meth:`TensorSource.rows`."""
        info = self.tensors[name]
        if name in self._steps:
            return torch.tensor([self._steps[name]])
        if name in self._whole:
            piece = self._whole[name]
            return piece.file.rows(piece.tensor, start, stop).float()
        flat = self._cuts[name].read(start * info.row_numel, (stop - start) * info.row_numel)
        return flat.float().reshape(stop - start, *info.row_shape)

    def verify(self) -> list[str]:
        """Compare every tensor that is used with the CRC-32 that torch.save wrote, and weights that are there twice."""
        used = {id(p.tensor): p for cut in self._cuts.values() for s in cut.streams for p in s.pieces}
        used |= {id(p.tensor): p for p in self._whole.values()}
        problems = []
        for piece in used.values():
            try:
                piece.file.check(piece.tensor)
            except CheckpointError as error:
                problems.append(str(error))
        return problems or self._unlike_module()

    def _unlike_module(self) -> list[str]:
        """Stages 1 and 2 hold all weights twice, in fp32 by rank and whole as the model computes with them."""
        if self._stage == 3:
            return []
        file, module = self._models[0], _mapping(self._models[0], "module")
        differing = []
        for name, info in self.tensors.items():
            whole = module.get(name.removeprefix(f"{MODEL}.")) if name in self._cuts else None
            if not isinstance(whole, Described) or whole.shape != info.shape:  # no weight, or left out when saved
                continue
            for start, stop in pieces(info):
                mine, theirs = self.rows(name, start, stop).to(whole.dtype), file.rows(whole, start, stop)
                if not bool(((mine == theirs) | (mine.isnan() & theirs.isnan())).all()):
                    differing.append(name)
                    break
        if not differing:
            return []
        return [
            f"{len(differing)} weights in {STATES} are not those of {file.path.name}, {differing[0]} first: the files "
            "are of different steps or of exchanged ranks"
        ]

    def _file(self, path: Path) -> TorchFile:
        return TorchFile(self.descriptor(path), path)

    def _check_ranks(self) -> None:
        if self._stage not in (1, 2, 3):
            raise CheckpointError(f"{self._folder}: ZeRO stage {self._stage} is not read. Works: 1, 2 and 3")
        wanted = _number(self._ranks[0], self._states[0], "partition_count")
        if wanted != len(self._ranks):
            raise CheckpointError(
                f"{self._folder}: {len(self._ranks)} files {STATES} of {wanted} ranks; the others are missing"
            )
        if _mapping(self._models[0], None).get("mp_world_size", 1) != 1:
            raise CheckpointError(f"{self._folder}: was written with model parallelism of DeepSpeed, which is not read")
        for file in (*self._ranks, *self._models):
            # torch.save keeps the name it wrote to. Other writers say "archive", and nothing can be told.
            if file.root.endswith("_states") and file.root != file.path.stem:
                raise CheckpointError(f"{file.path}: was written as {file.root}.pt, for another rank. {ONE_SAVE}")

    def _find(self) -> None:
        model = _mapping(self._models[0], None)
        try:
            groups = [{name: _shape(value) for name, value in group.items()} for group in model["param_shapes"]]
            key = "fp32_flat_groups" if self._stage == 3 else "single_partition_of_fp32_groups"
            flat = [[Piece(file, t) for t in state[key]] for file, state in zip(self._ranks, self._states, strict=True)]
            self._place(f"{MODEL}.", groups, flat)
            self._find_moments(groups)
            for name in model["buffer_names"]:
                self._put_whole(name, Piece(self._models[0], model["module"][name]))
            self._find_frozen(model)
            for alias, origin in (model.get("shared_params") or {}).items():
                self._alias(f"{MODEL}.{alias}", f"{MODEL}.{origin}")
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise CheckpointError(f"{self._folder}: is not what DeepSpeed writes ({error!r})") from error

    def _find_moments(self, groups: list[dict[str, tuple[int, ...]]]) -> None:
        key = "optimizer_state_dict" if self._stage == 3 else "base_optimizer_state"
        states = [state.get(key) for state in self._states]
        if not all(isinstance(state, dict) and state.get("state") for state in states):
            return
        by_rank = [[entries[index] for index in sorted(entries)] for entries in (_state(state) for state in states)]
        if not all(slot in entry for entries in by_rank for entry in entries for slot in MOMENTS):
            return
        for slot in MOMENTS:
            flat = [[Piece(file, e[slot]) for e in entries] for file, entries in zip(self._ranks, by_rank, strict=True)]
            self._place(f"{OPTIMIZER}.{slot}.", groups, flat)
        steps = self._steps_of(by_rank)
        if self._stage == 3 and len(set(steps)) > 1:
            raise CheckpointError(
                f"{self._folder}: parameters were updated {sorted(set(steps))} times, which is not read"
            )
        for index, group in enumerate(groups):
            for name in group:
                self._steps[f"{OPTIMIZER}.step.{name}"] = steps[0] if self._stage == 3 else steps[index]

    def _steps_of(self, by_rank: list[list[Mapping[str, Any]]]) -> list[float]:
        """How often each group was updated: as often on every rank and, in stage 3, as the model states say.

        Stages 1 and 2 need no second proof, since :meth:`verify` compares the weights themselves.
        """
        found = [
            [_scalar(file, e["step"]) for e in entries] for file, entries in zip(self._ranks, by_rank, strict=True)
        ]
        for file, steps in zip(self._ranks, found, strict=True):
            if steps != found[0]:
                raise CheckpointError(
                    f"{file.path}: was updated {steps} times, {self._ranks[0].path.name} {found[0]} times; the files "
                    f"are of different steps. {ONE_SAVE}"
                )
        for file in self._models if self._stage == 3 else ():
            counters = _mapping(file, None)
            taken = _number(file, counters, "global_steps") - _number(file, counters, "skipped_steps")
            if any(step != taken for step in found[0]):
                raise CheckpointError(
                    f"{file.path}: counts {taken} updates (global_steps without skipped_steps), the optimizer's files "
                    f"{found[0][0]:g}; they are of different steps. {ONE_SAVE}"
                )
        return found[0]

    def _place(self, prefix: str, groups: list[dict[str, tuple[int, ...]]], flat: list[list[Piece]]) -> None:
        """Say where every parameter lies; ``flat`` is by rank, then by group."""
        world = len(flat)
        if self._stage == 3:
            streams, offset = tuple(Stream(pieces) for pieces in flat), 0
            for name, shape in itertools.chain(*(group.items() for group in groups)):
                share = -(-math.prod(shape) // world)
                self._put(prefix + name, shape, Cut(streams, offset, share))
                offset += share
            _require_used(self._folder, offset, min(len(stream) for stream in streams), 0)
            return
        paddings = self._states[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
        for index, group in enumerate(groups):
            stream, offset = Stream([pieces[index] for pieces in flat]), 0
            for (name, shape), padding in zip(group.items(), paddings[index], strict=True):
                numel = math.prod(shape)
                self._put(prefix + name, shape, Cut((stream,), offset, max(1, numel)))
                offset += numel + padding
            _require_used(self._folder, offset, len(stream), 2 * world)
            self._check_slices(index, prefix, group, flat[0][index].tensor.shape[0])

    def _check_slices(self, index: int, prefix: str, group: Mapping[str, Any], size: int) -> None:
        """Each rank of stages 1 and 2 says which parameters its part of a group holds, and from where on."""
        for rank, (file, state) in enumerate(zip(self._ranks, self._states, strict=True)):
            slices = state.get("param_slice_mappings")
            if not slices:
                continue
            first = rank * size
            held = ((name, self._cuts[prefix + name]) for name in group)
            held = ((name, cut) for name, cut in held if first - cut.share < cut.offset < first + size)
            expected = {name: max(0, cut.offset - first) for name, cut in held}
            if {name: address.get("start") for name, address in slices[index].items()} != expected:
                raise CheckpointError(f"{file.path}: holds the part of another rank than its name says. {ONE_SAVE}")

    def _find_frozen(self, model: Mapping[str, Any]) -> None:
        """Parameters that were not trained: whole in stages 1 and 2, in parts in stage 3."""
        for name, shape in (model.get("frozen_param_shapes") or {}).items():
            if self._stage < 3:
                self._put_whole(name, Piece(self._models[0], model["frozen_param_fragments"][name]))
                continue
            parts = [Piece(file, _mapping(file, None)["frozen_param_fragments"][name]) for file in self._models]
            share = -(-math.prod(_shape(shape)) // len(parts))
            self._put(f"{MODEL}.{name}", _shape(shape), Cut(tuple(Stream([part]) for part in parts), 0, share))

    def _put(self, name: str, shape: tuple[int, ...], cut: Cut) -> None:
        self._cuts[name], self._shapes[name] = cut, shape

    def _put_whole(self, name: str, piece: Piece) -> None:
        self._whole[f"{MODEL}.{name}"], self._shapes[f"{MODEL}.{name}"] = piece, piece.tensor.shape

    def _alias(self, name: str, origin: str) -> None:
        self._cuts[name], self._shapes[name] = self._cuts[origin], self._shapes[origin]

    def _manifest(self) -> Manifest:
        """Progress from DeepSpeed's counters, model and tokenizers from what lies in the folder or above it."""
        model = _mapping(self._models[0], None)
        beside = (self.path, self._folder, self.path.parent)
        folder = next((f for f in beside if (f / RUN_FILE).is_file()), None)
        manifest = Manifest(
            kind="unknown",
            step=_number(self._models[0], model, "global_steps"),
            samples_seen=_number(self._models[0], model, "global_samples"),
            versions={"deepspeed": str(model.get("ds_version"))},
        )
        if folder is None:
            return manifest
        run = read_run_folder_config(folder).resolve()
        table = self._shapes.get(f"{MODEL}.embed.text.weight", (run.model.text_vocab_size,))
        run = run.resolve(text_vocab_size=table[0])
        return dataclasses.replace(
            manifest,
            kind="pretrain",
            model=dataclasses.asdict(run.model),
            stream=dataclasses.asdict(run.model.spec),
            tokenizers={
                name: sha256_of(found[0])
                for name, file in TOKENIZERS.items()
                if (found := [path for f in beside if (path := f / name / file).is_file()])
            },
            text_vocab_size=run.model.text_vocab_size,
            image_vocab_size=run.model.image_vocab_size,
        )


def is_deepspeed(path: Path) -> bool:
    """Whether DeepSpeed wrote the folder."""
    return any(path.glob(STATES)) or ((path / LATEST).is_file() and any(path.glob(f"*/{STATES}")))


def _step_folder(path: Path) -> Path:
    if any(path.glob(STATES)):
        return path
    try:
        tag = (path / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path / LATEST}: cannot be read ({error}). {REMEDY}") from error
    folder = path / tag
    if not tag or folder.parent != path or not any(folder.glob(STATES)):
        raise CheckpointError(f"{path / LATEST}: names {tag!r}, and there is no such checkpoint of DeepSpeed")
    return folder


def _rank_files(folder: Path) -> list[Path]:
    """States of the optimizer in the order of ranks."""
    found = {_rank_of(file): file for file in folder.glob(STATES)}
    return [found[rank] for rank in sorted(found)]


def _rank_of(file: Path) -> int:
    words = file.name.split("_")
    try:
        return int(words[words.index("pp") + 2]) if words[words.index("mp") + 2] == "00" else -1
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{file}: is not named as DeepSpeed names the states of a data-parallel rank") from error


def _mapping(file: TorchFile, key: str | None) -> Mapping[str, Any]:
    content = file.content if key is None else file.content.get(key) if isinstance(file.content, dict) else None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.path}: is not what DeepSpeed writes")
    return content


def _state(optimizer: Any) -> Mapping[int, Mapping[str, Any]]:
    """Moments by number of the group, as torch's optimizers save them."""
    found: Mapping[int, Mapping[str, Any]] = optimizer["state"]
    return found


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in value)


def _number(file: TorchFile, values: Mapping[str, Any], key: str) -> int:
    """A number, the value of an enumeration, or the largest of a list; 0 where there is none."""
    value = values.get(key)
    try:
        if isinstance(value, list):
            return max(int(count) for count in value)
        return int(value.arguments[0] if isinstance(value, Record) and value.arguments else value or 0)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file.path}: is not what DeepSpeed writes ({key} is {value!r:.80})") from error


def _scalar(file: TorchFile, value: Any) -> float:
    return float(file.rows(value, 0, 1)[0]) if isinstance(value, Described) else float(value)


def _require_used(folder: Path, used: int, there: int, slack: int) -> None:
    """All numbers must belong to some parameter, but for the padding behind the last."""
    if not used <= there < used + max(1, slack):
        raise CheckpointError(
            f"{folder}: parameters take {used} numbers, the files hold {there}; they do not belong together"
        )
