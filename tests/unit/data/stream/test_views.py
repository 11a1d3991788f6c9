"""Images in the LLM's stream: files of every format, their views and marks, bad records."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatch, LlmBatches
from seed_multimodal.data.stream.views import INPUT_IMAGE, TARGET_IMAGE
from seed_multimodal.errors import DataError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_nano.train.words import train_text_tokenizer

SIDE = 28
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> MultimodalTokenizer:
    """A tokenizer with 4 tokens per image."""
    return train_text_tokenizer(
        MultimodalTokenizer,
        ["[INST] What is it? It is red, green or blue. [/INST]\n"] * 50,
        tmp_path_factory.mktemp("words"),
        vocab_size=290,
        n_codes=4,
        tokens_per_image=4,
        n_locations=16,
    )


def image(name: str, size: tuple[int, int] = (40, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, COLOURS[name]).save(stream, "PNG")
    return stream.getvalue()


def lines(file: Path, records: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def batches_of(
    tokenizer: MultimodalTokenizer, *sources: dict[str, Any], workers: int = 0, **more: Any
) -> LlmBatches:
    full = [
        {
            "name": f"s{index}",
            "batch_size": 2,
            "max_length": 80,
            **source,
            "options": {
                "base_resolution": SIDE,
                "resolution_grids": ["1x1", "2x1"],
                **source.get("options", {}),
            },
        }
        for index, source in enumerate(sources)
    ]
    settings = read_data_settings({"sources": full, "packing": False, "seed": 1, **more})
    return LlmBatches(settings, tokenizer, workers=workers)


def colour_of(view: torch.Tensor) -> str:
    mean = view.float().mean((1, 2))
    return min(COLOURS, key=lambda name: float((mean - torch.tensor(COLOURS[name])).abs().sum()))


def check_marks(batch: LlmBatch, tokenizer: MultimodalTokenizer) -> None:
    """Four image tokens per view are marked, and no other tokens."""
    views = batch.views
    assert views is not None
    code = torch.tensor(
        [[tokenizer.vocabulary.is_code_id(id) for id in row] for row in batch.input_ids.tolist()]
    )
    assert bool((code == (views.marks > 0)).all())
    assert int((views.marks == INPUT_IMAGE).sum()) == 4 * int((~views.is_target).sum())
    assert int((views.marks == TARGET_IMAGE).sum()) == 4 * int(views.is_target.sum())
    assert views.pixels.dtype == torch.uint8 and views.pixels.shape[1:] == (3, SIDE, SIDE)


@pytest.mark.process
def test_next_of_edits(tokenizer: MultimodalTokenizer, tmp_path):
    """Two views of the source are read, one of the target is written.

    In a later turn the target is read, too.
    """
    for name in COLOURS:
        (tmp_path / f"{name}.png").write_bytes(image(name))
    edit = lines(
        tmp_path / "edit.jsonl",
        [{"source_image": "red.png", "target_image": "/blue.png", "instruction": "It is blue."}],
    )
    turns = lines(
        tmp_path / "turns.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": [{"image": "red.png"}, "green"]},
                    {"role": "assistant", "content": [{"image": "green.png"}]},
                    {"role": "user", "content": "blue"},
                    {"role": "assistant", "content": ["It is.", {"image": "blue.png"}]},
                ]
            }
        ],
    )
    single = next(
        batches_of(
            tokenizer,
            {"files": edit, "decoder": "seed_x.edit", "batch_size": 1, "image_dir": str(tmp_path)},
        )
    )
    check_marks(single, tokenizer)
    assert single.views is not None and single.views.is_target.tolist() == [False, False, True]
    assert [colour_of(view) for view in single.views.pixels] == ["red", "red", "blue"]
    chat = {
        "files": turns,
        "decoder": "seed_x.chat",
        "batch_size": 1,
    }  # images are next to the list
    two_images = next(batches_of(tokenizer, chat))
    with batches_of(tokenizer, chat, workers=1) as by_worker:
        assert torch.equal(next(by_worker).views.pixels, two_images.views.pixels)
    check_marks(two_images, tokenizer)
    assert two_images.views is not None
    assert [colour_of(view) for view in two_images.views.pixels] == [
        "red",
        "red",
        "green",
        "green",
        "green",
        "blue",
    ]
    assert two_images.views.is_target.tolist() == [False, False, True, False, False, True]


def test_next_of_a_wide_image(tokenizer: MultimodalTokenizer, tmp_path):
    wide = Image.new("RGB", (112, 56), COLOURS["red"])
    wide.paste(COLOURS["blue"], (56, 0, 112, 56))
    wide.save(tmp_path / "wide.png")
    file = lines(
        tmp_path / "talk.jsonl", [{"image": "wide.png", "data": ["What is it?", "It is red."]}]
    )
    batch = next(batches_of(tokenizer, {"files": file, "decoder": "seed_x.conversation"}))
    check_marks(batch, tokenizer)
    assert batch.views is not None and [colour_of(view) for view in batch.views.pixels[:2]] == [
        "red",
        "blue",
    ]
    assert batch.views.positions[:3].tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.5]]


def test_next_of_captions_in_tars(tokenizer: MultimodalTokenizer, tmp_path):
    """With and without json.

    Dissimilar pairs, small images and over-long captions are counted, not replaced.
    """
    file = tmp_path / "0.tar"
    write_shard(
        file,
        [
            ("a", {"png": image("red"), "txt": b"red"}),
            ("b", {"png": image("blue"), "txt": b"blue", "json": b'{"similarity": 0.05}'}),
            ("c", {"png": image("green", (10, 40)), "txt": b"green"}),
            ("d", {"png": image("green"), "txt": b"green " * 60}),
            ("e", {"txt": b"nothing"}),
            ("f", {"png": b"no image", "txt": b"red"}),
        ],
    )
    batches = batches_of(
        tokenizer,
        {
            "files": str(file),
            "decoder": "seed_x.caption",
            "cycles": 1,
            "batch_size": 6,
            "options": {
                "img_first_ratio": -1,
                "add_gen_prompt": False,
                "min_resolution": 20,
                "similarity_thr": 0.1,
            },
        },
    )
    batch = next(batches)
    check_marks(batch, tokenizer)
    assert (
        batch.views is not None
        and batch.sequences == 1
        and colour_of(batch.views.pixels[0]) == "red"
    )
    skipped = batches.report()["sources"]["s0"]["skipped"]
    first = " ".join(reason for entry in skipped.values() for reason in entry["first"])
    assert sum(entry["count"] for entry in skipped.values()) == 5
    assert {"similarity", "resolution", "its images do not fit into 80 tokens"} <= skipped.keys()
    assert all(f"sample {key}" in first for key in "bcdef") and "image: missing" in first


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "gone.png", "data": ["q", "a"]}, "line 1: image gone.png not found"),
        ({"image": "bad.png", "data": ["q", "a"]}, "line 1"),
        (
            {"image": "a.png", "data": ["<image> and <image>", "a"]},
            "2 <image> placeholders for 1 image",
        ),
    ],
)
def test_next_of_bad_records(tokenizer: MultimodalTokenizer, tmp_path, record, message):
    (tmp_path / "a.png").write_bytes(image("red"))
    (tmp_path / "bad.png").write_bytes(image("red")[:40])
    file = lines(tmp_path / "talk.jsonl", [record])
    with pytest.raises(DataError) as error:
        next(
            batches_of(
                tokenizer, {"files": file, "decoder": "seed_x.conversation"}, max_bad_in_a_row=1
            )
        )
    assert message in str(error.value) and "talk.jsonl: line 1" in str(error.value)


def test_next_counts_cut_conversations(tokenizer: MultimodalTokenizer, tmp_path):
    (tmp_path / "a.png").write_bytes(image("red"))
    file = lines(
        tmp_path / "talk.jsonl", [{"image": "a.png", "data": ["What?", "It is red. " * 40]}]
    )
    source = {"files": file, "decoder": "seed_x.conversation", "cycles": 1, "batch_size": 1}
    batches = batches_of(tokenizer, source, packing=False, length=80, rows=1)
    assert next(batches).tokens == 80
    assert batches.report()["sources"]["s0"]["skipped"]["too long, cut"]["count"] == 1
    with pytest.raises(DataError, match="tokens, rows have 80.: too long"):
        batches_of(tokenizer, source, packing=True, length=80, rows=1)
