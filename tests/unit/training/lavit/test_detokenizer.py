"""Training of LaVIT's pixel decoders, both kinds, on images of several sizes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from tensors import equal
from tiny_detokenizer import losses
from tiny_lavit import TINY, spread, tiny_tokenizer
from tiny_lavit_training import CONFIGS, code_decoder, config, write_parts
from tiny_vision import write_vision
from torch import Tensor, nn

from seed_multimodal.diffusion.objectives import build_objective
from seed_multimodal.diffusion.training import size_ids
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.models.lavit.checkpoints import save_dynamic_tokenizer
from seed_multimodal.models.lavit.decoder import CodeDecoder
from seed_multimodal.models.lavit.diffusion import LavitDetokenizer
from seed_multimodal.models.lavit.losses import HEADS, LavitPixelLoss, TrainedPixels
from seed_multimodal.models.lavit.modeling import DynamicTokenizer
from seed_multimodal.models.lavit.train_pixels import LavitPixelTask, image_codes
from seed_multimodal.models.seed.checkpoints import load_vision
from seed_multimodal.nn.vision.hub import HubVisionConfig
from seed_multimodal.training.cli import compose, parse
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.weights import load_state_dict, save_state_dict

SHORT = {"max_steps": 2, "save_steps": 0}
train = LavitPixelTask.train


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return write_parts(tmp_path_factory.mktemp("lavit_pixels"))


def result(run: Path) -> dict[str, Tensor]:
    files = (run / "pixels").rglob("*.safetensors")
    return {
        f"{file.parent.name}.{name}": value
        for file in files
        for name, value in load_state_dict(file).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("head", ["highres", "lowres"])
def test_train_saves_a_pixel_decoder_that_draws(parts: Path, tmp_path, head):
    """Heads and U-Net are trained, the code decoder's other weights are frozen."""
    record = train(config(parts, tmp_path / "run", head, trainer=SHORT))
    assert record["steps"] == 2 and record["pixels"] == str(tmp_path / "run" / "pixels")
    decoder = CodeDecoder.from_pretrained(tmp_path / "run" / "pixels" / "decoder")
    assert decoder.config.head == head
    start = code_decoder().state_dict()
    frozen = {
        name
        for name, value in decoder.state_dict().items()
        if torch.equal(value, start.get(name, torch.ones(0)))
    }
    frozen -= {"unet_attnpool.k_proj.bias"}  # its gradient is zero
    assert frozen == {name for name in start if not name.startswith(HEADS)}
    moved, unet = (
        LavitDetokenizer.load_part(saved, "unet")
        for saved in (tmp_path / "run" / "pixels", parts / head)
    )
    assert not any(
        torch.equal(a, b) for a, b in zip(moved.parameters(), unet.parameters(), strict=True)
    )
    pixels = LavitDetokenizer.from_pretrained(tmp_path / "run" / "pixels", decoder)
    images = pixels([torch.randn(n, 4) for n in (3, 9)], height=16, width=24, num_inference_steps=2)
    assert [image.size for image in images] == [(24, 16)] * 2


@pytest.mark.slow
def test_train_lowers_the_loss_and_starts_from_a_result(parts: Path, tmp_path):
    """With Muon, as in nano's configurations; the second run trains keys and values alone."""
    noisy = {"selection": "threshold", "dropout": 0.0}
    train(
        config(
            parts,
            tmp_path / "one",
            model=noisy,
            optim={"name": "muon", "learning_rate": 0.01},
            trainer={"max_steps": 20, "save_steps": 0},
        )
    )
    curve = losses(tmp_path / "one")
    assert sum(curve[-6:]) < 0.9 * sum(curve[:6])
    start = {**noisy, "start": str(tmp_path / "one" / "pixels"), "trained": "key_value"}
    train(config(parts, tmp_path / "two", model=start, trainer=SHORT))
    before = result(tmp_path / "one")
    after = result(tmp_path / "two")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved and all(
        ".to_k." in name or ".to_v." in name or name.startswith("decoder.unet_") for name in moved
    )


def test_start_from_a_result_keeps_its_scheduler(parts: Path, tmp_path):
    train(config(parts, tmp_path / "one", "lowres", trainer=SHORT))
    start = tmp_path / "one" / "pixels"
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    scheduler.save_pretrained(start / "scheduler")
    train(config(parts, tmp_path / "two", "lowres", model={"start": str(start)}, trainer=SHORT))
    saved = LavitDetokenizer.load_part(tmp_path / "two" / "pixels", "scheduler")
    assert saved.config.prediction_type == "v_prediction"


class Recorder(nn.Module):
    """In place of `TrainedPixels`: stores which samples have no conditions."""

    def forward(
        self, noisy: Tensor, steps: Tensor, rows: Any, ids: Tensor, without: Tensor
    ) -> Tensor:
        self.without = without
        return torch.zeros_like(noisy, requires_grad=True)


def test_pixel_loss_drops_a_share_of_the_conditions():
    model = Recorder()
    values = LavitPixelLoss(dropout=0.2)(
        model,
        build_objective(DDPMScheduler()),
        torch.zeros(4000, 1, 1, 1),
        [],
        torch.zeros(4000, 6),
        generator=torch.Generator().manual_seed(0),
    )
    assert abs(model.without.float().mean() - 0.2) < 0.02 and values["mse"] == pytest.approx(
        1, abs=0.1
    )


@pytest.mark.parametrize("head", ["highres", "lowres"])
@torch.no_grad()
def test_predictions_without_conditions_are_those_of_guidance(parts: Path, head):
    """Without conditions the codes do not count, and the prediction is the unconditional one of
    drawing.
    """
    pixels = LavitDetokenizer.from_pretrained(parts / head)
    decoder = code_decoder(head)
    if head == "lowres":
        decoder.unet_proj = nn.Linear(decoder.config.feature_dim, 16)
        decoder.config = dataclasses.replace(decoder.config, prompt_dim=16)
    model = TrainedPixels(pixels.unet, decoder, pixels.null_embeds).eval()
    noisy = torch.randn(2, 4, 8, 8)
    steps = torch.tensor([3, 700])
    ids = size_ids((16, 16), count=2)
    batches = [[torch.randn(n, 4) for n in lengths] for lengths in ((2, 7), (5, 16))]
    first, second = (
        model(noisy, steps, codes, ids, torch.tensor([True, False])) for codes in batches
    )
    torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1], atol=1e-4)
    calls: list[dict[str, Any]] = []
    model.unet.register_forward_pre_hook(
        lambda _module, _args, options: calls.append(dict(options)), with_kwargs=True
    )
    pixels.decoder = decoder
    pixels(batches[0], num_inference_steps=1, guidance_scale=3.0)
    prediction = model.unet(noisy.repeat(2, 1, 1, 1), steps.repeat(2), **calls[0]).sample
    torch.testing.assert_close(prediction[0], first[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(prediction[3], first[1], atol=1e-5, rtol=1e-4)


def test_image_codes_depend_on_the_image_and_the_seed_only():
    """Not on the batch; another seed or selection rule gives other codes."""
    pixels = torch.randint(
        0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    tokenizer = tiny_tokenizer()
    codes = image_codes(tokenizer, pixels)
    assert codes.shape == (5, 16) and codes.dtype == torch.int32
    counts = (codes >= 0).sum(1)
    assert 1 <= counts.min() < counts.max() and all(
        (row[:n] >= 0).all() for row, n in zip(codes, counts, strict=True)
    )
    assert torch.equal(image_codes(tokenizer, pixels.flip(0)).flip(0), codes)
    for other in (
        image_codes(tokenizer, pixels, seed=1),
        image_codes(tokenizer, pixels, "threshold"),
    ):
        assert not torch.equal(other, codes)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (
            {"data": {"sizes": [[16, 4]]}},
            ConfigError,
            "sizes are heights and widths of at least 8 pixels",
        ),
        (
            {"data": {"encoder_size": 32}},
            ConfigError,
            "encoder_size is 32, but the tokenizer expects 16 pixels a side",
        ),
        ({"model": {"diffusion": "/nowhere"}}, CheckpointError, "/nowhere(/unet)?: no such folder"),
    ],
)
def test_train_with_settings_that_do_not_fit(parts: Path, tmp_path, changes, error, sentence):
    with pytest.raises(error, match=sentence):
        train(config(parts, tmp_path / "run", **changes))


@pytest.mark.slow
def test_resume_with_another_tokenizer_or_vae_fails(parts: Path, tmp_path):
    """The same models in another folder are accepted."""
    for name in ("tokenizer", "highres", "decoder", "pictures"):
        shutil.copytree(parts / name, tmp_path / "one" / name)

    def train_to(steps: int, folder: str) -> dict[str, Any]:
        return train(
            config(tmp_path / folder, tmp_path / "run", trainer={**SHORT, "max_steps": steps})
        )

    train_to(1, "one")
    (tmp_path / "one").rename(tmp_path / "two")
    vae = tmp_path / "two" / "highres" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_state_dict(vae)
    save_state_dict({name: value + 0.5 for name, value in weights.items()}, vae)
    with pytest.raises(CheckpointError, match="was trained with another autoencoder"):
        train_to(2, "two")
    save_state_dict(weights, vae)
    assert train_to(2, "two")["steps"] == 2
    save_dynamic_tokenizer(tiny_tokenizer(1), tmp_path / "two" / "tokenizer")
    with pytest.raises(CheckpointError, match="was trained with another tokenizer; use the same"):
        train_to(3, "two")


def test_train_interrupted_while_saving_leaves_the_previous_result(
    parts: Path, tmp_path, monkeypatch
):
    """Interrupted between the files of U-Net and decoder."""
    train(config(parts, tmp_path / "run", trainer={**SHORT, "max_steps": 1}))
    before = result(tmp_path / "run")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CodeDecoder, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config(parts, tmp_path / "run", trainer=SHORT))
    after = result(tmp_path / "run")
    assert after.keys() == before.keys() and equal(after, before)


@pytest.mark.parametrize("kind", ["highres", "lowres"])
def test_configurations_are_read(kind):
    groups = [f"{group}={kind}" for group in ("model", "data", "trainer")]
    run = LavitPixelTask.read(compose(parse([*groups, "output_dir=x"]), CONFIGS))
    assert (
        run.trainer.max_steps == 20000
        and run.data.encoder_size == 224
        and run.model.trained == "all"
    )
    assert len(run.data.sizes) == (6 if kind == "highres" else 0)


def test_codes_are_of_the_vision_encoders_preprocessing(parts: Path, tmp_path):
    write_vision("siglip2", tmp_path / "vision")
    vit = HubVisionConfig(path=str(tmp_path / "vision"))
    torch.manual_seed(0)
    tokenizer = spread(DynamicTokenizer(dataclasses.replace(TINY, vit=vit, vit_head=0))).eval()
    load_vision(tokenizer.encoder, tmp_path / "vision", None)
    save_dynamic_tokenizer(tokenizer, tmp_path / "tokenizer")
    model = {"tokenizer": str(tmp_path / "tokenizer"), "selection": "threshold"}
    run = LavitPixelTask.read(config(parts, tmp_path / "run", model=model))
    task = LavitPixelTask(run, ProcessGroup(), torch.device("cpu"))
    task.prepare()
    assert task.view.encoder_interpolation == "bilinear"
    pixels = task.batches.at(0)[0]["encoder_image"]
    codes = task.encoders.conditions(pixels)
    assert codes.shape == (len(pixels), tokenizer.n_patches)
    expected = tokenizer.encode(vit.preprocessing.normalise(pixels), mode="threshold")
    for row, expected_row in zip(codes, expected, strict=True):
        assert row[row >= 0].tolist() == expected_row.tolist()

    # EVA's are bicubic.
    task = LavitPixelTask(
        LavitPixelTask.read(config(parts, tmp_path / "run")), ProcessGroup(), torch.device("cpu")
    )
    task.prepare()
    assert task.view.encoder_interpolation == "bicubic"
