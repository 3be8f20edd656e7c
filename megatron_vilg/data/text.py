"""The text tokenizer: SentencePiece (unigram, byte fallback) over the captions.

The paper uses WordPiece; unigram with byte fallback has no unknown token and needs no word segmentation
(Kudo 2018, SentencePiece).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from megatron_vilg.config.schema import TextTokenizerConfig
from megatron_vilg.data.records import tidy_caption
from megatron_vilg.data.token_files import whole_file
from megatron_vilg.errors import DataError
from megatron_vilg.log import get_logger
from megatron_vilg.sequence import TextToken

logger = get_logger(__name__)

MODEL_FILE = "spm.model"
MANIFEST_FILE = "manifest.json"
MAX_VOCAB_SIZE = 2**16
"""Token caches keep ids in 16 bits."""
_MAX_TRAINING_CAPTIONS = 2_000_000
_BORDER = "\x02"
_SPACE_MARK = "\u2581"
"""How SentencePiece writes a space. One that a caption itself holds goes through bytes: it would become a space."""
_RESERVED_MARK = "\u2585"
"""SentencePiece leaves out of training every text that holds it."""
_MOST_TRAINING_BYTES, _TRAINING_CHARACTERS = 4192, 1000
"""SentencePiece leaves longer texts out of training without a word (``max_sentence_length``, which a model records); in
cuts of so many characters they stay below, whatever these are, and one endless text does not take hours."""
# Pieces never reach across these, so that a style, a name, a number and a background are pieces of their own, however
# often two of them stand together. Without them the tokenizer of a small set learns whole captions by heart.
_SPLIT_AT = re.compile(r"([的在，。、；：！？（）《》“”,.;:!?()\"])")
_NUMBER_AND_MEASURE = re.compile(
    r"([一二两三四五六七八九十几]+)([只头匹条个根串颗棵朵辆架艘枚栋座把本件双顶台杯块支张幅位名群])"
)


class TextTokenizer:
    """Captions to token ids and back. Ids below ``len(TextToken)`` are reserved and never come out of ``encode``."""

    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._space_mark = [int(self._processor.piece_to_id(f"<0x{byte:02X}>")) for byte in _SPACE_MARK.encode()]

    @classmethod
    def load(cls, folder: Path | str) -> TextTokenizer:
        """Read what ``train_text_tokenizer`` wrote.

        Raises:
            DataError: files are missing, or the model is not the one that the manifest names.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            model = (folder / MODEL_FILE).read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(
                f"no text tokenizer at {str(folder)!r} ({error}). "
                "Train one: vilg data text-tokenizer --data DATA --out FOLDER"
            ) from error
        actual = hashlib.sha256(model).hexdigest()
        if actual != manifest.get("sha256"):
            raise DataError(
                f"{folder / MODEL_FILE} has SHA-256 {actual}, but {folder / MANIFEST_FILE} says "
                f"{manifest.get('sha256')}: one of them was replaced. Train the tokenizer again"
            )
        return cls(model)

    @property
    def vocab_size(self) -> int:
        """Token ids, the reserved ones and the 256 byte pieces included."""
        return int(self._processor.vocab_size())

    def encode(self, text: str) -> list[int]:
        """Token ids of a caption, white space tidied, nothing added around it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` for many captions."""
        tidy = [tidy_caption(text) for text in texts]
        plain = self._processor.encode(tidy)
        return [
            self._encode_with_marks(text) if _SPACE_MARK in text else list(ids)
            for text, ids in zip(tidy, plain, strict=True)
        ]

    def _encode_with_marks(self, text: str) -> list[int]:
        first, *rest = self._processor.encode(text.split(_SPACE_MARK))
        return [*first, *(i for ids in rest for i in (*self._space_mark, *ids))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; reserved ids are left out, broken byte sequences become U+FFFD."""
        return str(self._processor.decode([int(i) for i in ids if i >= len(TextToken)]))

    def pieces(self, text: str) -> list[str]:
        """How a caption is cut, for people to read."""
        return [str(self._processor.id_to_piece(i)) for i in self.encode(text)]

    def longest(self, texts: Iterable[str]) -> int:
        """Most tokens of any of the captions: the ``model.num_text_slots`` that cuts none of them."""
        return max((len(self.encode(text)) for text in texts), default=0)


def train_text_tokenizer(captions: Iterable[str], config: TextTokenizerConfig, out: Path | str) -> TextTokenizer:
    """Train on the distinct captions and write ``spm.model`` and ``manifest.json`` into ``out``.

    Equal captions in equal order give an equal file. A vocabulary larger than the captions can fill is lowered, with
    a log line.

    Args:
        captions: all wordings that training will see; the first two million distinct ones are used.
        config: ``vocab_size`` and ``character_coverage``.
        out: folder, made if missing.

    Raises:
        DataError: no captions, or a vocabulary too small for their characters, or too large for a token cache.
    """
    if config.vocab_size > MAX_VOCAB_SIZE:
        raise DataError(
            f"text_tokenizer.vocab_size = {config.vocab_size}: token caches hold 16-bit ids, so at most "
            f"{MAX_VOCAB_SIZE} works; the paper's vocabulary has 18000"
        )
    distinct = _distinct(captions)
    if not distinct:
        raise DataError("text_tokenizer: there is no caption to train on")
    model = _train(distinct, config)
    tokenizer = TextTokenizer(model)
    if tokenizer.vocab_size < config.vocab_size:
        logger.info(
            "text tokenizer: %d pieces instead of text_tokenizer.vocab_size = %d, the %d captions hold no more",
            tokenizer.vocab_size,
            config.vocab_size,
            len(distinct),
        )
    manifest = {
        "format": 1,
        "kind": "sentencepiece-unigram",
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "settings": dataclasses.asdict(config),
        "num_captions": len(distinct),
        "reserved": [token.name.lower() for token in TextToken],
        "sentencepiece": sentencepiece.__version__,
    }
    _write(Path(out), model, json.dumps(manifest, indent=2) + "\n")
    return TextTokenizer.load(out)


def _distinct(captions: Iterable[str]) -> list[str]:
    distinct: dict[str, None] = {}
    for caption in captions:
        if text := tidy_caption(caption):
            distinct[text] = None
        if len(distinct) == _MAX_TRAINING_CAPTIONS:
            logger.info("text tokenizer: trained on the first %d distinct captions", len(distinct))
            break
    return list(distinct)


def _with_borders(text: str) -> str:
    text = _NUMBER_AND_MEASURE.sub(rf"{_BORDER}\1{_BORDER}\2{_BORDER}", text)
    return _SPLIT_AT.sub(rf"{_BORDER}\1{_BORDER}", text)


def _training_texts(captions: Iterable[str]) -> Iterator[str]:
    """What SentencePiece is shown of each caption: all of it."""
    for caption in captions:
        text = _with_borders(caption).replace(_RESERVED_MARK, _BORDER)
        if len(text.encode()) <= _MOST_TRAINING_BYTES:
            yield text
        else:
            yield from (text[i : i + _TRAINING_CHARACTERS] for i in range(0, len(text), _TRAINING_CHARACTERS))


def _train(captions: Sequence[str], config: TextTokenizerConfig) -> bytes:
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_texts(captions),
            model_writer=out,
            model_type="unigram",
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            hard_vocab_limit=False,
            # Captions must come back exactly as they were written, spaces and full-width signs included.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            pretokenization_delimiter=_BORDER,
            pad_id=TextToken.PAD,
            unk_id=TextToken.UNK,
            bos_id=TextToken.BOS,
            eos_id=TextToken.EOS,
            pad_piece="<pad>",
            control_symbols=["<cls>", "<sep>"],
            shuffle_input_sentence=False,
            num_threads=1,  # sums in a fixed order: the same file every time
            minloglevel=2,
        )
    except RuntimeError as error:
        needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if needed is None:
            raise DataError(f"text_tokenizer: SentencePiece could not be trained: {error}") from error
        raise DataError(
            f"text_tokenizer.vocab_size = {config.vocab_size}: the characters, 256 bytes and reserved tokens alone "
            f"need {needed[1]}. Use at least text_tokenizer.vocab_size={needed[1]}, or lower "
            f"text_tokenizer.character_coverage (now {config.character_coverage:g}), for example to 0.9995"
        ) from error
    return out.getvalue()


def _write(folder: Path, model: bytes, manifest: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Both or neither: a folder with something in it is refused when the command is repeated.
    with whole_file(folder / MANIFEST_FILE) as manifest_aside, whole_file(folder / MODEL_FILE) as model_aside:
        model_aside.write_bytes(model)
        manifest_aside.write_text(manifest, encoding="utf-8")
