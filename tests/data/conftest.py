"""Small real training data: noisy jpegs and shards written by the webdataset library."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image


@pytest.fixture(scope="session")
def jpeg() -> Callable[..., bytes]:
    """`jpeg(number, width=40, height=32)`: the bytes of a picture that differs for each number."""

    def make(number: int, width: int = 40, height: int = 32) -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=90)
        return out.getvalue()

    return make


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Iterable[Mapping[str, Any]]], Path]:
    """`write_tar(path, samples)`: a shard by webdataset's writer; a sample is `{"__key__": .., "jpg": bytes, ..}`."""

    def write(path: Path, samples: Iterable[Mapping[str, Any]]) -> Path:
        with webdataset.TarWriter(str(path), encoder=True) as writer:
            for sample in samples:
                writer.write(dict(sample))
        return path

    return write


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, jpeg: Callable, write_tar: Callable) -> Path:
    """Folder with s-000.tar .. s-003.tar of 13, 7, 1 and 19 whole samples (key NNNNN, caption `picture N.`)."""
    folder = tmp_path_factory.mktemp("shards")
    number = 0
    for shard, size in enumerate((13, 7, 1, 19)):
        samples = []
        for _ in range(size):
            caption = f"Picture {number}."
            samples.append({"__key__": f"{number:05d}", "jpg": jpeg(number), "json": {"caption": caption},
                            "txt": f"{caption}\n"})
            number += 1
        write_tar(folder / f"s-{shard:03d}.tar", samples)
    return folder
