"""SEED-X's recorded sequences, from files through the whole stream: ids, labels, marks, positions
of views.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.stream import mixture
from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.data.stream.views import INPUT_IMAGE, TARGET_IMAGE
from seed_multimodal.language.tokenizer import MultimodalTokenizer

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "data" / "seedx_sequences"
CASES = [json.loads(line) for line in (GOLDEN / "cases.jsonl").read_text().splitlines()]
GRIDS = {1: ["1x1"], 2: ["1x1"], 3: ["2x1"]}  # by the number of views
OF_FUNCTION = {
    "decode_llava_data": "seed_x.conversation",
    "decode_single_turn_edit_data": "seed_x.edit",
    "decode_image_text_pair": "seed_x.caption",
    "tokenize_text": "seed_x.caption",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> MultimodalTokenizer:
    folder = tmp_path_factory.mktemp("words") / "tokenizer"
    shutil.copytree(GOLDEN / "tokenizer", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    image_tokens = json.loads((GOLDEN / "constants.json").read_text())["image_tokens"]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "tokens_per_image": image_tokens})
    )
    return MultimodalTokenizer.from_pretrained(folder)


class Replay:
    """Replays the recorded random values."""

    def __init__(self, calls: Sequence[Any]) -> None:
        self.calls = list(calls)

    def uniform(self) -> float:
        return self.calls.pop(0)[2]

    def choice(self, items: Sequence[Any]) -> Any:
        return self.calls.pop(0)[2]

    def randint(self, low: int, high: int) -> int:
        return self.calls.pop(0)[2]


def is_row(case: dict[str, Any]) -> bool:
    """Cases of a whole record with a row as output, without those that this library rejects or
    drops.
    """
    if case["label"] in (
        "null instruction",
        "file name containing null",
        "too long text",
        "truncated answer",
    ):
        return False
    if case["function"] == "decode_image_text_pair" and case["label"] != "caption with prompt":
        return False
    return case["function"] in OF_FUNCTION and "input_ids" in case["output"]


def image(size: Sequence[int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", tuple(size), (200, 30, 30)).save(stream, "JPEG")
    return stream.getvalue()


def write(case: dict[str, Any], folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file with the case's record, and the decoder's options."""
    kwargs = {
        key: value
        for key, value in case["kwargs"].items()
        if key not in ("max_length", "assure_text") and value is not None
    }
    if "value" in case["arguments"]:
        fields = case["arguments"]["value"]
        sizes = case["arguments"]["image_sizes"]
        for name, size in sizes.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(image(size))
        (folder / "one.jsonl").write_text(json.dumps(fields) + "\n")
        if case["function"] == "decode_llava_data":
            kwargs.pop("min_resolution", None)
        return folder / "one.jsonl", {"multi_resolution": False, **kwargs}
    data = case["arguments"]["data"]
    text, views = (
        (data, 1) if isinstance(data, str) else (data["text"], data["images_patch_length"])
    )
    write_shard(folder / "one.tar", [("0", {"jpg": image((500, 450)), "txt": text.encode()})])
    return folder / "one.tar", {
        **kwargs,
        "multi_resolution": views > 1,
        "resolution_grids": GRIDS[views],
        "base_resolution": 8,
    }


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if is_row(case)],
    ids=lambda case: f"{case['id']}-{case['function']}-{case['label']}".replace(" ", "_"),
)
def test_next_equals_the_recorded_row(
    case,
    tokenizer: MultimodalTokenizer,
    tmp_path,
    monkeypatch,
):
    file, options = write(case, tmp_path)
    # The record is read at the start, too.
    rngs = list[Replay]()
    expected = case["output"]
    monkeypatch.setattr(
        mixture, "SeededRandom", lambda *key: rngs.append(Replay(case["rng_calls"])) or rngs[-1]
    )
    length = case["kwargs"]["max_length"]
    settings = read_data_settings(
        {
            "sources": [
                {
                    "name": "one",
                    "files": str(file),
                    "decoder": OF_FUNCTION[case["function"]],
                    "image_dir": str(tmp_path),
                    "batch_size": 1,
                    "max_length": length,
                    "cycles": 1,
                    "options": options,
                }
            ],
            "packing": False,
        }
    )
    with LlmBatches(settings, tokenizer) as batches:
        batch = next(batches)
    assert not rngs[-1].calls and batch.attention_mask is not None
    for name in ("input_ids", "labels", "attention_mask"):
        assert getattr(batch, name)[0].tolist() == expected[name], name
    listed = [
        expected[name] if isinstance(expected[name], list) else [expected[name]]
        for name in ("embeds_cmp_mask", "embeds_gen_mask")
        if expected.get(name) is not None
    ]
    if not listed:
        assert batch.views is None and not expected["ids_cmp_mask"]
        return
    views = batch.views
    assert views is not None
    read, is_target = listed
    assert views.is_target.tolist() == [
        target for is_shown, target in zip(read, is_target, strict=True) if is_shown or target
    ]
    for value, name in ((INPUT_IMAGE, "ids_cmp_mask"), (TARGET_IMAGE, "ids_gen_mask")):
        assert np.flatnonzero(views.marks[0].numpy() == value).tolist() == expected[name], name
    if expected.get("patch_position") is not None:
        used = [
            position
            for position, is_shown, target in zip(
                expected["patch_position"], read, is_target, strict=True
            )
            if is_shown or target
        ]
        assert np.allclose(views.positions.numpy(), used, atol=1e-6)
