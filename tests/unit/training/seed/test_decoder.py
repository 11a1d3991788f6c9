"""Training of SEED's decoders: each class of denoisers and autoencoders, from parts or sizes."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_decoder
import torch
from PIL import Image
from tensors import equal
from tiny_decoder import FLOW, config, write_parts
from tiny_detokenizer import losses

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.models.seed.diffusion import CodesDetokenizer
from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.models.seed.train_detokenizer import SeedDecoderTask
from seed_multimodal.training.cli import compose, parse
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.weights import load_state_dict

SHORT = {"max_steps": 2, "save_steps": 0}
train = SeedDecoderTask.train


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return write_parts(tmp_path_factory.mktemp("decoder"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "decoder").rglob("*.safetensors"))
    return {
        f"{file.parent.name}.{name}": value
        for file in files
        for name, value in load_state_dict(file).items()
    }


def images_of(folder: Path, parts: Path, rows: list[int], **settings: Any) -> np.ndarray:
    """Images of the saved decoder for codes of these rows."""
    detokenizer = CodesDetokenizer.from_pretrained(folder / "decoder")
    tokenizer = Seed2Tokenizer.from_pretrained(parts / "tokenizer")
    decode = tokenizer.decode_tokens if detokenizer.reads_codes else tokenizer.decode
    codes = torch.randint(0, 16, (3, 32), generator=torch.Generator().manual_seed(0))
    seeds = [5, 6, 7]
    images = detokenizer(
        decode(codes[rows]),
        seeds=[seeds[row] for row in rows],
        num_inference_steps=3,
        **settings,
    )
    return np.stack([np.asarray(image, np.int32) for image in images])


@pytest.mark.parametrize("vae", ["kl", "kl16", "dc"])
@pytest.mark.parametrize("denoiser", tiny_decoder.DENOISERS)
def test_train_a_new_denoiser_of_each_class(parts: Path, tmp_path, denoiser, vae):
    """The saved decoder draws; an image does not depend on its batch."""
    record = train(config(parts, tmp_path / "run", vae, denoiser, trainer=SHORT))
    assert record["steps"] == 2 and record["decoder"] == str(tmp_path / "run" / "decoder")
    together = images_of(tmp_path / "run", parts, [0, 1, 2])
    assert together.shape == (3, 16, 16, 3)
    assert np.abs(images_of(tmp_path / "run", parts, [2])[0] - together[2]).max() <= 1
    fast = images_of(tmp_path / "run", parts, [0], preset="fast", guidance_scale=1.0)
    assert fast.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("reads", ["codes", "embedding"])
def test_train_continues_the_folders_denoiser(parts: Path, tmp_path, reads):
    """SDXL's U-Net with its own objective; then from the result, keys and values alone."""
    first = tmp_path / "first"
    train(config(parts, first, model={"reads": reads}, trainer=SHORT))
    start = {"reads": reads, "start": str(first / "decoder"), "trained": "key_value"}
    second = config(parts, tmp_path / "second", model=start, trainer=SHORT)
    train(second)
    before = weights(first)
    after = weights(tmp_path / "second")
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(".to_k." in name for name in moved)
    assert all(
        ".to_k." in name or ".to_v." in name or name.startswith("code_adapter.") for name in moved
    )
    assert images_of(tmp_path / "second", parts, [0, 1]).shape == (2, 16, 16, 3)
    other = "embedding" if reads == "codes" else "codes"
    second["model"]["reads"] = other
    with pytest.raises(ConfigError, match="its adapter has .*, but this run needs"):
        train({**second, "output_dir": str(tmp_path / "third")})


def test_start_from_a_result_keeps_its_scheduler_and_vae(parts: Path, tmp_path):
    """A flow with another autoencoder than that of `diffusion`."""
    first = tmp_path / "first"
    train(config(parts, first, "kl16", "SanaTransformer2DModel", trainer=SHORT))
    start = {"start": str(first / "decoder")}
    train(config(parts, tmp_path / "second", "kl", model=start, trainer=SHORT))
    for file in ("scheduler/scheduler_config.json", "vae/config.json"):
        before = (first / "decoder" / file).read_text()
        assert (tmp_path / "second" / "decoder" / file).read_text() == before


def test_images_are_resized_as_by_the_tokenizer(parts: Path, tmp_path):
    run = SeedDecoderTask.read(config(parts, tmp_path / "run"))
    with contextlib.closing(SeedDecoderTask(run, ProcessGroup(), torch.device("cpu"))) as task:
        task.prepare()
        preprocessing = task.tokenizer.visual_encoder.preprocessing
        image = Image.effect_noise((40, 40), 90).convert("RGB")
        pixels = task.view.encoder_image(image, (16, 16))
    assert torch.equal(pixels, preprocessing.read(image))


def test_train_resumes_exactly_and_draws_samples(parts: Path, tmp_path):
    """With averaged weights; samples do not change the losses."""
    changes: dict[str, Any] = {
        "model": {"dropout": 0.3},
        "trainer": {"max_steps": 4, "save_steps": 2, "ema": 0.5, "sample_steps": 2},
    }
    settings = config(parts, tmp_path / "run", "dc", "SanaTransformer2DModel", **changes)
    train(settings)
    uninterrupted = weights(tmp_path / "run")
    values = losses(tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "step-2.png").is_file()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    shutil.rmtree(tmp_path / "run" / "decoder")
    (tmp_path / "run" / "summary.json").unlink()
    train(settings)
    assert equal(weights(tmp_path / "run"), uninterrupted)
    assert losses(tmp_path / "run") == values and len(values) == 4


def test_samples_are_drawn_with_the_averaged_weights(parts: Path, tmp_path):
    """After the last step, the saved decoder draws the sample."""
    changes: dict[str, Any] = {
        "optim": {"learning_rate": 0.1},
        "trainer": {"max_steps": 3, "save_steps": 0, "ema": 0.999, "sample_steps": 3},
    }
    settings = config(parts, tmp_path / "run", "dc", "SanaTransformer2DModel", **changes)
    sample = tmp_path / "run" / "samples" / "step-3.png"
    train(settings)
    with_average = sample.read_bytes()
    # A run that begins with the result, and changes nothing.
    settings["model"]["start"] = str(tmp_path / "run" / "decoder")
    settings["optim"]["learning_rate"] = 0.0
    settings["trainer"]["ema"] = 0.0
    train({**settings, "output_dir": str(tmp_path / "still")})
    assert (tmp_path / "still" / "samples" / "step-3.png").read_bytes() == with_average


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"data": {"encoder_size": 16}}, ConfigError, "the tokenizer expects 32 pixels"),
        ({"data": {"resolution": 20}}, ConfigError, "must be multiples of 8 pixels, not"),
        (
            {"model": {"denoiser": {"_class_name": "SanaTransformer3DModel"}}},
            ConfigError,
            r"model.denoiser: _class_name is 'SanaTransformer3DModel' \(did you mean",
        ),
        (
            {"model": {"denoiser": {"num_layer": 2}}},
            ConfigError,
            r"model.denoiser: unknown key 'num_layer' \(did you mean 'num_layers'",
        ),
        (
            {"model": {"denoiser": {"sample_size": "x"}}},
            ConfigError,
            "model.denoiser: SanaTransformer2DModel cannot have these sizes",
        ),
        (
            {"model": {"scheduler": {"_class_name": "DDIMScheduler", "prediction_type": "sample"}}},
            ConfigError,
            "no training objective for prediction_type 'sample'",
        ),
        (
            {"model": {"scheduler": {"_class_name": "FlowMatchEulerScheduler"}}},
            CheckpointError,
            r"model.scheduler: _class_name is 'FlowMatchEulerScheduler' \(did you mean",
        ),
        ({"model": {"tokenizer": "/nowhere"}}, CheckpointError, "/nowhere"),
    ],
)
def test_train_with_settings_that_do_not_fit(parts: Path, tmp_path, changes, error, sentence):
    settings = config(parts, tmp_path / "run", "kl", "SanaTransformer2DModel")
    for group, values in changes.items():
        for key, value in values.items():
            if key == "scheduler":
                settings[group][key] = value
            elif isinstance(value, dict):
                settings[group][key] |= value
            else:
                settings[group][key] = value
    with pytest.raises(error, match=sentence):
        train(settings)


def test_configurations_of_the_group():
    for name in ("sdxl", "sana", "nano"):
        arguments = [f"model={name}", f"data={name}", "output_dir=run"]
        read = SeedDecoderTask.read(compose(parse(arguments), tiny_decoder.CONFIGS))
        assert read.model.reads == "codes"
    assert read.model.scheduler["_class_name"] == FLOW["_class_name"]
