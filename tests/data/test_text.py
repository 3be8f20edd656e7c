from __future__ import annotations

import json
import logging
import resource
import signal
from pathlib import Path

import pytest

from megatron_vilg.config.schema import TextTokenizerConfig
from megatron_vilg.data.text import TextTokenizer, _training_texts, _with_borders, train_text_tokenizer
from megatron_vilg.errors import DataError
from megatron_vilg.sequence import TextToken

STYLES = ("谷歌卡通风格", "推特扁平风格", "黑色描边风格", "立体三维风格")
NAMES = ("骰子", "公鸡", "仙人掌", "四叶草", "红苹果", "疲倦的猫", "热气球", "弯月", "公交车", "大提琴")


def captions() -> list[str]:
    wordings = ("{s}的{n}", "{n}，{s}", "一张{s}的{n}图标", "{n}", "{s}", "a glossy 3D style picture of {n}")
    return [w.format(s=s, n=n) for s in STYLES for n in NAMES for w in wordings]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_text_tokenizer(captions(), TextTokenizerConfig(vocab_size=500), tmp_path_factory.mktemp("spm"))


def test_captions_come_back_exactly(tokenizer: TextTokenizer) -> None:
    for text in captions():
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *("龘靐齉", "🐓🧑‍🚀", "naïve café, no. 7!", "全角！（ＡＢＣ）", "x\u00a0y z", "<cls>", ""),
        *("\u2581", "骰子\u2581的 \u2581\u2581 公鸡\u2581", "骰子\u2585", "\x02骰子\x02"),
    ],
)
def test_what_was_never_seen_comes_back_through_bytes(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(i >= len(TextToken) for i in ids)
    assert tokenizer.decode(ids) == " ".join(text.split())
    assert tokenizer.encode_batch(["骰子", text]) == [tokenizer.encode("骰子"), ids]


def test_style_and_name_are_pieces_of_their_own(tokenizer: TextTokenizer) -> None:
    assert tokenizer.pieces("谷歌卡通风格的骰子") == ["谷歌卡通风格", "的", "骰子"]
    assert tokenizer.pieces("公鸡，立体三维风格") == ["公鸡", "，", "立体三维风格"]
    assert tokenizer.longest(["谷歌卡通风格的骰子", "公鸡"]) == 3


def test_number_measure_word_and_thing_are_pieces_of_their_own(tmp_path: Path) -> None:
    things = ("只公鸡", "辆公交车", "颗草莓", "棵仙人掌")
    scenes = [f"{number}{thing}，红色背景" for number in "一两三四五六" for thing in things]
    scenes += [f"一{a}在一{b}的左边" for a in things for b in things if a != b]
    tokenizer = train_text_tokenizer(scenes, TextTokenizerConfig(vocab_size=2000), tmp_path)
    pieces = tokenizer.pieces("六辆公交车，红色背景")
    assert pieces[:2] == ["六", "辆"] and "，" in pieces and "".join(pieces[2 : pieces.index("，")]) == "公交车"
    pieces = tokenizer.pieces("一只公鸡在一颗草莓的左边")
    assert [piece for piece in pieces if piece in "一只在颗的"] == ["一", "只", "在", "一", "颗", "的"]


@pytest.mark.parametrize("caption", ["犬" * 5000, "很长的说明，" * 900 + "犬", "🐓" * 3000 + "犬", "犬\u2585"])
def test_no_caption_is_left_out_of_training(tmp_path: Path, caption: str) -> None:
    config = TextTokenizerConfig(vocab_size=500, character_coverage=1.0)
    tokenizer = train_text_tokenizer([*captions(), caption], config, tmp_path)
    assert tokenizer.pieces("犬") == ["犬"]
    assert len(tokenizer.pieces("龘")) == 3  # what was not there goes through bytes


def test_captions_of_ordinary_length_are_shown_whole() -> None:
    texts = [*captions(), "猫" * (4192 // 3)]
    assert list(_training_texts(texts)) == [_with_borders(text) for text in texts]
    assert "".join(_training_texts(["🐓" * 1049])) == "🐓" * 1049
    assert max(len(text.encode()) for text in _training_texts(["🐓" * 1049, "的" * 3000])) <= 4192


def test_reserved_ids_are_skipped_by_decode(tokenizer: TextTokenizer) -> None:
    ids = [TextToken.BOS, *tokenizer.encode("骰子"), TextToken.EOS, TextToken.PAD, TextToken.SEP]
    assert tokenizer.decode(ids) == "骰子"


def test_batch_equals_one_by_one(tokenizer: TextTokenizer) -> None:
    texts = captions()[:20]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_training_is_deterministic_and_the_manifest_tells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = TextTokenizerConfig(vocab_size=4000)
    with caplog.at_level(logging.INFO, logger="megatron_vilg"):
        first = train_text_tokenizer(captions(), config, tmp_path / "a")
    second = train_text_tokenizer(captions(), config, tmp_path / "b")
    assert (tmp_path / "a" / "spm.model").read_bytes() == (tmp_path / "b" / "spm.model").read_bytes()
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["sha256"] == first.sha256 == second.sha256
    assert manifest["vocab_size"] == first.vocab_size < 4000
    assert manifest["num_captions"] == len(set(captions()))
    assert manifest["reserved"] == ["pad", "unk", "bos", "eos", "cls", "sep"]
    assert f"{first.vocab_size} pieces instead of text_tokenizer.vocab_size = 4000" in caplog.text
    assert not list(tmp_path.rglob("*.partial"))


def test_too_small_a_vocabulary_names_what_works(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocab_size = 270: .* Use at least text_tokenizer.vocab_size=(\d+)") as info:
        train_text_tokenizer(captions(), TextTokenizerConfig(vocab_size=270), tmp_path)
    needed = int(str(info.value).split("vocab_size=")[1].split(",")[0])
    assert train_text_tokenizer(captions(), TextTokenizerConfig(vocab_size=needed), tmp_path).vocab_size == needed


def test_a_vocabulary_beyond_sixteen_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocab_size = 70000: .*at most 65536"):
        train_text_tokenizer(["一"], TextTokenizerConfig(vocab_size=70_000), tmp_path)


def test_no_captions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no caption to train on"):
        train_text_tokenizer(["  "], TextTokenizerConfig(), tmp_path)


def test_one_caption_is_enough(tmp_path: Path) -> None:
    assert train_text_tokenizer(["一只猫"], TextTokenizerConfig(), tmp_path).encode("一只猫")


def test_missing_and_replaced_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text tokenizer at"):
        TextTokenizer.load(tmp_path)
    train_text_tokenizer(["一只猫"], TextTokenizerConfig(), tmp_path)
    train_text_tokenizer(["两只狗在草地上"], TextTokenizerConfig(), tmp_path / "other")
    (tmp_path / "other" / "spm.model").replace(tmp_path / "spm.model")
    with pytest.raises(DataError, match=r"has SHA-256 .* says .*replaced"):
        TextTokenizer.load(tmp_path)


def test_a_disk_that_fills_up_leaves_the_folder_empty(tmp_path: Path) -> None:
    out = tmp_path / "tokenizer"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN, "Python has an OSError in its place"
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            train_text_tokenizer(["红色的苹果", "蓝色的鸟"], TextTokenizerConfig(vocab_size=300), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(out.iterdir()), "what is left would make the same command refuse its folder"
    assert train_text_tokenizer(["红色的苹果", "蓝色的鸟"], TextTokenizerConfig(vocab_size=300), out)
