"""All figures of a report, measured on a trained model and the data set it was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_vilg.errors import DataError
from megatron_vilg.evaluate.captions import CaptionScore, chance_score, longest_named, normalise, score_captions
from megatron_vilg.evaluate.cross_entropy import TokenFrequencies, condition_test, count_tokens
from megatron_vilg.evaluate.pairs import EvalPair, EvalSet, Kind
from megatron_vilg.evaluate.reconstruction import codebook_use, decode, encode, mean_score, score_reconstruction
from megatron_vilg.evaluate.retrieval import FEW_CONCEPTS, Gallery, Hits, Label, picture_features
from megatron_vilg.evaluate.statistics import sample_indices, wilson_interval
from megatron_vilg.evaluate.subject import EvaluationSettings, Subject
from megatron_vilg.log import get_logger
from megatron_vilg.models.features import Activations
from megatron_vilg.ops.sampling import keep_best

log = get_logger(__name__)
_MIN_PAIRS = 2
"""Fewer pairs of a kind cannot trade conditions; the kind is left out."""
_FORWARD_PAIRS = 64
"""Pairs that the model sees at a time at most where nothing is drawn."""
_BLOCK = 512
"""Pictures that are floating-point numbers at a time; a data set's are kept as bytes."""


class Measurement:
    """Measures one model; what several figures need (codes, features) is computed once."""

    def __init__(
        self, subject: Subject, pairs: EvalSet, network: Activations | None, settings: EvaluationSettings
    ) -> None:
        """Encode all pictures, and describe the labelled ones.

        Args:
            network: features that training never used; None leaves out concept and style.

        Raises:
            DataError: fewer than two pairs that training has seen.
        """
        self.subject, self.pairs, self.network, self.settings = subject, pairs, network, settings
        self.kinds = _measurable(pairs)
        self.codes = torch.cat(
            [encode(subject.image_tokenizer, pairs.pixels(part)) for part in _blocks(range(len(pairs)))]
        )
        self.chosen = {
            kind: sample_indices(pairs.of_kind(kind), settings.max_prompts, settings.seed) for kind in self.kinds
        }
        self.shown_prompts = {
            kind: sample_indices(numbers, settings.shown_prompts, settings.seed + 2)
            for kind, numbers in self.chosen.items()
        }
        """Of the chosen pairs, those whose drawings are kept to be looked at."""
        self.galleries = {} if network is None else self._galleries(network)
        self._said: dict[int, str] = {}
        self._drawn: dict[int, Tensor] = {}

    def cross_entropy(self) -> dict[Kind, dict[str, dict[str, float]]]:
        """Nats per token of both directions: right, shuffled and unigram, by kind."""
        frequencies = self._frequencies()
        found = {}
        for kind in self.kinds:
            numbers = sample_indices(
                self.pairs.of_kind(kind), self.settings.cross_entropy_pairs, self.settings.seed + 1
            )
            batch = self.subject.clean_batch(self.pairs.captions(numbers), self.codes[numbers])
            result = condition_test(
                self.subject.forward,
                batch,
                self.subject.spec,
                frequencies,
                seed=self.settings.seed,
                batch_size=min(_FORWARD_PAIRS, self.subject.max_batch or _FORWARD_PAIRS),
                replicas=self.subject.replicas,
            )
            found[kind] = {direction.name.lower(): dataclasses.asdict(test) for direction, test in result.items()}
            log.info("cross-entropy, %s: %s", kind.value, _short(found[kind]))
        return found

    def captions(self) -> dict[str, Any]:
        """Exact match and character F1 of captions by kind, and what a random caption would score.

        Captions are decoded as the run's ``sample`` says; ``greedy_exact_match`` is that of greedy decoding.
        """
        found: dict[str, Any] = {}
        for kind in self.kinds:
            numbers = self.chosen[kind]
            said, true = self._say(numbers), self.pairs.captions(numbers)
            self._said.update(zip(numbers, said, strict=True))
            greedy = score_captions(self.subject.pipeline.caption(self.codes[numbers]), true)
            found[kind.value] = _caption_entry(score_captions(said, true)) | self._names(said, numbers)
            found[kind.value]["greedy_exact_match"] = greedy.exact_match
            log.info("captions, %s: %s", kind.value, _short(found[kind.value]))
        asked = [number for kind in self.kinds if kind != Kind.NEW_CONCEPT for number in self.chosen[kind]]
        pool = self.pairs.captions(self.pairs.of_kind(Kind.TRAINED))
        chance = chance_score(self.pairs.captions(asked), pool)
        return found | {"chance": chance.exact_match, "chance_char_f1": chance.char_f1}

    def said(self, numbers: Sequence[int]) -> list[str]:
        """The captions that ``captions`` judged, of some of the chosen pairs."""
        return [self._said[number] for number in numbers]

    def _say(self, numbers: list[int]) -> list[str]:
        pipeline, candidates = self.subject.pipeline, self.subject.config.sample.caption_candidates
        if candidates:
            return pipeline.caption_of_candidates(self.codes[numbers], candidates, seed=self.settings.seed)
        return pipeline.caption(self.codes[numbers])

    def rebuilt(self, numbers: list[int]) -> Tensor:
        """Pictures of pairs, sent through the image tokenizer: float32 [len(numbers), 3, S, S] in [-1, 1]."""
        return decode(self.subject.image_tokenizer, self.codes[numbers])

    def draw(self, numbers: list[int], num_images: int, seed: int) -> tuple[Tensor, Tensor | None]:
        """Draw the pairs' captions: ``num_images`` of each, the best of several as the run's ``sample`` says.

        Returns:
            Pictures [len(numbers) * num_images, 3, S, S] in [-1, 1]; and if they were chosen as many that were not, but
            drawn first.
        """
        ids, scores = self.subject.pipeline.draw_candidates(
            self.pairs.captions(numbers), num_images=num_images, settings=self.subject.config.sample, seed=seed
        )
        chosen = self._decode(keep_best(ids, scores, num_images)[0])
        return chosen, None if scores is None else self._decode(ids[:, :num_images])

    def shown(self, kind: Kind) -> Tensor:
        """``shown_samples`` drawings of each of the ``shown_prompts``: those that ``drawings`` judged, where it did.

        Returns:
            [prompts * shown_samples, 3, S, S] in [-1, 1].
        """
        numbers, each = self.shown_prompts[kind], self.settings.shown_samples
        if all(len(self._drawn.get(number, ())) == each for number in numbers):
            return torch.cat([self._drawn[number] for number in numbers])
        return self.draw(numbers, each, self.settings.seed + 1)[0]

    def _decode(self, ids: Tensor) -> Tensor:
        return self.subject.pipeline.decode(ids.flatten(0, 1)).float().cpu()

    def judge(self, kind: Kind, pictures: Tensor, asked: list[Label]) -> Hits:
        """Whether drawn pictures [Q, 3, S, S] show the asked concepts and styles."""
        assert self.network is not None
        return self.galleries[kind].judge(picture_features(self.network, pictures), asked)

    def drawings(self) -> dict[str, dict[str, Any]] | None:
        """Figures ``retrieval``, ``style`` and ``concept_and_style``; None where concepts are not known."""
        if not self.galleries:
            return None
        found: dict[str, dict[str, Any]] = {"retrieval": {}, "style": {}, "concept_and_style": {}}
        chances, ceilings = [], []
        for kind in self.galleries:
            numbers = self.pairs.labelled(self.chosen[kind])
            asked = self.pairs.labels(numbers)
            each = self.settings.samples_per_prompt
            labels = [label for label in asked for _ in range(each)]
            chosen, first = self.draw(numbers, each, self.settings.seed)
            for number, pictures in zip(numbers, chosen.split(each), strict=True):
                if number in self.shown_prompts[kind]:
                    self._drawn[number] = pictures[: self.settings.shown_samples].clone()
            hits = self.judge(kind, chosen, labels)
            for name, right in _by_figure(hits).items():
                found[name][kind.value] = _share(right, len(numbers))
            found["retrieval"][kind.value] |= self._among_few(self.galleries[kind], hits.rivals, "r_at_1")
            if first is not None:
                for name, right in _by_figure(self.judge(kind, first, labels)).items():
                    found[name][kind.value]["not_reranked"] = right.float().mean().item()
            if kind != Kind.NEW_CONCEPT:
                chances.append((len(asked), *self.galleries[kind].chance(asked)))
                real = self.judge(kind, self.rebuilt(numbers), asked)
                ceilings.append(torch.stack([real.concept, real.style]).float())
            log.info("drawings, %s: %s", kind.value, _short({name: part[kind.value] for name, part in found.items()}))
        weight = sum(count for count, _, _ in chances)
        ceiling = torch.cat(ceilings, dim=1).mean(dim=1).tolist()
        for place, name in enumerate(("retrieval", "style")):
            found[name]["chance"] = sum(entry[0] * entry[1 + place] for entry in chances) / weight
            found[name]["ceiling"] = ceiling[place]
        found["retrieval"] |= self._other_pictures()
        return found

    def reconstruction(self) -> dict[str, Any]:
        """Errors of the image tokenizer on trained pictures, and by kind on the others."""
        scores = {}
        for kind in self.kinds:
            parts = [
                score_reconstruction(self.pairs.pixels(part), self.rebuilt(part))
                for part in _blocks(self.pairs.of_kind(kind))
            ]
            scores[kind] = dataclasses.asdict(mean_score(parts))
        trained = scores.pop(Kind.TRAINED)
        return trained | {kind.value: score for kind, score in scores.items()}

    def codebook_use(self) -> float:
        """Share of codes that the trained pictures use."""
        trained = self.codes[self.pairs.of_kind(Kind.TRAINED)]
        return codebook_use(trained, self.subject.config.image_tokenizer.codebook_size)

    def _galleries(self, network: Activations) -> dict[Kind, Gallery]:
        """Real pictures to compare with: trained and unseen pairs; new concepts are judged among all pictures."""
        labelled = self.pairs.labelled(range(len(self.pairs)))
        kinds = [kind for kind in self.kinds if len(self.pairs.labelled(self.chosen[kind])) >= _MIN_PAIRS]
        if Kind.TRAINED not in kinds:
            return {}
        parts = [picture_features(network, self.pairs.pixels(part)) for part in _blocks(labelled)]
        features = [torch.cat(blocks) for blocks in zip(*parts, strict=True)]
        known = [place for place, n in enumerate(labelled) if self.pairs.pairs[n].kind != Kind.NEW_CONCEPT]
        common = Gallery([part[known] for part in features], self.pairs.labels([labelled[place] for place in known]))
        galleries: dict[Kind, Gallery] = {kind: common for kind in kinds if kind != Kind.NEW_CONCEPT}
        if Kind.NEW_CONCEPT in kinds:
            galleries[Kind.NEW_CONCEPT] = Gallery(features, self.pairs.labels(labelled))
        return galleries

    def _other_pictures(self) -> dict[str, float]:
        """How often a real picture's nearest *other* real picture shows the same concept, in another style."""
        gallery, name = self.galleries[Kind.TRAINED], "ceiling_other_pictures"
        hits, rivals = gallery.leave_one_out()
        return {name: hits.float().mean().item()} | self._among_few(gallery, rivals, name)

    @staticmethod
    def _among_few(gallery: Gallery, rivals: Tensor, name: str) -> dict[str, float]:
        """What a figure called ``name`` would be among ``FEW_CONCEPTS`` concepts; nothing if there are not more."""
        if len(gallery.concepts) <= FEW_CONCEPTS:
            return {}
        return {f"{name}_of_{FEW_CONCEPTS}": gallery.share_among(rivals, FEW_CONCEPTS)}

    def _frequencies(self) -> TokenFrequencies:
        trained = self.pairs.of_kind(Kind.TRAINED)
        return count_tokens(
            lambda numbers: self.subject.clean_batch(self.pairs.captions(numbers), self.codes[list(numbers)]),
            trained,
            self.subject.spec,
            image_vocab_size=self.subject.config.image_tokenizer.codebook_size,
            text_vocab_size=self.subject.text_tokenizer.vocab_size,
        )

    def _names(self, said: list[str], numbers: list[int]) -> dict[str, float]:
        """How often a caption names the right concept, and the right style, whatever else it says.

        Of all names in the data set that occur in a caption the longest counts: who says 章鱼 has not named 鱼.
        """
        pairs = [self.pairs.pairs[number] for number in numbers]
        if not all(pair.concept_name and pair.style_name for pair in pairs):
            return {}
        texts = [normalise(text) for text in said]

        def share(name_of: Callable[[EvalPair], str]) -> float:
            known = {normalise(name_of(pair)) for pair in self.pairs.pairs}
            hits = [normalise(name_of(p)) in longest_named(text, known) for p, text in zip(pairs, texts, strict=True)]
            return sum(hits) / len(hits)

        return {"concept": share(lambda pair: pair.concept_name), "style": share(lambda pair: pair.style_name)}


def _measurable(pairs: EvalSet) -> list[Kind]:
    """The kinds with enough pairs; one that has some, but too few, is named."""
    counts = {kind: len(pairs.of_kind(kind)) for kind in Kind}
    if counts[Kind.TRAINED] < _MIN_PAIRS:
        raise DataError(
            f"data: pairs of one kind trade captions and pictures, and only {counts[Kind.TRAINED]} was trained on. "
            f"Works: data with at least {_MIN_PAIRS} pairs that the run was trained on"
        )
    for kind, count in counts.items():
        if 0 < count < _MIN_PAIRS:
            log.warning("%s: %d pair, fewer than %d: left out", kind.value, count, _MIN_PAIRS)
    return [kind for kind, count in counts.items() if count >= _MIN_PAIRS]


def _blocks(numbers: Sequence[int]) -> Iterator[list[int]]:
    """``numbers`` in order, ``_BLOCK`` at a time."""
    for first in range(0, len(numbers), _BLOCK):
        yield list(numbers[first : first + _BLOCK])


def _by_figure(hits: Hits) -> dict[str, Tensor]:
    return {"retrieval": hits.concept, "style": hits.style, "concept_and_style": hits.concept & hits.style}


def _share(hits: Tensor, num_prompts: int) -> dict[str, Any]:
    """A share with its interval, for which samples of one prompt count as one answer: they are much alike."""
    share = hits.float().mean().item()
    return {"share": share, "interval": wilson_interval(share, num_prompts), "prompts": num_prompts}


def _caption_entry(score: CaptionScore) -> dict[str, Any]:
    return dataclasses.asdict(score) | {"exact_match_interval": wilson_interval(score.exact_match, score.count)}


def _short(figures: dict[str, Any]) -> str:
    """Nested figures on one line, for the log."""
    parts = []
    for name, value in figures.items():
        if isinstance(value, dict):
            parts.append(f"{name} [{_short(value)}]")
        elif isinstance(value, float):
            parts.append(f"{name} {value:.3f}")
    return " ".join(parts)
