"""Images in the LLM's stream: their views and marks, equal for any number of workers."""

import pytest
import torch
from data_files import lines
from llm_runs import COLOURS
from PIL import Image
from yaml_tables import read_tables

from seed_multimodal.data.decoders.features import INPUT_IMAGE, TARGET_IMAGE
from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches

SIDE = 28


def colours(batch) -> list[str]:
    """The colour of each view."""
    means = [view.float().mean((1, 2)) for view in batch.views.pixels]
    return [
        min(COLOURS, key=lambda name: float((mean - torch.tensor(COLOURS[name])).abs().sum()))
        for mean in means
    ]


@pytest.mark.process
def test_next_of_several_edits(seedx_tokenizer, tmp_path):
    # All views of a source are read, in reading order and the whole last, each with its place; one
    # of a target is written, and it is read in later turns.
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    wide = Image.new("RGB", (112, 56), COLOURS["red"])
    wide.paste(COLOURS["blue"], (56, 0, 112, 56))
    wide.save(tmp_path / "wide.png")
    table = read_tables(__file__)
    turns = lines(tmp_path / "lists/turns.jsonl", [{"messages": table["messages"]}])
    source = {**table["source"], "files": str(turns), "image_dir": str(tmp_path)}
    settings = read_data_settings({"sources": [source], "packing": False})
    batch = next(LlmBatches(settings, seedx_tokenizer))
    views = batch.views
    assert views.pixels.shape == (7, 3, SIDE, SIDE)
    assert views.pixels.dtype == torch.uint8
    assert views.is_target.tolist() == [*[False] * 3, True, False, False, True]
    assert colours(batch)[:2] == ["red", "blue"]
    assert colours(batch)[3:] == ["green", "green", "green", "blue"]
    assert views.positions[:3].tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.5]]
    # Four image tokens of each view are marked, and no other tokens: else features go to texts.
    is_code = [list(map(seedx_tokenizer.vocabulary.is_code_id, batch.input_ids[0].tolist()))]
    assert (views.marks > 0).tolist() == is_code
    counts = [int((views.marks == mark).sum()) for mark in (INPUT_IMAGE, TARGET_IMAGE)]
    assert counts == [4 * 5, 4 * 2]
    with LlmBatches(settings, seedx_tokenizer, workers=1) as by_worker:
        assert torch.equal(next(by_worker).views.pixels, views.pixels)
