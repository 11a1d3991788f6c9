"""Every kind of records, from images on disk to decoded sequences, with the nano tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from data_files import fields_of
from PIL import Image
from random_images import noise
from repository import APPLICATION
from tiny import read_json, write_json

from seed_multimodal.data.decoders import get_decoder
from seed_multimodal.data.decoders.base import SeededRandom
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.images.io import image_to_bytes
from seed_multimodal.language.prompts import DESCRIBE_PROMPT, QA_SUFFIX
from seed_multimodal.pretokenize.run import RunSettings, run

CONFIGS = APPLICATION / "configs"
Records = list[dict[str, Any]]
Codes = list[list[int]]


@pytest.fixture(scope="module")
def encode():
    """Codes of an image by the nano system."""
    from seed_multimodal.pipelines.images import open_images

    codec = open_images("nano", device="cpu")
    return lambda image: codec.encode([image])[0].tolist()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Folder of five images 0.png … 4.png."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(5):
        noise(index, (90, 70)).resize((9, 7)).resize((90, 70)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def codes(images, encode) -> Codes:
    """Codes of the images."""
    return [encode(images / f"{index}.png") for index in range(5)]


@pytest.fixture
def tokenize(tmp_path, images):
    """`tokenize(kind, rows, data, **settings)`: the pre-tokenised records, and their counts."""

    def run_it(
        kind: str, rows: Records, data: dict | None = None, **settings
    ) -> tuple[Records, dict[str, int]]:
        path = tmp_path / "in.json"
        write_json(path, rows)
        data = {"files": str(path), "image_root": str(images), **(data or {})}
        options = {
            "tokenizer": str(CONFIGS / "tokenizer" / "nano.yaml"),
            "image_transform": str(CONFIGS / "processer" / "nano_transform.yaml"),
            "workers": 0,
            "save_dir": str(tmp_path / "out"),
            "device": "cpu",
        }
        assert run(RunSettings(kind=kind, data=data, **options | settings)) == 0
        counts = read_json(tmp_path / "out" / "counts.json")
        return fields_of(open_records(tmp_path / "out")), counts

    return run_it


class Case(NamedTuple):
    """`expected`: records by the codes of images 0 … 4; `decoded`: a decoder, and a text that its
    sequence of the last record has.
    """

    kind: str
    rows: Records
    expected: Callable[[Codes], Records]
    decoded: tuple[str, str]
    settings: dict = {}
    counts: dict[str, int] = {}


TURN_1 = {"from": "human", "value": "<image> Draw another."}
TURN_2 = {"from": "gpt", "value": "Here: <image>"}
MMC4 = {
    "text_list": ["one", "two", "three"],
    "image_info": [
        {"image_name": "0.png", "matched_text_index": 1},
        {"image_name": "1.png", "matched_text_index": 0},
        {"image_name": "gone.png", "matched_text_index": 2},
    ],
}
CASES = {
    # JourneyDB's captions, as in the original.
    "qa": Case(
        "qa",
        [
            {"image": "0.png", "question": "how many?", "answer": "3"},
            {"image": "2.png", "caption": "a fox"},
        ],
        lambda c: [{"image_ids": c[2], "question": DESCRIBE_PROMPT, "answer": "a fox"}],
        ("sft.qa", "a fox"),
        counts={"bad": 1},
    ),
    "qa, own fields": Case(
        "qa",
        [
            {"file": "3.png", "question": "What?", "answers": answer}
            for answer in (float("nan"), ["cat", "dog", "dog"], 2)  # NaN: an empty cell
        ],
        lambda c: [
            {"image_ids": c[3], "question": f"What?{QA_SUFFIX}", "answer": answer}
            for answer in ("dog", "2")
        ],
        ("sft.qa", "ASSISTANT: 2."),
        {"fields": {"image": "file", "answer": "answers", "suffix": QA_SUFFIX}},
        {"bad": 1},
    ),
    "edit": Case(
        "edit",
        [
            {
                "source_image": "1.png",
                "target_image": "2.png",
                "instruction_gpt": "Redden it.",
                "response": "Done.",
            },
        ],
        lambda c: [
            {
                "source_image_ids": c[1],
                "target_image_ids": c[2],
                "instruction_gpt": "Redden it.",
                "response": "Done.",
            },
        ],
        ("sft.edit", "Done. <img>"),
    ),
    "story": Case(
        "story",
        [
            {"images": ["0.png"], "captions": ["alone"]},
            {"images": [f"{n}.png" for n in range(5)], "captions": [f"then {n}" for n in range(5)]},
        ],
        lambda c: [{"image_ids": sum(c, []), **{f"caption{n}": f"then {n}" for n in range(5)}}],
        ("sft.story", "Here is an image."),
        counts={"bad": 1},
    ),
    "interleaved": Case(
        "interleaved",
        [
            {"images": ["gone.png"], "texts": [None]},
            {"images": [None], "texts": ["text only"]},
            {
                "images": ["0.png", None, None, "gone.png"],
                "texts": [None, "one", "two", None],
                "metadata": {"url": "u"},
            },
        ],
        lambda c: [
            {
                "image_ids": [c[0], None, None],
                "texts": [None, "one", "two"],
                "metadata": {"url": "u"},
            }
        ],
        ("pretrain.interleaved", "onetwo"),
        counts={"bad": 1, "lost images": 1, "dropped: no image": 1},
    ),
    # As published: images stand before the sentences that they match.
    "interleaved, MMC4": Case(
        "interleaved",
        [
            {**MMC4, "image_info": [{"image_name": "0.png", "matched_text_index": 9}]},
            {**MMC4, "text_list": "one"},
            MMC4,
        ],
        lambda c: [
            {
                "image_ids": [c[1], None, c[0], None, None],
                "texts": [None, "one", None, "two", "three"],
                "metadata": {},
            }
        ],
        ("pretrain.interleaved", "three"),
        counts={"bad": 2, "lost images": 1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_run(tokenize, tokenizer, codes, capfd, name):
    case = CASES[name]
    records, counts = tokenize(case.kind, case.rows, **case.settings)
    expected = case.expected(codes)
    assert [{"metadata": {}} | record for record in records] == [
        {"metadata": {}} | record for record in expected
    ]
    for key in ("bad", "lost images", "dropped: no image"):
        assert counts.get(key, 0) == case.counts.get(key, 0), key
    # What is left out is named.
    log = capfd.readouterr().err
    for index in range(case.counts.get("bad", 0)):
        assert f"in.json: item {index}" in log

    # The records are training data.
    decoder, text = case.decoded
    sequence = get_decoder(decoder, tokenizer).decode(records[-1], SeededRandom(0))
    assert not sequence.drop_reason
    assert any(label != -100 for label in sequence.labels)
    assert text in tokenizer.decode(sequence.ids)


def test_run_chat_with_views(tokenize, tokenizer, codes):
    # Images to read have several views.
    row = {"image": ["1.png", "2.png"], "conversations": [TURN_1, TURN_2]}
    records, _ = tokenize("chat", [row], views=2)
    user, answer = records[0]["messages"]
    first, second = user["content"][0]["codes"]
    assert first == codes[1] != second
    # Images to generate have one view.
    assert answer["content"] == ["Here: ", {"codes": codes[2]}]
    sequence = get_decoder("chat", tokenizer).decode(records[0], SeededRandom(0))
    assert "Draw another." in tokenizer.decode(sequence.ids)


def test_run_caption_with_views(tokenize, codes):
    # Views of one image are equal in every run; the first is the image itself.
    captions = [["a", "b"], "c"]
    rows = [{"image": "1.png", "caption": caption} for caption in captions]
    records, _ = tokenize("caption", rows, views=3)
    assert [record["text"] for record in records] == captions
    assert len(records[0]["views"]) == 3
    assert records[0]["views"][0] == records[0]["image_ids"] == codes[1]
    assert records[0]["views"] == records[1]["views"]


def test_run_video(tokenize, tokenizer, encode, tmp_path):
    # Frames over the whole clip, in its colours; broken clips are counted.
    cv2 = pytest.importorskip("cv2")
    movie = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    # Blue, green, red as OpenCV orders them.
    for colour in ((0, 0, 255), (0, 255, 0), (255, 0, 0), (255, 255, 255)):
        for _ in range(10):
            movie.write(np.full((64, 64, 3), colour, np.uint8))
    movie.release()
    (tmp_path / "torn.avi").write_bytes(b"RIFF nothing")
    rows = [
        {"video": name, "question": "What happens?", "answer": "Colours"}
        for name in ("torn.avi", "gone.avi", "v.avi")
    ]
    data = {"image_root": str(tmp_path), "num_frames": 8}
    (record,), counts = tokenize("video", rows, data)
    assert counts["bad"] == 2
    size = tokenizer.vocabulary.tokens_per_image
    frames = [record["image_ids"][start : start + size] for start in range(0, 8 * size, size)]
    assert frames[0] == encode(image_to_bytes(Image.new("RGB", (64, 64), (255, 0, 0))))
    assert len({tuple(frame) for frame in frames}) == 4
