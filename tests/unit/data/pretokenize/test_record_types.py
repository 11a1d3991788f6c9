"""Every kind of records, from images on disk to decoded sequences, with the nano tokenizer."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import fields_of
from PIL import Image
from random_images import noise
from repository import APPLICATION
from tiny import read_json, write_json
from yaml_tables import read_tables

from seed_multimodal.data.decoders import get_decoder
from seed_multimodal.data.decoders.base import SeededRandom
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.images.io import image_to_bytes
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


def with_codes(records: Records, codes: Codes) -> Records:
    """Records with the codes of images in place of `codes of N`."""

    def listed(match: re.Match[str]) -> str:
        return json.dumps([code for index in match[1].split() for code in codes[int(index)]])

    return json.loads(re.sub('"codes of (.+?)"', listed, json.dumps(records)))


CASES = read_tables(__file__)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_run(tokenize, tokenizer, codes, capfd, case):
    records, counts = tokenize(case["kind"], case["rows"], **case.get("settings", {}))
    assert [{"metadata": {}} | record for record in records] == [
        {"metadata": {}} | record for record in with_codes(case["records"], codes)
    ]
    left_out = case.get("counts", {})
    for key in ("bad", "lost images", "dropped: no image"):
        assert counts.get(key, 0) == left_out.get(key, 0), key
    # What is left out is named.
    log = capfd.readouterr().err
    for index in range(left_out.get("bad", 0)):
        assert f"in.json: item {index}" in log

    # The records are training data.
    sequence = get_decoder(case["decoder"], tokenizer).decode(records[-1], SeededRandom(0))
    assert not sequence.drop_reason
    assert any(label != -100 for label in sequence.labels)
    assert case["text"] in tokenizer.decode(sequence.ids)


def test_run_chat_with_views(tokenize, tokenizer, codes):
    # Images to read have several views.
    question = {"from": "human", "value": "<image> Draw another."}
    answer = {"from": "gpt", "value": "Here: <image>"}
    row = {"image": ["1.png", "2.png"], "conversations": [question, answer]}
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
