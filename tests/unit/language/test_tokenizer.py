"""`MultimodalTokenizer`: round trips, white space, typed control tokens, damaged folders (ids:
golden fixtures)."""

import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from seed_multimodal import MultimodalTokenizer
from seed_multimodal.errors import CheckpointError, CodesError

CODES = [3, 0, 23, 7, 7]


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(text="</s><img><img_00001></img><unk><s>")
@example(text="<img_00024><img_0001><img_00001<IMG><img_０００１２>")
@example(text="x" * 500)
def test_decode_of_encode_parts_is_the_text(tokenizer, text):
    # SentencePiece has no token for NUL.
    text = text.replace("\0", "")
    ids = tokenizer.encode_parts([text], strip=False)
    assert tokenizer.decode(ids) == text
    # Whatever a user types is text: no end, no image, no unknown token.
    assert all(3 <= id < tokenizer.vocabulary.n_text for id in ids)


def test_encode_drops_white_space_next_to_images(tokenizer):
    image = tokenizer.vocabulary.image_ids(CODES)
    encode = tokenizer.encode
    expected = encode("USER:") + image + encode("hello")
    assert encode(f"USER: \n{''.join(tokenizer.tokens(image))} \t hello") == expected
    assert tokenizer.encode_parts(["USER: \n", CODES, " \t hello"]) == expected
    kept = tokenizer.encode_parts(["USER: ", CODES, "hello"], strip=False)
    assert kept == encode("USER: ") + image + encode("hello")
    assert tokenizer.encode_parts([CODES, "  ", CODES, ""]) == image + image
    assert tokenizer.encode_parts(["a ", " b"]) == encode("a ") + encode(" b")


def test_encode_and_decode_of_wrong_codes_and_ids(tokenizer):
    for codes in ([1, 2], [0, 0, 0, 0, 24], [0] * 6):
        with pytest.raises(CodesError):
            tokenizer.encode_parts(["x", codes])
    for id in (-1, tokenizer.vocabulary.size):
        with pytest.raises(CodesError, match=f"id {id} "):
            tokenizer.decode([5, id])


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.model", b"junk"),
        ("added_tokens.json", b"{"),
        ("added_tokens.json", b'{"<img_00000>": 331}'),
    ],
)
def test_from_pretrained_names_a_damaged_file(tokenizer_folder, tmp_path, name, content):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "damaged")
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        MultimodalTokenizer.from_pretrained(folder)
    # A folder without any of the files, such as a system's, is told where a tokenizer is.
    with pytest.raises(CheckpointError, match="shipped are pretrained/nano/seed_tokenizer"):
        MultimodalTokenizer.from_pretrained(tmp_path)
