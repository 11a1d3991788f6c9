"""Training of SEED-X's de-tokenizer: both stages on a tiny SDXL."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_sdxl
import torch
from llm_runs import write_json_lines
from PIL import Image
from tiny_detokenizer import CONFIGS, config, losses, write_images, write_parts

from seed_multimodal.errors import CheckpointError, ConfigError, DataError
from seed_multimodal.images.transforms import normalise
from seed_multimodal.models.seed_x.adapter import SDXLAdapter
from seed_multimodal.models.seed_x.diffusion import SdxlDetokenizer
from seed_multimodal.models.seed_x.train_detokenizer import (
    DetokenizerTask,
    build_adapter,
    pooled_features,
)
from seed_multimodal.nn.vision.qwen import QwenVit
from seed_multimodal.training.cli import compose, parse
from seed_multimodal.training.frozen_models import FrozenFeatures
from seed_multimodal.training.pixel_decoder.task import (
    ImageEncoders,
    latent_moments,
    sample_latents,
)
from seed_multimodal.weights import load_state_dict

CPU = torch.device("cpu")
train = DetokenizerTask.train


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return write_parts(tmp_path_factory.mktemp("detokenizer"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_train_of_each_stage_saves_an_adapter_that_draws(parts: Path, tmp_path, stage):
    record = train(config(parts, tmp_path / "run", stage, trainer={"max_steps": 2}))
    assert record["steps"] == 2 and record["samples_per_step"] == 4
    adapter = SDXLAdapter.from_pretrained(tmp_path / "run" / "adapter", parts / "sdxl")
    assert adapter.reads_condition == (stage == 2)
    start = tiny_sdxl.unet().state_dict()
    moved = {
        name
        for name, value in adapter.unet.state_dict().items()
        if name != "conv_in.weight" and not torch.equal(value, start[name])
    }
    assert moved - {"conv_in.bias"} and all(
        "to_k" in name or "to_v" in name for name in moved - {"conv_in.bias"}
    )
    assert ("conv_in.bias" in moved) == (stage == 2)
    detokenizer = SdxlDetokenizer.from_pretrained(parts / "sdxl", tmp_path / "run" / "adapter")
    detokenizer.set_null_embeds(QwenVit.from_pretrained(parts / "vision"), 16)
    images = detokenizer(
        torch.randn(2, 16, tiny_sdxl.WIDTH), num_inference_steps=2, height=16, width=16
    )
    assert [image.size for image in images] == [(16, 16)] * 2


@pytest.mark.slow
def test_stage_2_starts_from_the_adapter_of_stage_1(parts: Path, tmp_path):
    """With eight input channels it predicts the same; the resampler's sizes are the adapter's."""
    train(config(parts, tmp_path / "one", trainer={"max_steps": 1}))
    start = {"start": str(tmp_path / "one" / "adapter"), "trained": "all"}
    record = train(
        config(
            parts,
            tmp_path / "two",
            2,
            model=start,
            trainer={"max_steps": 1},
            optim={"learning_rate": 0.0},
        )
    )
    first, second = (
        SDXLAdapter.from_pretrained(folder, parts / "sdxl")
        for folder in (tmp_path / "one" / "adapter", record["adapter"])
    )
    inputs = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([1, 500]),
        torch.randn(2, 4, tiny_sdxl.WIDTH),
        torch.zeros(2, 6),
    )
    with torch.no_grad():
        torch.testing.assert_close(first(*inputs), second(*inputs, torch.randn(2, 4, 8, 8)))


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (
            {"data": {"encoder_size": 32}},
            ConfigError,
            "encoder_size is 32, but the vision encoder expects 16 pixels",
        ),
        (
            {"model": {"tokens": 5}},
            ConfigError,
            "The encoder's 16 embeddings cannot be pooled to 5",
        ),
        (
            {"model": {"visual_encoder": "/nowhere"}},
            CheckpointError,
            "no such folder; SEED-X's vision encoder",
        ),
        (
            {"model": {"sdxl": "/nowhere"}},
            CheckpointError,
            "seed fetch sdxl downloads stabilityai/",
        ),
    ],
)
def test_train_with_parts_that_do_not_fit(parts: Path, tmp_path, changes, error, sentence):
    with pytest.raises(error, match=sentence):
        train(config(parts, tmp_path / "run", **changes))


def test_image_features_under_autocast(parts: Path):
    """The VAE stays in float32, and a condition's latents are its means, not scaled."""
    vae = SdxlDetokenizer.load_part(parts / "sdxl", "vae")
    encoder = QwenVit.from_pretrained(parts / "vision")
    frozen = FrozenFeatures(
        encoder, CPU, lambda pixels: pooled_features(encoder, normalise(pixels), 4)
    )
    batch: dict[str, Any] = {
        name: torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
        for name in ("encoder_image", "image", "condition")
    }
    with torch.autocast("cpu", torch.bfloat16):
        encoded = ImageEncoders(frozen, latent_moments(vae, CPU))(
            {**batch, "conditioned": torch.tensor([True, False, True])}
        )
    with torch.no_grad():
        image = vae.encode(batch["image"].float() / 127.5 - 1).latent_dist
        condition = vae.encode(batch["condition"].float() / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(encoded.moments, image.parameters)
    torch.testing.assert_close(encoded.condition_latents[[0, 2]], condition[[0, 2]])
    assert not encoded.condition_latents[1].any()
    assert encoded.conditions.shape == (3, 4, tiny_sdxl.WIDTH)
    torch.manual_seed(0)
    latents = torch.stack([sample_latents(encoded.moments, 0.5) for _ in range(400)])
    torch.testing.assert_close(latents.mean(0), 0.5 * image.mean, atol=0.2, rtol=0.1)
    torch.testing.assert_close(latents.std(0), 0.5 * image.std, atol=0.05, rtol=0.2)


@pytest.mark.slow
def test_train_skips_unreadable_images(parts: Path, tmp_path, capsys):
    folder = tmp_path / "pictures"
    shutil.copytree(parts / "pictures", folder)
    (folder / "3.png").write_bytes(b"no image")
    sources = [{"name": "pictures", "files": str(folder)}]
    record = train(config(parts, tmp_path / "run", data={"sources": sources}))
    assert record["bad_samples"] == 1 and re.search(r"skipped: .*3\.png", capsys.readouterr().out)
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="consecutive samples from index . on are unusable"):
        train(config(parts, tmp_path / "empty", data={"sources": sources}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [{"source_image": "before/0.png"}, {"target_image": "after/0.png"}]
)
def test_train_skips_edits_with_one_image(line, parts: Path, tmp_path, capsys):
    """Training fails if no line has both images."""
    edits = [{"source_image": f"before/{n}.png", "target_image": f"after/{n}.png"} for n in (1, 2)]
    write_json_lines(tmp_path / "edits.jsonl", [*edits, line])
    source = {
        "name": "mine",
        "files": str(tmp_path / "edits.jsonl"),
        "image_root": str(parts),
        "image_key": "target_image",
        "condition_key": "source_image",
    }
    settings = config(
        parts, tmp_path / "run", 2, data={"sources": [source]}, trainer={"max_steps": 2}
    )
    record = train(settings)
    output = capsys.readouterr().out
    assert record["bad_samples"] == 1 and output.count("skipped: ") == 1 and "edits.jsonl" in output
    write_json_lines(tmp_path / "edits.jsonl", [line] * 3)
    with pytest.raises(
        DataError, match="consecutive samples|has no image: nothing under key|is 4, not a path"
    ):
        train({**settings, "output_dir": str(tmp_path / "none")})


@pytest.mark.slow
def test_train_with_ema_saves_averaged_weights(parts: Path, tmp_path):
    """The adapter is the moving average over the checkpoints.

    Averaging leaves the losses unchanged.
    """
    settings = config(
        parts, tmp_path / "run", trainer={"max_steps": 3, "save_steps": 1, "ema": 0.5}
    )
    train(settings)
    train(config(parts, tmp_path / "bare", trainer={"max_steps": 3, "save_steps": 1}))
    assert losses(tmp_path / "run") == losses(tmp_path / "bare")
    expected = dict(build_adapter(DetokenizerTask.read(settings).model).state_dict())
    for step in (1, 2, 3):
        now = load_state_dict(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        decay = min(0.5, step / (9 + step))
        expected |= {
            name: decay * expected[name] + (1 - decay) * value for name, value in now.items()
        }
    averaged, last = (
        load_state_dict(tmp_path / run / "adapter" / "model.safetensors") for run in ("run", "bare")
    )
    for name, value in averaged.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    assert any(not torch.equal(value, last[name]) for name, value in averaged.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_train_draws_held_out_images_at_each_checkpoint(parts: Path, tmp_path, stage):
    """Next to the originals and to TensorBoard; the losses are unchanged."""
    write_images(tmp_path / "held", [(20, 24), (24, 20)])
    sample_source = {"name": "held", "files": str(tmp_path / "held")}
    steps = {"max_steps": 2, "save_steps": 1}
    train(
        config(
            parts,
            tmp_path / "run",
            stage,
            data={"held_out": sample_source},
            trainer={**steps, "report_to": ["tensorboard"], "sample_steps": None},
        )
    )
    train(config(parts, tmp_path / "bare", stage, trainer=steps))
    sheets = sorted((tmp_path / "run" / "samples").iterdir())
    assert [file.name for file in sheets] == ["step-1.png", "step-2.png"]
    assert Image.open(sheets[0]).size[0] > 2 * 256 and not (tmp_path / "bare" / "samples").exists()
    assert losses(tmp_path / "run") == losses(tmp_path / "bare")
    events = b"".join(
        file.read_bytes() for file in (tmp_path / "run" / "tensorboard").rglob("events*")
    )
    assert events.count(b"samples") >= 2 and b"PNG" in events


@pytest.mark.parametrize("stage", [1, 2])
def test_configurations_have_the_papers_values(stage):
    groups = [f"{group}=stage{stage}" for group in ("model", "data", "trainer")]
    run = DetokenizerTask.read(compose(parse([*groups, "output_dir=x"]), CONFIGS))
    assert run.model.stage == stage and run.trainer.max_steps == {1: 42000, 2: 30000}[stage]
    assert run.model.trained == {1: "key_value", 2: "all"}[stage] and run.model.tokens == 64
    assert run.optim.learning_rate == 1e-4 and run.optim.lr_scheduler_type == "cosine"
    assert any(source.condition_key for source in run.data.sources) == (stage == 2)
