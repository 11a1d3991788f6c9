"""Training of SEED-X's de-tokenizer: both stages on a tiny SDXL, from real files; resumed, averaged, drawn with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_sdxl
import torch
from PIL import Image
from tiny_detokenizer import CONFIGS, config, losses, write_parts, write_pictures

from seed_multimodal.errors import CheckpointError, ConfigError, DataError
from seed_multimodal.images.transforms import normalise
from seed_multimodal.seed_x.adapter import SDXLAdapter
from seed_multimodal.seed_x.diffusion import SdxlDetokenizer
from seed_multimodal.seed_x.vision import QwenVit
from seed_multimodal.training.frozen_features import FrozenFeatures
from seed_multimodal.training.llm.cli import compose
from seed_multimodal.training.pixel_decoder.task import ImageFeatures, drawn_latents, latent_moments
from seed_multimodal.training.seed_x.detokenizer import DetokenizerTask, build_adapter, pooled_features
from seed_multimodal.weights import load_state_dict

CPU = torch.device("cpu")
train = DetokenizerTask.train


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("detokenizer"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_is_trained_and_its_adapter_draws(parts: Path, tmp_path: Path, stage: int) -> None:
    record = train(config(parts, tmp_path / "run", stage))
    assert record["steps"] == 4 and record["samples_per_step"] == 4
    adapter = SDXLAdapter.from_pretrained(tmp_path / "run" / "adapter", parts / "sdxl")
    assert adapter.reads_condition == (stage == 2)
    start = tiny_sdxl.unet().state_dict()
    moved = {name for name, value in adapter.unet.state_dict().items()
             if name != "conv_in.weight" and not torch.equal(value, start[name])}
    assert moved - {"conv_in.bias"} and all("to_k" in name or "to_v" in name for name in moved - {"conv_in.bias"})
    assert ("conv_in.bias" in moved) == (stage == 2)
    detokenizer = SdxlDetokenizer.from_pretrained(parts / "sdxl", tmp_path / "run" / "adapter")
    detokenizer.set_null_embeds(QwenVit.from_pretrained(parts / "tower"), 16)
    images = detokenizer(torch.randn(2, 16, tiny_sdxl.WIDTH), num_inference_steps=2, height=16, width=16)
    assert [image.size for image in images] == [(16, 16)] * 2


@pytest.mark.slow
def test_a_second_stage_begins_as_its_first(parts: Path, tmp_path: Path) -> None:
    """The adapter of stage 1 goes on with eight input channels; its resampler's sizes come with it."""
    train(config(parts, tmp_path / "one", trainer={"max_steps": 1}))
    started = {"start": str(tmp_path / "one" / "adapter"), "trained": "all"}
    record = train(config(parts, tmp_path / "two", 2, model=started, trainer={"max_steps": 1},
                                      optim={"learning_rate": 0.0}))
    first, second = (SDXLAdapter.from_pretrained(folder, parts / "sdxl") for folder in (
        tmp_path / "one" / "adapter", record["adapter"]))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 4, tiny_sdxl.WIDTH), torch.zeros(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(first(*inputs), second(*inputs, torch.randn(2, 4, 8, 8)))


@pytest.mark.parametrize(("stage", "changes", "error", "said"), [
    (1, {"data": {"tower_size": 32}}, ConfigError, "tower_size is 32, but the vision encoder expects 16 pixels a side"),
    (1, {"data": {"sources": []}}, ConfigError, "sources must list at least one source"),
    (1, {"model": {"tokens": 5}}, ConfigError, "The encoder's 16 embeddings cannot be pooled to 5"),
    (1, {"model": {"tower": "/nowhere"}}, CheckpointError, "no such folder; SEED-X's vision encoder"),
    (1, {"model": {"sdxl": "/nowhere"}}, CheckpointError, "download the diffusers folder of SDXL"),
])
def test_settings_that_cannot_be(parts: Path, tmp_path: Path, stage: int, changes: dict[str, Any],
                                 error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        train(config(parts, tmp_path / "run", stage, **changes))
    assert "\n" not in str(caught.value)


def test_features_do_not_follow_the_runs_precision(parts: Path) -> None:
    """Under autocast: the autoencoder stays in float32, and a condition's latents are its means, not scaled."""
    vae = SdxlDetokenizer.load_part(parts / "sdxl", "vae")
    tower = QwenVit.from_pretrained(parts / "tower")
    seen = FrozenFeatures(tower, CPU, lambda pixels: pooled_features(tower, normalise(pixels), 4))
    features = ImageFeatures(seen, latent_moments(vae, CPU))
    batch = {"seen": torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8),
             "image": torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8),
             "condition": torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8),
             "conditioned": torch.tensor([True, False, True])}
    with torch.autocast("cpu", torch.bfloat16):
        made = features(batch)
    with torch.no_grad():
        seen = vae.encode(batch["image"].float() / 127.5 - 1).latent_dist
        before = vae.encode(batch["condition"].float() / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(made["moments"], seen.parameters)
    torch.testing.assert_close(made["condition"][[0, 2]], before[[0, 2]])
    assert not made["condition"][1].any() and made["seen"].shape == (3, 4, tiny_sdxl.WIDTH)
    torch.manual_seed(0)
    drawn = torch.stack([drawn_latents(made["moments"], 0.5) for _ in range(400)])
    torch.testing.assert_close(drawn.mean(0), 0.5 * seen.mean, atol=0.2, rtol=0.1)
    torch.testing.assert_close(drawn.std(0), 0.5 * seen.std, atol=0.05, rtol=0.2)


@pytest.mark.slow
def test_bad_images_are_named_and_counted(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in (parts / "pictures").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "3.png").write_bytes(b"no picture")
    sources = [{"name": "pictures", "files": str(folder)}]
    record = train(config(parts, tmp_path / "run", data={"sources": sources}))
    assert record["bad_samples"] == 1 and "skipped: " in (said := capsys.readouterr().out) and "3.png" in said
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="consecutive samples from index . on are unusable"):
        train(config(parts, tmp_path / "empty", data={"sources": sources}))


@pytest.mark.slow
@pytest.mark.parametrize("line", [{"source_image": "before/0.png"}, {"target_image": "after/0.png"}])
def test_a_pair_with_one_side_missing(line: dict[str, Any], parts: Path, tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    """Among good ones it is named, counted and replaced; it is never an edit from nothing. Where the first line is such
    a one, the list's keys are doubted at once."""
    good = [{"source_image": f"before/{n}.png", "target_image": f"after/{n}.png"} for n in (1, 2)]
    lines = [json.dumps(one) + "\n" for one in (*good, line)]
    (tmp_path / "edits.jsonl").write_text("".join(lines))
    source = {"files": str(tmp_path / "edits.jsonl"), "image_root": str(parts), "image_key": "target_image",
              "condition_key": "source_image"}
    given = config(parts, tmp_path / "run", 2, data={"sources": [{"name": "mine", **source}]}, trainer={"max_steps": 2})
    record = train(given)
    said = capsys.readouterr().out
    assert record["bad_samples"] == 1 and said.count("skipped: ") == 1 and "edits.jsonl" in said
    (tmp_path / "edits.jsonl").write_text(lines[-1] * 3)
    with pytest.raises(DataError, match="consecutive samples|has no image: nothing under key|is 4, not a path"):
        train({**given, "output_dir": str(tmp_path / "none")})


@pytest.mark.slow
def test_averaged_weights_are_the_result(parts: Path, tmp_path: Path) -> None:
    """The adapter is the moving average of the weights after each step, computed here again; averaging changes no
    step, and the frozen part stays SDXL's."""
    given = config(parts, tmp_path / "run", trainer={"max_steps": 3, "save_steps": 1, "ema": 0.5})
    train(given)
    train(config(parts, tmp_path / "bare", trainer={"max_steps": 3, "save_steps": 1}))
    assert losses(tmp_path / "run") == losses(tmp_path / "bare")
    expected = dict(build_adapter(DetokenizerTask.read(given).model).state_dict())
    for step in (1, 2, 3):
        now = load_state_dict(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        decay = min(0.5, step / (9 + step))
        expected |= {name: decay * expected[name] + (1 - decay) * value for name, value in now.items()}
    averaged, last = (load_state_dict(tmp_path / run / "adapter" / "model.safetensors") for run in ("run", "bare"))
    for name, value in averaged.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    assert any(not torch.equal(value, last[name]) for name, value in averaged.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_pixel_task_draws_held_out_images(parts: Path, tmp_path: Path, stage: int) -> None:
    """At each checkpoint by default, next to the originals and into TensorBoard; the losses stay equal."""
    write_pictures(tmp_path / "held", [(20, 24), (24, 20)])
    held = {"name": "held", "files": str(tmp_path / "held")}
    drawing = {"report_to": ["tensorboard"], "sample_steps": None}
    train(config(parts, tmp_path / "run", stage, trainer=drawing, data={"held_out": held}))
    train(config(parts, tmp_path / "bare", stage))
    sheets = sorted((tmp_path / "run" / "samples").iterdir())
    assert [file.name for file in sheets] == ["step-2.png", "step-4.png"]
    assert Image.open(sheets[0]).size[0] > 2 * 256 and not (tmp_path / "bare" / "samples").exists()
    assert losses(tmp_path / "run") == losses(tmp_path / "bare")
    events = b"".join(file.read_bytes() for file in (tmp_path / "run" / "tensorboard").rglob("events*"))
    assert events.count(b"samples") >= 2 and b"PNG" in events


# ---- the program


@pytest.mark.parametrize("stage", [1, 2])
def test_the_published_configurations_are_read(stage: int) -> None:
    """At the original sizes; what the paper gives is in them."""
    chosen = [f"{group}=stage{stage}" for group in ("model", "data", "trainer")]
    run = DetokenizerTask.read(compose([*chosen, "output_dir=x"], CONFIGS))
    assert run.model.stage == stage and run.trainer.max_steps == {1: 42000, 2: 30000}[stage]
    assert run.model.trained == {1: "key_value", 2: "all"}[stage] and run.model.tokens == 64
    assert run.optim.learning_rate == 1e-4 and run.optim.lr_scheduler_type == "cosine"
    assert any(source.condition_key for source in run.data.sources) == (stage == 2)
    assert {path.name for path in CONFIGS.iterdir()} == {"train.yaml", "model", "data", "optim", "trainer"}
