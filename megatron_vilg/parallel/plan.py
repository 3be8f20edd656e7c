"""THE table of tensor parallelism: how each parameter is cut. The wrapper, the planner and offline tools all read it.

Between blocks every rank of ``tp`` holds T / tp positions of each row (sequence parallelism); inside attention and
feed-forward it holds all positions of its share of heads or hidden features. The embedding computes all positions of
its share of the width, so that no table needs a rule about ids, and one exchange turns width into positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from megatron_vilg.errors import ConfigError


class Cut(Enum):
    """How a parameter is divided among the ranks of ``tp``; the value is the dimension that is cut."""

    VOCABULARY = (0, "rows of an output head: each rank has its share of the tokens")
    TABLE = (1, "columns of an embedding table: each rank has its share of the width, for all ids")
    COLUMN = (0, "output features of a matrix, and its bias")
    ROW = (1, "input features of a matrix; the products are summed over ranks")
    AFTER_SUM = (None, "bias behind such a sum; added once, seen by each rank at other positions")
    SEQUENCE = (None, "whole; each rank applies it to other positions, so its gradient is summed")
    HEADS = (None, "whole; each rank applies it to other heads, so its gradient is summed")
    COPY = (None, "whole; all ranks do the same with it, so its gradient is not summed")

    @property
    def dim(self) -> int | None:
        """The dimension that is cut, None if each rank holds the whole."""
        return self.value[0]


@dataclass(frozen=True, slots=True)
class Rule:
    """Parameters whose name matches ``pattern`` are cut like this."""

    pattern: str
    """``*`` stands for any text."""
    cut: Cut
    is_optional: bool = False
    """Whether some configurations have no such parameter."""


RULES: tuple[Rule, ...] = (
    Rule("embed.code_projection.weight", Cut.COLUMN, is_optional=True),
    Rule("embed.text.weight", Cut.TABLE),
    Rule("embed.image.weight", Cut.TABLE),
    Rule("embed.boundary.weight", Cut.TABLE),
    Rule("embed.position.weight", Cut.TABLE),
    Rule("embed.row.weight", Cut.TABLE),
    Rule("embed.column.weight", Cut.TABLE),
    Rule("embed.segment.weight", Cut.TABLE, is_optional=True),
    Rule("blocks.*.norm1.*", Cut.SEQUENCE),
    Rule("blocks.*.attention.[qkv].*", Cut.COLUMN),
    Rule("blocks.*.attention.[qk]_norm.weight", Cut.HEADS, is_optional=True),
    Rule("blocks.*.attention.out.weight", Cut.ROW),
    Rule("blocks.*.attention.out.bias", Cut.AFTER_SUM),
    Rule("blocks.*.post_norm1.*", Cut.SEQUENCE, is_optional=True),
    Rule("blocks.*.norm2.*", Cut.SEQUENCE),
    Rule("blocks.*.mlp.up.*", Cut.COLUMN),
    Rule("blocks.*.mlp.down.weight", Cut.ROW),
    Rule("blocks.*.mlp.down.bias", Cut.AFTER_SUM),
    Rule("blocks.*.post_norm2.*", Cut.SEQUENCE, is_optional=True),
    Rule("norm.*", Cut.COPY),
    Rule("heads.text.weight", Cut.VOCABULARY),
    Rule("heads.image.weight", Cut.VOCABULARY),
    # Attached to the last stage after cutting: whole on each of its ranks, gradients averaged over data ranks.
    Rule("reconstructor.*", Cut.COPY, is_optional=True),
)
"""One rule for each parameter of ``models.vilg.ViLG``."""


class PlanError(ConfigError):
    """The table does not fit the model, or the model does not divide."""


def rule_of(name: str, rules: Sequence[Rule] = RULES) -> Rule:
    """The one rule for a parameter.

    Raises:
        PlanError: there is none, or more than one.
    """
    matching = [rule for rule in rules if fnmatchcase(name, rule.pattern)]
    if len(matching) != 1:
        found = ", ".join(rule.pattern for rule in matching) or "none"
        raise PlanError([f"{name}: needs exactly one rule in parallel/plan.py, matching: {found}"])
    return matching[0]


def shard_dim(name: str) -> int | None:
    """The dimension along which a parameter is cut over ``tp``; None if each rank holds it whole.

    Raises:
        PlanError: no such parameter.
    """
    return rule_of(name).cut.dim


def check_plan(shapes: Mapping[str, Sequence[int]], tensor: int, rules: Sequence[Rule] = RULES) -> None:
    """Check the table against the whole model: names and shapes of all parameters, before any is cut.

    Raises:
        PlanError: all problems together: a parameter without a rule or with two, a rule for nothing, a size that does
            not divide, a bias or norm between cut features whose gradient would not be summed over heads.
    """
    problems: list[str] = []
    cuts: dict[str, Cut] = {}
    for name in shapes:
        try:
            cuts[name] = rule_of(name, rules).cut
        except PlanError as error:
            problems += error.problems
    used = {rule for rule in rules if any(fnmatchcase(name, rule.pattern) for name in shapes)}
    problems += [
        f"{rule.pattern}: this rule in parallel/plan.py matches no parameter"
        for rule in rules
        if rule not in used and not rule.is_optional
    ]
    for name, cut in cuts.items():
        if cut.dim is None:
            problems += _misplaced(name, cut, cuts)
        elif cut.dim >= len(shapes[name]) and not name.endswith(".bias"):
            problems.append(f"{name}: has shape {tuple(shapes[name])}, so {cut.name} has no dimension {cut.dim} to cut")
        elif shapes[name][cut.dim] % tensor:
            size = shapes[name][cut.dim]
            works = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0 and n <= 64)
            problems.append(f"parallel.tensor={tensor}: must divide {name} of size {size}. Works: {works}.")
    if problems:
        raise PlanError(problems)


def _misplaced(name: str, cut: Cut, cuts: Mapping[str, Cut]) -> Iterable[str]:
    """What a whole weight meets depends on where it stands, and only one of the whole cuts sums its gradient right."""
    module, parent = name.rsplit(".", 1)[0], name.rsplit(".", 2)[0]
    siblings = {cuts[other] for other in cuts if other.rsplit(".", 2)[0] == parent}
    if cuts.get(f"{module}.weight") is Cut.ROW:
        right, reason = Cut.AFTER_SUM, "is added behind the sum over ranks"
    elif Cut.TABLE in siblings:
        right, reason = Cut.TABLE, "meets a share of the width on each rank"
    elif Cut.COLUMN in siblings:
        right, reason = Cut.HEADS, "meets other heads on each rank"
    elif name.startswith("blocks."):
        right, reason = Cut.SEQUENCE, "meets other positions on each rank"
    else:
        right, reason = Cut.COPY, "meets the same data on every rank"
    if cut is not right:
        yield f"{name}: {cut.name} in parallel/plan.py, but it {reason}: gradients would be wrong. Works: {right.name}."
