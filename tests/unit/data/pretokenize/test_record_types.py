"""Every kind of records, from images on disk to decoded sequences, with the nano tokenizer."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from repository import ROOT

from seed_multimodal.data.decoders import get_decoder
from seed_multimodal.data.decoders.base import SeededRandom
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.formats.sources import open_records
from seed_multimodal.data.pretokenize.run import RunSettings, run
from seed_multimodal.language.prompts import DESCRIBE_PROMPT, QA_SUFFIX
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.models.seed.pipeline import SeedImageCodec
from seed_multimodal.pipelines.images import open_images
from seed_nano.world.scene import render
from seed_nano.world.splits import scenes

CONFIGS = ROOT / "MultiModalLLM" / "configs"


@pytest.fixture(scope="module")
def codec() -> SeedImageCodec:
    """Image tokenizer of the nano system."""
    return open_images("nano", device="cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Folder of ten scenes 0.png … 9.png."""
    folder = tmp_path_factory.mktemp("images")
    for index, scene in enumerate(scenes("val")[:10]):
        Image.fromarray(render(scene)).resize((90, 70)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def make(tmp_path, images: Path) -> Callable[..., list[dict[str, Any]]]:
    """`make(kind, records, **run settings)`: pre-tokenise json records and read the output."""

    def run_it(
        kind: str,
        records: list[dict[str, Any]] | None,
        data: dict[str, Any] | None = None,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        if records is not None:
            (tmp_path / "in.json").write_text(json.dumps(records))
            data = {"files": str(tmp_path / "in.json"), "image_root": str(images), **(data or {})}
        assert (
            run(
                RunSettings(
                    kind=kind,
                    data=data or {},
                    save_dir=str(tmp_path / "out"),
                    device="cpu",
                    **{
                        "tokenizer": str(CONFIGS / "tokenizer" / "nano.yaml"),
                        "image_transform": str(CONFIGS / "processer" / "nano_transform.yaml"),
                        "workers": 0,
                        **settings,
                    },
                )
            )
            == 0
        )
        source = open_records(str(tmp_path / "out"))
        return [source.read(index).fields for index in range(len(source))]

    return run_it


def codes_of(codec: SeedImageCodec, folder: Path, *indices: int) -> list[list[int]]:
    return [codec.encode([folder / f"{index}.png"])[0].tolist() for index in indices]


def decode(
    tokenizer: MultimodalTokenizer, name: str, fields: dict[str, Any], **options: Any
) -> str:
    sequence = get_decoder(name, tokenizer, options).decode(fields, SeededRandom(0))
    assert not sequence.drop_reason and any(label != -100 for label in sequence.labels)
    return tokenizer.decode(sequence.ids)


def shown(tokenizer: MultimodalTokenizer, codes: list[int]) -> str:
    return tokenizer.decode(tokenizer.vocabulary.image_ids(codes))


@pytest.mark.slow
def test_run_caption_of_tars(make, codec, images, tokenizer, tmp_path):
    for shard in range(2):
        write_shard(
            tmp_path / "in" / f"{shard}.tar",
            [
                (
                    f"{n:03d}",
                    {
                        "png": (images / f"{n}.png").read_bytes(),
                        "txt": f"image {n}".encode(),
                        "json": json.dumps({"similarity": 0.1 * n, "url": f"u{n}"}).encode(),
                    },
                )
                for n in range(5 * shard, 5 * shard + 5)
            ],
        )
    records = make(
        "caption", None, {"files": str(tmp_path / "in"), "similarity_thr": 0.25}, batch_size=3
    )
    assert [record["text"] for record in records] == [f"image {n}" for n in range(3, 10)]
    assert all(record.keys() == {"image_ids", "text", "metadata"} for record in records)
    assert records[0]["metadata"] == {"similarity": pytest.approx(0.3), "url": "u3"}
    assert [record["image_ids"] for record in records] == codes_of(codec, images, *range(3, 10))
    text = decode(tokenizer, "pretrain.caption", records[0], reverse_ratio=1.0)
    assert text.split() == f"<s> {shown(tokenizer, records[0]['image_ids'])} image 3</s>".split()
    assert json.loads((tmp_path / "out" / "counts.json").read_text()) == {
        "shards": 2,
        "read": 10,
        "samples": 7,
        "images": 7,
        "lost images": 0,
        "dropped: similarity": 3,
    }


def test_run_caption_with_views(make, codec, images, tokenizer):
    rows = [
        {"image": "0.png", "caption": ["a", "b"]},
        {"image": "1.png", "caption": "c"},
        {"image": "0.png", "caption": "d"},
    ]
    records = make("caption", rows, views=3)
    assert [record["text"] for record in records] == [["a", "b"], "c", "d"]
    for record, codes in zip(records, codes_of(codec, images, 0, 1, 0), strict=True):
        assert len(record["views"]) == 3 and record["views"][0] == record["image_ids"] == codes
    assert records[0]["views"] == records[2]["views"]  # of the same image
    assert "a" in decode(tokenizer, "pretrain.caption", records[0], first_text=1.0)


@pytest.mark.parametrize(
    ("row", "fields", "question", "answer", "decoded"),
    [
        (
            {"image": "2.png", "caption": "a fox"},
            None,
            DESCRIBE_PROMPT,
            "a fox",
            None,
        ),  # JourneyDB, as in the original
        (
            {
                "image": ["4.png", "5.png"],
                "question": "What differs in image a and image b?",
                "answer": "All",
            },
            "plain",
            "What differs in image a and image b?",
            "All",
            ("sft.difference", "This is the first image."),
        ),
        (
            {"image": "4.png", "question": "how many?", "answer": 2},
            "plain",
            "how many?",
            "2",
            ("sft.qa", "ASSISTANT: 2."),
        ),
        (
            {"image": "4.png", "question": "how many?", "answer": float("nan")},
            "plain",
            "",
            None,
            None,
        ),  # an empty cell
        (
            {"file": "3.png", "question": "What is it?", "answers": ["cat", "dog", "dog"]},
            {"image": "file", "answer": "answers", "suffix": QA_SUFFIX},
            "What is it?" + QA_SUFFIX,
            "dog",
            None,
        ),
    ],
)
def test_run_qa(make, codec, images, tokenizer, row, fields, question, answer, decoded):
    good = {
        "file": "0.png",
        "image": "0.png",
        "caption": "c",
        "question": "q",
        "answer": "a",
        "answers": ["a"],
    }
    *records, last = make("qa", [row, good], fields=fields)
    assert last["image_ids"] == codes_of(codec, images, 0)[0]
    assert [(record["question"], record["answer"]) for record in records] == (
        [(question, answer)] if answer else []
    )
    if decoded:
        assert decoded[1] in decode(tokenizer, decoded[0], records[0], reverse_ratio=0.0)


def test_run_edit(make, codec, images, tokenizer):
    rows = [
        {"source_image": "0.png", "target_image": "1.png", "instruction": "make it red"},
        {
            "source_image": "1.png",
            "target_image": "2.png",
            "instruction_gpt": "Redden it.",
            "response": "Done.",
        },
    ]
    records = make("edit", rows)
    assert [list(record) for record in records] == [
        ["source_image_ids", "target_image_ids", "instruction"],
        ["source_image_ids", "target_image_ids", "instruction_gpt", "response"],
    ]
    source, target = codes_of(codec, images, 0, 1)
    assert (records[0]["source_image_ids"], records[0]["target_image_ids"]) == (source, target)
    assert decode(tokenizer, "sft.edit", records[1]).endswith(
        f"Done. {shown(tokenizer, records[1]['target_image_ids'])} </s>"
    )
    assert "make it red" in decode(tokenizer, "pretrain.edit", records[0])


def test_run_story(make, codec, images, tokenizer):
    rows = [
        {"images": [f"{n}.png" for n in range(5)], "captions": [f"then {n}" for n in range(5)]},
        {"images": ["0.png"], "captions": ["alone"]},
    ]
    records = make("story", rows)
    assert [list(record) for record in records] == [
        ["image_ids", *(f"caption{n}" for n in range(5))]
    ]
    assert records[0]["image_ids"] == sum(codes_of(codec, images, *range(5)), [])
    assert (
        decode(tokenizer, "sft.story", records[0], reverse_ratio=0.0).count("Here is an image.")
        == 4
    )


def test_run_interleaved(make, codec, images, tokenizer, tmp_path, capfd):
    inline = base64.b64encode((images / "6.png").read_bytes()).decode()
    rows = [
        {
            "images": ["5.png", None, None, inline, "gone.png"],
            "texts": [None, "one", "two", None, None],
            "metadata": {"url": "u"},
        },
        {"images": ["gone.png"], "texts": [None]},
        {"images": [None], "texts": ["text only"]},
    ]
    records = make("interleaved", rows)
    first, second = codes_of(codec, images, 5, 6)
    assert records == [
        {
            "image_ids": [first, None, None, second],
            "texts": [None, "one", "two", None],
            "metadata": {"url": "u"},
        }
    ]
    text = decode(tokenizer, "pretrain.interleaved", records[0], reverse_ratio=0.0)
    assert (
        text.split()
        == f"<s> {shown(tokenizer, first)} onetwo {shown(tokenizer, second)} </s>".split()
    )
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert (counts["lost images"], counts["bad"], counts["dropped: no image"]) == (1, 1, 1)
    log = capfd.readouterr().err
    assert "dropped from its document: " in log and "item 0: image gone.png not found " in log
    assert "item 1: image gone.png not found " in log and "; none of its images is readable." in log


def test_run_chat_of_llava(make, codec, images, tokenizer):
    rows = [
        {
            "id": "1",
            "image": "1.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A fox."},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes."},
            ],
        },
        {
            "id": "2",
            "image": ["1.png", "2.png"],
            "conversations": [
                {"from": "human", "value": "<image> Draw another."},
                {"from": "gpt", "value": "Here: <image>"},
            ],
        },
        {
            "id": "3",
            "image": "1.png",
            "conversations": [
                {"from": "human", "value": "no placeholder"},
                {"from": "gpt", "value": "A fox."},
            ],
        },
    ]
    records = make("chat", rows, views=2)
    assert len(records) == 2 and all(list(record) == ["messages"] for record in records)
    first, second = codes_of(codec, images, 1, 2)
    (user, answer) = records[1]["messages"]
    assert user["content"][0]["codes"][0] == first and len(user["content"][0]["codes"]) == 2
    assert answer["content"] == ["Here: ", {"codes": second}]  # images to generate have one view
    assert decode(tokenizer, "chat", records[0]).endswith(
        "ASSISTANT: A fox. \nUSER: Sure?\nASSISTANT: Yes.</s>"
    )


def test_run_video(make, codec, tokenizer, tmp_path):
    movie = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    colours = [
        (0, 0, 255),
        (0, 255, 0),
        (255, 0, 0),
        (255, 255, 255),
    ]  # blue, green, red as OpenCV orders them
    for index in range(40):
        movie.write(np.full((64, 64, 3), colours[index // 10], np.uint8))
    movie.release()
    (tmp_path / "torn.avi").write_bytes(b"RIFF nothing")
    rows = [
        {
            "video": name,
            "question": "What happens?",
            "answer": "Colours",
            "caption": "Colours change",
        }
        for name in ("v.avi", "torn.avi", "gone.avi")
    ]
    records = make("video", rows, {"image_root": str(tmp_path), "num_frames": 8})
    assert len(records) == 1 and list(records[0]) == ["image_ids", "question", "answer"]
    pixels = io.BytesIO()
    Image.new("RGB", (64, 64), (255, 0, 0)).save(pixels, "PNG")
    size = tokenizer.vocabulary.tokens_per_image
    rows_of = [records[0]["image_ids"][start : start + size] for start in range(0, 8 * size, size)]
    assert rows_of[0] == codec.encode([pixels.getvalue()])[0].tolist()
    assert len({tuple(row) for row in rows_of}) == 4  # four colours
    assert decode(tokenizer, "sft.video", records[0]).count("<img>") == 8
    assert json.loads((tmp_path / "out" / "counts.json").read_text())["bad"] == 2


def test_run_interleaved_of_mmc4_as_published(make, codec, images, tokenizer, capfd):
    """Images stand before the sentences that they match; missing files are dropped."""
    inline = base64.b64encode((images / "6.png").read_bytes()).decode()
    info = [
        {
            "image_name": "5.png",
            "raw_url": "https://x/5.png",
            "matched_text_index": 1,
            "matched_sim": 0.3,
        },
        {"image_name": "6.png", "image_base64": inline, "matched_text_index": 0},
        {"image_name": "gone.png", "matched_text_index": 2},
    ]
    good = {
        "url": "x",
        "text_list": ["one", "two", "three"],
        "image_info": info,
        "similarity_matrix": [[0.1] * 3] * 3,
    }
    bad = [
        {**good, "image_info": [{**info[0], "matched_text_index": 9}]},
        {**good, "image_info": [7]},
        {**good, "text_list": "one"},
        {**good, "text_list": [None, "two", "three"]},
    ]
    (record,) = make("interleaved", [good, *bad])
    five, six = codes_of(codec, images, 5, 6)
    assert record["image_ids"] == [six, None, five, None, None]
    assert record["texts"] == [None, "one", None, "two", "three"]
    text = decode(tokenizer, "pretrain.interleaved", record, reverse_ratio=0.0)
    assert text.index("one") < text.index("two") < text.index("three")
    log = capfd.readouterr().err
    assert (
        "gone.png" in log
        and log.count("skipped: ") == 4
        and "matched_text_index from 0 to 2" in log
    )


def test_run_qa_of_vqa_records_without_fields(make, capfd):
    """The original's default reads JourneyDB; the message names the preset."""
    assert make(
        "qa",
        [
            {"image": "0.png", "question": "what?", "answer": "a"},
            {"image": "0.png", "caption": "c"},
        ],
    )
    assert (
        "has a question, but no 'caption'" in (log := capfd.readouterr().err)
        and "use --fields vqa" in log
    )
