"""Images in the LLM's stream: files of every format, their views and marks, bad records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import lines
from llm_runs import COLOURS
from PIL import Image

from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatch, LlmBatches
from seed_multimodal.data.stream.views import INPUT_IMAGE, TARGET_IMAGE
from seed_multimodal.images.io import image_to_bytes
from seed_multimodal.language.tokenizer import MultimodalTokenizer

SIDE = 28


def png(name: str, size: tuple[int, int] = (40, 30)) -> bytes:
    return image_to_bytes(Image.new("RGB", size, COLOURS[name]))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of red.png and so on."""
    for name in COLOURS:
        (tmp_path / f"{name}.png").write_bytes(png(name))
    return tmp_path


def batches_of(
    tokenizer: MultimodalTokenizer, source: dict[str, Any], workers: int = 0, **settings: Any
) -> LlmBatches:
    options = {"base_resolution": SIDE, "resolution_grids": ["1x1", "2x1"]}
    options |= source.pop("options", {})
    source = {"name": "s", "batch_size": 1, "max_length": 80, **source, "options": options}
    config = {"sources": [source], "packing": False, "seed": 1, **settings}
    return LlmBatches(read_data_settings(config), tokenizer, workers=workers)


def colours(batch: LlmBatch) -> list[str]:
    """The colour of each view."""
    means = [view.float().mean((1, 2)) for view in batch.views.pixels]
    return [
        min(COLOURS, key=lambda name: float((mean - torch.tensor(COLOURS[name])).abs().sum()))
        for mean in means
    ]


def check_marks(batch: LlmBatch, tokenizer: MultimodalTokenizer) -> None:
    """Four image tokens per view are marked, and no other tokens: else features go to texts."""
    views = batch.views
    is_code = [
        [tokenizer.vocabulary.is_code_id(id) for id in row] for row in batch.input_ids.tolist()
    ]
    assert (views.marks > 0).tolist() == is_code
    n_targets = int(views.is_target.sum())
    assert int((views.marks == TARGET_IMAGE).sum()) == 4 * n_targets
    assert int((views.marks == INPUT_IMAGE).sum()) == 4 * (len(views.is_target) - n_targets)
    assert views.pixels.dtype == torch.uint8
    assert views.pixels.shape[1:] == (3, SIDE, SIDE)


@pytest.mark.process
def test_next_of_several_edits(seedx_tokenizer: MultimodalTokenizer, folder: Path):
    # All views of a source are read, in reading order and the whole last, each with its place; one
    # of a target is written, and it is read in later turns.
    wide = Image.new("RGB", (112, 56), COLOURS["red"])
    wide.paste(COLOURS["blue"], (56, 0, 112, 56))
    wide.save(folder / "wide.png")
    turns = [
        {"role": "user", "content": [{"image": "wide.png"}, "green"]},
        {"role": "assistant", "content": [{"image": "green.png"}]},
        {"role": "user", "content": "blue"},
        {"role": "assistant", "content": ["It is.", {"image": "blue.png"}]},
    ]
    path = lines(folder / "lists/turns.jsonl", [{"messages": turns}])
    source = {"files": str(path), "decoder": "seed_x.chat", "image_dir": str(folder)}
    source |= {"max_length": 120}
    batch = next(batches_of(seedx_tokenizer, dict(source)))
    check_marks(batch, seedx_tokenizer)
    assert batch.views.is_target.tolist() == [*[False] * 3, True, False, False, True]
    assert colours(batch)[:2] == ["red", "blue"]
    assert colours(batch)[3:] == ["green", "green", "green", "blue"]
    assert batch.views.positions[:3].tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.5]]
    with batches_of(seedx_tokenizer, dict(source), workers=1) as by_worker:
        assert torch.equal(next(by_worker).views.pixels, batch.views.pixels)
