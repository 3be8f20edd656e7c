"""The plan table fits the model exactly; whatever does not is refused with a reason."""

from __future__ import annotations

import dataclasses
import re
from fnmatch import fnmatchcase

import pytest
import torch

from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel.plan import RULES, Cut, PlanError, Rule, check_plan, rule_of, shard_dim
from megatron_vilg.parallel.tensor import check_cuts
from tests.parallel.cases import case_model


def shapes(**changes: object) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in ViLG(case_model(**changes)).named_parameters()}


def changed(which: str, **values: object) -> tuple[Rule, ...]:
    rules = tuple(dataclasses.replace(r, **values) if r.pattern == which else r for r in RULES)  # type: ignore[arg-type]
    assert rules != RULES
    return rules


@pytest.mark.parametrize(
    "changes", [{}, {"sandwich_norm": True}, {"qk_norm": False, "segment_embedding": False, "codebook_dim": 0}]
)
def test_the_table_covers_every_variant_of_the_model(changes: dict[str, object]) -> None:
    names = shapes(**changes)
    for tensor in (1, 2, 4):
        check_plan(names, tensor)
    for name in names:  # nothing else in the table would do for it
        rules = [rule for rule in RULES if not fnmatchcase(name, rule.pattern)]
        with pytest.raises(PlanError, match=rf"{re.escape(name)}: needs exactly one rule"):
            check_plan({name: names[name]}, 1, rules)


def test_offline_tools_can_ask_for_the_cut_of_a_name() -> None:
    assert shard_dim("heads.text.weight") == 0 and shard_dim("embed.text.weight") == 1
    assert shard_dim("blocks.17.attention.q.weight") == 0 and shard_dim("blocks.3.attention.out.weight") == 1
    assert shard_dim("blocks.0.attention.q_norm.weight") is None and shard_dim("norm.bias") is None
    with pytest.raises(PlanError, match=r"blocks\.0\.attention\.w: needs exactly one rule.*none"):
        shard_dim("blocks.0.attention.w")


def test_a_typo_is_found_on_both_sides() -> None:
    with pytest.raises(PlanError) as caught:
        check_plan(shapes(), 2, changed("blocks.*.mlp.up.*", pattern="blocks.*.mlp.upp.*"))
    text = str(caught.value)
    assert "blocks.*.mlp.upp.*: this rule in parallel/plan.py matches no parameter" in text
    assert "blocks.0.mlp.up.weight: needs exactly one rule in parallel/plan.py, matching: none" in text


def test_a_parameter_without_a_rule_or_with_two_is_refused() -> None:
    names = shapes()
    with pytest.raises(PlanError, match=r"blocks\.0\.gate\.weight: needs exactly one rule.*none"):
        check_plan({**names, "blocks.0.gate.weight": torch.Size([4, 4])}, 2)
    with pytest.raises(PlanError, match=r"norm\.weight: needs exactly one rule.*norm\.\*, norm\.weight"):
        check_plan(names, 2, (*RULES, Rule("norm.weight", Cut.COPY)))


def test_an_uneven_cut_is_refused_with_sizes_that_work() -> None:
    message = r"parallel\.tensor=4: must divide heads\.text\.weight of size 30\. Works: 1, 2, 3, 5, 6, 10, 15, 30\."
    with pytest.raises(PlanError, match=message):
        check_plan(shapes(text_vocab_size=30), 4)


@pytest.mark.parametrize(
    ("pattern", "cut", "message"),
    [
        ("blocks.*.attention.[qk]_norm.weight", Cut.COPY, "meets other heads on each rank.*Works: HEADS"),
        ("blocks.*.attention.[qk]_norm.weight", Cut.SEQUENCE, "meets other heads on each rank.*Works: HEADS"),
        ("blocks.*.norm1.*", Cut.COPY, "meets other positions on each rank.*Works: SEQUENCE"),
        ("norm.*", Cut.SEQUENCE, "meets the same data on every rank.*Works: COPY"),
        ("embed.position.weight", Cut.COPY, "a share of the width on each rank.*Works: TABLE"),
        ("blocks.*.mlp.down.bias", Cut.SEQUENCE, "behind the sum over ranks.*Works: AFTER_SUM"),
    ],
)
def test_a_whole_weight_with_the_wrong_gradient_is_refused(pattern: str, cut: Cut, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_plan(shapes(), 2, changed(pattern, cut=cut))


def test_every_kind_of_cut_is_in_use() -> None:
    assert {rule_of(name).cut for name in shapes()} == set(Cut)


def test_what_torch_left_uncut_is_noticed() -> None:
    """torch only warns about names in a plan that match nothing."""
    with torch.device("meta"):
        model = ViLG(case_model())
    with pytest.raises(PlanError, match=r"embed\.text\.weight: is not cut at all over tp, parallel/plan\.py says"):
        check_cuts(model)
