"""Fixtures of the data tests: JPEG noise, shards of pairs, data of the LLM, the nano tokenizer.

Each record of the LLM's data contains its number in its text, `number N`.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from repository import ROOT

from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.language.tokenizer import MultimodalTokenizer


@pytest.fixture(scope="session")
def jpeg() -> Callable[..., bytes]:
    """`jpeg(number, width=64, height=64)`: the bytes of image `number`."""

    def make(index: int, width: int = 64, height: int = 64) -> bytes:
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=90)
        return out.getvalue()

    return make


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Iterable[Mapping[str, Any]]], Path]:
    """`write_tar(path, samples)`: a shard by webdataset's writer.

    A sample is `{"__key__": .., "jpg": bytes, ..}`.
    """

    def write(path: Path, samples: Iterable[Mapping[str, Any]]) -> Path:
        with webdataset.TarWriter(str(path), encoder=True) as writer:
            for sample in samples:
                writer.write(dict(sample))
        return path

    return write


@pytest.fixture(scope="session")
def shards(tmp_path_factory, jpeg: Callable, write_tar: Callable) -> Path:
    """Folder with s-000.tar .. s-003.tar of 13, 7, 1 and 19 samples.

    Their keys are NNNNN, their captions `Picture N.`.
    """
    folder = tmp_path_factory.mktemp("shards")
    index = 0
    for shard, size in enumerate((13, 7, 1, 19)):
        samples = []
        for _ in range(size):
            caption = f"Picture {index}."
            samples.append(
                {
                    "__key__": f"{index:05d}",
                    "jpg": jpeg(index),
                    "json": {"caption": caption},
                    "txt": f"{caption}\n",
                }
            )
            index += 1
        write_tar(folder / f"s-{shard:03d}.tar", samples)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> MultimodalTokenizer:
    """The nano tokenizer."""
    return MultimodalTokenizer.from_pretrained(ROOT / "pretrained" / "nano" / "seed_tokenizer")


@pytest.fixture(scope="session")
def codes(tokenizer: MultimodalTokenizer) -> Callable[[int], list[int]]:
    """`codes(n)`: the codes of image n."""

    def make(index: int) -> list[int]:
        vocabulary = tokenizer.vocabulary
        rng = random.Random(index)
        return [rng.randrange(vocabulary.n_codes) for _ in range(vocabulary.tokens_per_image)]

    return make


@pytest.fixture(scope="session")
def shard() -> Callable[[Path, Iterable[dict[str, Any] | bytes]], Path]:
    """`shard(path, records)`: a webdataset tar of KEY.json members; bytes are kept as they are."""

    def write(path: Path, records: Iterable[dict[str, Any] | bytes]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        contents = [
            record if isinstance(record, bytes) else json.dumps(record).encode()
            for record in records
        ]
        write_shard(
            path, [(f"{index:05d}", {"json": content}) for index, content in enumerate(contents)]
        )
        return path

    return write


@pytest.fixture(scope="session")
def lines() -> Callable[[Path, Iterable[dict[str, Any] | str]], Path]:
    """`lines(path, records)`: a jsonl file (texts are written as they are)."""

    def write(path: Path, records: Iterable[dict[str, Any] | str]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(
                f"{record if isinstance(record, str) else json.dumps(record)}\n"
                for record in records
            )
        )
        return path

    return write


@pytest.fixture(scope="session")
def sets(tmp_path_factory, codes: Callable, shard: Callable, lines: Callable) -> Path:
    """Folders of records, by number.

    captions/     three tars of 40, 25 and 1 records, 0..65
    documents/    one tar, 1000..1029, two images each
    texts/        two jsonl of 20 and 15 records, 2000..2034
    """
    folder = tmp_path_factory.mktemp("sets")
    index = 0
    for part, size in enumerate((40, 25, 1)):
        shard(
            folder / "captions" / f"part-{part:04d}" / "0000000.tar",
            [
                {
                    "image_ids": codes(n),
                    "text": f"number {n}" + " and so on" * (n % 5),
                    "metadata": {},
                }
                for n in range(index, index + size)
            ],
        )
        index += size
    shard(
        folder / "documents" / "0000000.tar",
        [
            {
                "image_ids": [codes(n), None, codes(n + 1), None],
                "metadata": {},
                "texts": [None, f"number {n}", None, "more words" * (n % 7)],
            }
            for n in range(1000, 1030)
        ],
    )
    lines(
        folder / "texts" / "a.jsonl",
        [{"text": f"number {n}" + " of them" * (n % 20)} for n in range(2000, 2020)],
    )
    lines(
        folder / "texts" / "b.jsonl",
        [{"text": f"number {n}" + " of them" * (n % 20)} for n in range(2020, 2035)],
    )
    return folder


@pytest.fixture(scope="session")
def mixed(sets: Path) -> Callable[..., dict[str, Any]]:
    """`mixed(**settings)`: a configuration of the three sets with weights 4, 1 and 2."""

    def make(**settings: Any) -> dict[str, Any]:
        return {
            "sources": [
                {
                    "name": "captions",
                    "files": str(sets / "captions"),
                    "decoder": "pretrain.caption",
                    "weight": 4,
                    "options": {"reverse_ratio": 0.5},
                },
                {
                    "name": "documents",
                    "files": str(sets / "documents"),
                    "decoder": "pretrain.interleaved",
                    "weight": 1,
                    "options": {"reverse_ratio": 0.5},
                },
                {
                    "name": "texts",
                    "files": str(sets / "texts"),
                    "decoder": "pretrain.text",
                    "weight": 2,
                },
            ],
            "length": 192,
            **settings,
        }

    return make


@pytest.fixture(scope="session")
def sequences() -> Callable[[LlmBatch], list[tuple[list[int], list[int]]]]:
    """`sequences(batch)`: the (ids, labels) of a batch without padding.

    A sequence starts at position 0.
    """

    def cut(batch: LlmBatch) -> list[tuple[list[int], list[int]]]:
        pairs = []
        for ids, labels, positions in zip(
            batch.input_ids.tolist(),
            batch.labels.tolist(),
            batch.position_ids.tolist(),
            strict=True,
        ):
            starts = [index for index, position in enumerate(positions) if position == 0]
            starts.append(len(ids))
            for start, end in zip(starts, starts[1:], strict=False):
                sequence = ids[start:end]
                while sequence and sequence[-1] == 0:  # only padding is 0 here
                    sequence.pop()
                if sequence:
                    pairs.append((sequence, labels[start : start + len(sequence)]))
        return pairs

    return cut


@pytest.fixture(scope="session")
def record_numbers(
    tokenizer: MultimodalTokenizer, sequences: Callable
) -> Callable[[LlmBatch], list[int]]:
    """`numbers(batch)`: the record numbers of a batch's sequences, in order."""

    def read(batch: LlmBatch) -> list[int]:
        return [
            int(re.search(r"number (\d+)", tokenizer.decode(ids))[1]) for ids, _ in sequences(batch)
        ]  # type: ignore

    return read
