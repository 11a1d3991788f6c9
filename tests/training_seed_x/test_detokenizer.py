"""Training of SEED-X's de-tokenizer: both stages on a tiny SDXL, from real files; resumed, cached, drawn with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sdxl
import torch
from PIL import Image

from seed_multimodal.detokenizers.sdxl import SdxlDetokenizer
from seed_multimodal.detokenizers.sdxl_adapter import SDXLAdapter
from seed_multimodal.errors import CheckpointError, ConfigError, DataError
from seed_multimodal.training.seed_x.detokenizer import train_detokenizer
from seed_multimodal.vision.qwen_vit import QwenVit, QwenVitConfig

TOWER = QwenVitConfig(image_size=16, patch_size=4, width=16, layers=1, heads=2, output_dim=tiny_sdxl.WIDTH,
                      n_queries=16, position_grid=4, pool_heads=2)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `sdxl`, `tower`, pictures, and edits as a list."""
    home = tmp_path_factory.mktemp("detokenizer")
    tiny_sdxl.sdxl_folder(home / "sdxl")
    torch.manual_seed(5)
    QwenVit(TOWER).save_pretrained(home / "tower")
    draw = np.random.default_rng(0)
    for folder, count in (("pictures", 9), ("before", 5), ("after", 5)):
        (home / folder).mkdir()
        for number in range(count):
            size = (24 + number, 20) if number % 2 else (20, 24 + 2 * number)
            Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(home / folder / f"{number}.png")
    lines = [{"source_image": f"before/{n}.png", "target_image": f"after/{n}.png"} for n in range(5)]
    (home / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


def config(parts: Path, output: Path, stage: int = 1, **changes: dict[str, Any]) -> dict[str, Any]:
    sources: list[dict[str, Any]] = [{"name": "pictures", "files": str(parts / "pictures")}]
    if stage == 2:
        sources.append({"name": "edits", "files": str(parts / "edits.jsonl"), "image_key": "target_image",
                        "condition_key": "source_image", "weight": 2.0})
    made: dict[str, Any] = {
        "output_dir": str(output),
        "model": {"sdxl": str(parts / "sdxl"), "tower": str(parts / "tower"), "stage": stage, "tokens": 4,
                  "resampler": vars(tiny_sdxl.SIZES)},
        "data": {"sources": sources, "batch_size": 4, "resolution": 16, "tower_size": 16},
        "optim": {"learning_rate": 3e-3, "weight_decay": 0.0, "warmup_steps": 1},
        "trainer": {"max_steps": 4, "precision": "fp32", "device": "cpu", "dataloader_num_workers": 0,
                    "report_to": [], "logging_steps": 1, "save_steps": 2}}
    for group, values in changes.items():
        made[group] = {**made[group], **values}
    return made


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "train.log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_is_trained_and_its_adapter_draws(parts: Path, tmp_path: Path, stage: int) -> None:
    record = train_detokenizer(config(parts, tmp_path / "run", stage))
    assert record["steps"] == 4 and record["stage"] == stage and record["samples_per_step"] == 4
    adapter = SDXLAdapter.from_pretrained(tmp_path / "run" / "adapter", parts / "sdxl")
    assert adapter.reads_condition == (stage == 2)
    start = tiny_sdxl.unet().state_dict()
    moved = {name for name, value in adapter.unet.state_dict().items()
             if name != "conv_in.weight" and not torch.equal(value, start[name])}
    assert moved - {"conv_in.bias"} and all("to_k" in name or "to_v" in name for name in moved - {"conv_in.bias"})
    assert ("conv_in.bias" in moved) == (stage == 2)
    detokenizer = SdxlDetokenizer.from_pretrained(parts / "sdxl", tmp_path / "run" / "adapter")
    detokenizer.look_at_nothing(QwenVit.from_pretrained(parts / "tower"), 16)
    pictures = detokenizer.decode(torch.randn(2, 16, tiny_sdxl.WIDTH), num_inference_steps=2, height=16, width=16)
    assert [picture.size for picture in pictures] == [(16, 16)] * 2


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_with_the_same_losses(parts: Path, tmp_path: Path) -> None:
    """With averaged weights, condition dropout, several micro-steps and gradient checkpointing on one side only: a run
    stopped in the middle ends with the weights of one that was not."""
    changes: dict[str, Any] = {"trainer": {"ema": 0.9, "gradient_accumulation_steps": 2}, "model": {"min_snr": 5.0}}
    train_detokenizer(config(parts, tmp_path / "whole", 2, **changes))
    changes["model"]["gradient_checkpointing"] = True
    changes["trainer"]["save_total_limit"] = 1
    train_detokenizer(config(parts, tmp_path / "parts", 2, **changes))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    adapters = [(tmp_path / run / "adapter" / "model.safetensors").read_bytes() for run in ("parts", "whole")]
    assert adapters[0] == adapters[1]
    names = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "resampler.json"} <= names
    for file in (tmp_path / "whole" / "checkpoint-4", tmp_path / "whole" / "adapter"):
        for path in file.iterdir():
            path.unlink()
        file.rmdir()
    (tmp_path / "whole" / "summary.json").unlink()
    train_detokenizer(config(parts, tmp_path / "whole", 2, **changes))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert (tmp_path / "whole" / "adapter" / "model.safetensors").read_bytes() == adapters[0]
    smaller = config(parts, tmp_path / "whole", 2, **changes, data={"batch_size": 2})
    with pytest.raises(CheckpointError, match="was saved by a run with 8 samples per step, this one has 4"):
        train_detokenizer(smaller)


@pytest.mark.slow
def test_a_second_stage_begins_as_its_first(parts: Path, tmp_path: Path) -> None:
    """The adapter of stage 1 goes on with eight input channels; its resampler's sizes come with it."""
    train_detokenizer(config(parts, tmp_path / "one", trainer={"max_steps": 1}))
    started = {"start": str(tmp_path / "one" / "adapter"), "trained": "all"}
    record = train_detokenizer(config(parts, tmp_path / "two", 2, model=started, trainer={"max_steps": 1},
                                      optim={"learning_rate": 0.0}))
    first, second = (SDXLAdapter.from_pretrained(folder, parts / "sdxl") for folder in (
        tmp_path / "one" / "adapter", record["adapter"]))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 4, tiny_sdxl.WIDTH), torch.zeros(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(first(*inputs), second(*inputs, torch.randn(2, 4, 8, 8)))


@pytest.mark.parametrize(("stage", "changes", "error", "said"), [
    (1, {"data": {"resolution": 17}}, ConfigError, "resolution 17 is no multiple of 2"),
    (1, {"data": {"tower_size": 32}}, ConfigError, "tower_size is 32, but the tower .* sees 16 pixels a side"),
    (1, {"data": {"sources": []}}, ConfigError, "sources must list at least one source"),
    (1, {"data": {"sources": [{"name": "a", "files": "/nowhere/x"}]}}, DataError, "/nowhere/x"),
    (1, {"data": {"sources": [{"name": "a", "condition_key": "source_image"}]}}, ConfigError,
     "source 'a' has a condition_key, but the first stage reads no condition picture"),
    (1, {"data": {"sources": [{"name": "a", "fils": "x"}]}}, ConfigError, "unknown key 'fils' .did you mean 'files'"),
    (1, {"model": {"tokens": 5}}, ConfigError, "the tower's 16 embeddings .* cannot be pooled to 5"),
    (1, {"model": {"stage": 3}}, ConfigError, "stage must be 1 or 2, not 3"),
    (1, {"model": {"trained": "some"}}, ConfigError, "trained must be 'key_value' or 'all'"),
    (1, {"model": {"dropout": {"embeds": 2.0}}}, ConfigError, "embeds must be at most 1, not 2.0"),
    (1, {"model": {"tower": "/nowhere"}}, CheckpointError, "/nowhere: there is no such folder; SEED-X's vision tower"),
    (1, {"model": {"sdxl": "/nowhere"}}, CheckpointError, "download the diffusers folder of SDXL"),
    (1, {"model": {"resampler": {**vars(tiny_sdxl.SIZES), "embedding_dim": 12}}}, ConfigError,
     "the resampler reads embeddings of width 12, but the tower makes 24"),
])
def test_settings_that_cannot_be(parts: Path, tmp_path: Path, stage: int, changes: dict[str, Any],
                                 error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        train_detokenizer(config(parts, tmp_path / "run", stage, **changes))
    assert "\n" not in str(caught.value)


def test_a_second_stage_is_no_start_of_a_first(parts: Path, tmp_path: Path) -> None:
    tiny_sdxl.adapter(2).save_pretrained(tmp_path / "second")
    with pytest.raises(ConfigError, match="second is of the second stage; train it with stage=2"):
        train_detokenizer(config(parts, tmp_path / "run", model={"start": str(tmp_path / "second")}))


@pytest.mark.slow
def test_bad_pictures_are_named_and_counted(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in (parts / "pictures").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "3.png").write_bytes(b"no picture")
    sources = [{"name": "pictures", "files": str(folder)}]
    record = train_detokenizer(config(parts, tmp_path / "run", data={"sources": sources}))
    assert record["bad_samples"] == 1 and "skipped: " in (said := capsys.readouterr().out) and "3.png" in said
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="samples in a row, from number . on, cannot be used"):
        train_detokenizer(config(parts, tmp_path / "empty", data={"sources": sources}))
