"""Rules on captions: how many words, whether one is a noun, which characters are special."""

from __future__ import annotations

import importlib
import importlib.util
import re
import tempfile
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_vilg.errors import MissingPackageError
from megatron_vilg.log import get_logger

logger = get_logger(__name__)

TOO_LONG, NO_NOUN, SPECIAL_CHARACTERS = "too_long", "no_noun", "special_characters"

PUNCTUATION = frozenset(
    " .,;:!?'\"()-/&%+"  # ASCII
    "，。、；：！？（）《》〈〉「」『』【】“”‘’…—–－～〜·・‧％＋／＆"  # Chinese and typographic
    "°℃×$¥€£￥"  # units and currencies
)
"""What a caption may hold besides letters, numbers and combining marks."""

_ALWAYS_SPECIAL = re.compile(
    r"://|(?<![a-z0-9])www\.|\w\.(?:com|cn|net|org)(?![a-z0-9])"  # addresses
    r"|&#?[a-z0-9]+;"  # character references of HTML, left over from a page
    r"|[\ufe00-\ufe0f\U000e0100-\U000e01ef]",  # variation selectors: marks that make an emoji of a sign or a digit
    re.IGNORECASE,
)
_ALSO_NOUNS = ("vn", "an", "t", "s", "j", "eng")
_SINGLES = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
"""Scripts that set no spaces between words: Chinese characters and kana."""
_WORDS = re.compile(rf"[{_SINGLES}]|[^\W_{_SINGLES}]+(?:['’.-][^\W_{_SINGLES}]+)*")


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a caption."""

    text: str
    is_noun: bool


class Segmenter(Protocol):
    """Cuts captions into words."""

    name: str
    """With its version, for the report."""
    knows_nouns: bool

    def words(self, caption: str) -> Sequence[Word]:
        """The words; spaces and punctuation are none."""
        ...


class Characters:
    """Needs no package: every Chinese character is a word, and every run of other letters and digits."""

    name = "characters"
    knows_nouns = False

    def words(self, caption: str) -> Sequence[Word]:
        """The words, none of them known as a noun."""
        return [Word(text, False) for text in _WORDS.findall(caption)]


class Jieba:
    """Words and parts of speech by jieba.

    Nouns are the tags n.. (names included), vn and an (verbs and adjectives used as nouns), t and s (words for times
    and places) and j (short names). Words in Latin letters, of which jieba knows no part of speech, count as nouns too:
    nothing is rejected for being foreign.

    Raises:
        MissingPackageError: it is not installed.
    """

    knows_nouns = True

    def __init__(self) -> None:
        try:
            with warnings.catch_warnings():
                # Of its last release: escape sequences and pkg_resources, which newer Pythons disapprove of.
                warnings.simplefilter("ignore")
                jieba: Any = importlib.import_module("jieba")
                posseg: Any = importlib.import_module("jieba.posseg")
        except ImportError as error:
            raise MissingPackageError(
                "--require-noun=yes: telling nouns needs a package that is not installed: pip install "
                "'megatron_vilg[filter]' (or pip install jieba). Works without it: --require-noun auto or no"
            ) from error
        jieba.setLogLevel("WARNING")
        tokenizer = jieba.Tokenizer()
        # jieba would read its dictionary from a file of a fixed name in the folder that all users share.
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.tmp_dir = folder
            tokenizer.initialize()
        self._cut = posseg.POSTokenizer(tokenizer).cut
        self.name = f"jieba {jieba.__version__}"

    def words(self, caption: str) -> Sequence[Word]:
        """The words, in their order."""
        tagged = ((pair.word, pair.flag) for pair in self._cut(caption))
        return [
            Word(text, flag.startswith("n") or flag in _ALSO_NOUNS)
            for text, flag in tagged
            if any(letter.isalnum() for letter in text)
        ]


def choose_segmenter(require_noun: str) -> Segmenter:
    """Jieba where it is installed, or demanded; else characters.

    Args:
        require_noun: ``yes``, ``no`` or ``auto``.

    Raises:
        MissingPackageError: ``yes``, and it is not installed.
    """
    if require_noun != "yes" and not is_installed("jieba"):
        logger.warning(
            "jieba is not installed: %severy Chinese character counts as a word. pip install 'megatron_vilg[filter]'",
            "captions without a noun are kept, and " if require_noun == "auto" else "",
        )
        return Characters()
    return Jieba()


def is_installed(package: str) -> bool:
    """Whether it can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it was barred from being imported
        return False


@dataclass(frozen=True, slots=True)
class CaptionRules:
    """The paper's rules on captions (section 3.2.1)."""

    segmenter: Segmenter
    max_words: int = 15
    """Captions of so many words and more are too long; 0: no limit."""
    require_noun: bool = True
    reject_special: bool = True

    def reason(self, caption: str) -> str:
        """The first rule that a caption breaks; empty if it breaks none."""
        words = self.segmenter.words(caption) if self.max_words or self.require_noun else ()
        if self.max_words and len(words) >= self.max_words:
            return TOO_LONG
        if self.require_noun and not any(word.is_noun for word in words):
            return NO_NOUN
        if self.reject_special and has_special_characters(caption):
            return SPECIAL_CHARACTERS
        return ""


def has_special_characters(caption: str) -> bool:
    """Whether a caption holds anything but letters, numbers, combining marks and :data:`PUNCTUATION`.

    So are emoji and other symbols, control, format and private characters, unassigned ones, and signs of markup such as
    ``< > # @ _ * = | [ ] { }``. Addresses of the web and HTML's ``&...;`` are special although their characters are
    allowed.
    """
    return _ALWAYS_SPECIAL.search(caption) is not None or any(_is_special(letter) for letter in set(caption))


def _is_special(letter: str) -> bool:
    if letter in PUNCTUATION:
        return False
    category = unicodedata.category(letter)
    return category == "Me" or category[0] not in "LMN"  # enclosing marks make keys and signs of what they follow
