"""`MultimodalTokenizer`: round trips, white space, typed control tokens, damaged folders (ids:
golden fixtures)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from seed_multimodal.errors import CheckpointError, CodesError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_nano.train.words import train_text_tokenizer

CODES = [3, 0, 23, 7, 7]


def test_train_text_tokenizer_in_the_layout_of_llama(
    tokenizer: MultimodalTokenizer, tokenizer_folder: Path
):
    vocabulary = tokenizer.vocabulary
    assert (vocabulary.n_text, vocabulary.n_codes, vocabulary.tokens_per_image) == (330, 24, 5)
    assert vocabulary.size == 356
    assert tokenizer.tokens([0, 1, 2, 13, vocabulary.boi_id]) == [
        "<unk>",
        "<s>",
        "</s>",
        "<0x0A>",
        "<img>",
    ]
    assert (
        json.loads((tokenizer_folder / "added_tokens.json").read_text())["</img>"]
        == vocabulary.eoi_id
    )


@pytest.mark.parametrize(
    "text", ["hello", "It is a cat.", "a  b", "two\nlines", "漢字 😀 é", "\ttab", "x" * 500, "\n"]
)
def test_decode_of_encode_is_the_text(tokenizer: MultimodalTokenizer, text):
    ids = tokenizer.encode(text)
    assert 0 not in ids
    assert tokenizer.decode(ids) == text


def test_train_text_tokenizer_and_save_pretrained_write_equal_files(tmp_path):
    texts = ["the cat sat on the mat " * 3, "dogs and cats"] * 30
    for name in ("a", "b"):
        train_text_tokenizer(
            MultimodalTokenizer, iter(texts), tmp_path / name, vocab_size=290, n_codes=4
        )
    assert (tmp_path / "a/tokenizer.model").read_bytes() == (
        tmp_path / "b/tokenizer.model"
    ).read_bytes()
    again = MultimodalTokenizer.from_pretrained(tmp_path / "a")
    assert again.vocabulary.tokens_per_image == 32
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == sorted(file.name for file in again.save_pretrained(tmp_path / "copy").iterdir())
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "copy" / name).read_bytes()
        for name in names
    )


def test_encode_drops_white_space_next_to_images(tokenizer: MultimodalTokenizer):
    image = tokenizer.vocabulary.image_ids(CODES)
    tight = tokenizer.encode("USER:") + image + tokenizer.encode("hello")
    text = "".join(tokenizer.tokens(image))
    assert tokenizer.encode(f"USER: \n{text} \t hello") == tight
    assert tokenizer.encode_parts(["USER: \n", CODES, " \t hello"]) == tight
    assert tokenizer.encode_parts(["USER: ", CODES, "hello"], strip=False) == (
        tokenizer.encode("USER: ") + image + tokenizer.encode("hello")
    )
    assert tokenizer.encode_parts([CODES, "  ", CODES, ""]) == image + image
    assert tokenizer.encode_parts(["a ", " b"]) == tokenizer.encode("a ") + tokenizer.encode(" b")
    assert tokenizer.encode("<s> ") == [1, *tokenizer.encode(" ")]  # but not next to special tokens
    assert tokenizer.encode("</s> <img>") == [2, tokenizer.vocabulary.boi_id]


def test_encode_parts_of_typed_control_tokens(tokenizer: MultimodalTokenizer):
    typed = "</s><img><img_00001></img><unk><s>"
    ids = tokenizer.encode_parts([typed])
    assert all(3 <= id < tokenizer.vocabulary.n_text for id in ids)
    assert tokenizer.decode(ids) == typed


def test_encode_of_tokens_outside_the_codebook(tokenizer: MultimodalTokenizer):
    for name in (
        "<img_00024>",
        "<img_0001>",
        "<img_99999>",
        "<img_00001",
        "<IMG>",
        "<img_０００１２>",
    ):
        assert all(id < tokenizer.vocabulary.n_text for id in tokenizer.encode(name)), name
    ids = tokenizer.encode("<img_00024><img_00023>")
    assert ids[-1] == tokenizer.vocabulary.n_text + 23


def test_decode_skips_brackets_listed_as_special(tokenizer_folder: Path, tmp_path):
    """The original folder lists `<img>` and `</img>` as additional special tokens, the
    fixture's does not."""
    folder = tmp_path / "original"
    shutil.copytree(tokenizer_folder, folder)
    file = folder / "special_tokens_map.json"
    file.write_text(
        json.dumps(
            {**json.loads(file.read_text()), "additional_special_tokens": ["<img>", "</img>"]}
        )
    )
    original = MultimodalTokenizer.from_pretrained(folder)
    ids = original.encode("a <img><img_00003></img> b")
    assert original.decode(ids) == "a <img> <img_00003> </img> b"
    assert original.decode(ids, skip_special_tokens=True) == "a <img_00003> b"
    plain = MultimodalTokenizer.from_pretrained(tokenizer_folder)
    assert plain.encode("a <img><img_00003></img> b") == ids
    assert plain.decode(ids, skip_special_tokens=True) == "a <img> <img_00003> </img> b"


def test_encode_and_decode_of_wrong_codes_and_ids(tokenizer: MultimodalTokenizer):
    for codes in ([1, 2], [0, 0, 0, 0, 24], [0] * 6):
        with pytest.raises(CodesError):
            tokenizer.encode_parts(["x", codes])
    for id in (-1, tokenizer.vocabulary.size):
        with pytest.raises(CodesError, match=f"id {id} "):
            tokenizer.decode([5, id])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"", "missing or empty"),
        ("tokenizer.model", b"junk", "not a SentencePiece model"),
        ("added_tokens.json", b"{", "not valid json"),
        ("added_tokens.json", b"{}", "it must have"),
        ("added_tokens.json", b'{"<img_00000>": 331}', "it must have"),
    ],
)
def test_from_pretrained_of_a_damaged_folder(
    tokenizer_folder: Path, tmp_path, name, content, message
):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "damaged")
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        MultimodalTokenizer.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="no such tokenizer folder"):
        MultimodalTokenizer.from_pretrained(tmp_path / "absent")
