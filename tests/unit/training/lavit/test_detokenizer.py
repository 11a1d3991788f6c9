"""Training of LaVIT's pixel decoders: both kinds, from real images of several sizes; resumed, drawn with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_detokenizer import losses
from tiny_lavit import tiny_tokenizer
from tiny_lavit_training import CONFIGS, code_decoder, config, write_parts
from torch import Tensor, nn

from seed_multimodal.diffusion.training import size_ids
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.lavit.checkpoints import save_dynamic_tokenizer
from seed_multimodal.lavit.decoder import CodeDecoder
from seed_multimodal.lavit.diffusion import LavitDetokenizer
from seed_multimodal.lavit.training import HEADS, LavitPixelLoss, TrainedPixels
from seed_multimodal.training.lavit.detokenizer import LavitPixelTask, image_codes
from seed_multimodal.training.llm.cli import compose
from seed_multimodal.weights import load_state_dict, save_state_dict

CPU = torch.device("cpu")
SHORT = {"max_steps": 2, "save_steps": 0}
train = LavitPixelTask.train


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("lavit_pixels"))


def result(run: Path) -> dict[str, Tensor]:
    files = (run / "pixels").rglob("*.safetensors")
    return {f"{file.parent.name}.{name}": value for file in files for name, value in load_state_dict(file).items()}


# ---- what is learned


@pytest.mark.slow
@pytest.mark.parametrize("head", ["highres", "lowres"])
def test_a_pixel_decoder_is_trained_and_draws(parts: Path, tmp_path: Path, head: Any) -> None:
    """From one code decoder for both; heads and U-Net are trained, nothing before them is."""
    record = train(config(parts, tmp_path / "run", head, trainer=SHORT))
    assert record["steps"] == 2 and record["pixels"] == str(tmp_path / "run" / "pixels")
    decoder = CodeDecoder.from_pretrained(tmp_path / "run" / "pixels" / "decoder")
    assert decoder.config.head == head
    start = code_decoder().state_dict()
    same = {name for name, value in decoder.state_dict().items() if torch.equal(value, start.get(name, torch.ones(0)))}
    same -= {"unet_attnpool.k_proj.bias"}  # moves all scores alike
    assert same == {name for name in start if not name.startswith(HEADS)}
    moved, unet = (LavitDetokenizer.load_part(place, "unet") for place in (tmp_path / "run" / "pixels", parts / head))
    assert not any(torch.equal(a, b) for a, b in zip(moved.parameters(), unet.parameters(), strict=True))
    pixels = LavitDetokenizer.from_pretrained(tmp_path / "run" / "pixels", decoder)
    images = pixels([torch.randn(n, 4) for n in (3, 9)], height=16, width=24, num_inference_steps=2)
    assert [image.size for image in images] == [(24, 16)] * 2


@pytest.mark.slow
def test_the_loss_falls_and_a_run_continues_from_a_result(parts: Path, tmp_path: Path) -> None:
    """By Muon, as nano's recipes; keys and values alone; a second run begins where the first ended."""
    noisy = {"selection": "threshold", "dropout": 0.0}
    train(config(parts, tmp_path / "one", model=noisy, optim={"name": "muon", "learning_rate": 0.01},
                                   trainer={"max_steps": 20, "save_steps": 0}))
    made = losses(tmp_path / "one")
    assert sum(made[-6:]) < 0.9 * sum(made[:6])
    more = {**noisy, "start": str(tmp_path / "one" / "pixels"), "trained": "key_value"}
    train(config(parts, tmp_path / "two", model=more, trainer=SHORT))
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    moved = {name for name, value in two.items() if not torch.equal(value, one[name])}
    assert moved and all(".to_k." in name or ".to_v." in name or name.startswith("decoder.unet_") for name in moved)


class Recorder(nn.Module):
    """In the place of `TrainedPixels`: keeps who is without conditions."""

    def forward(self, noisy: Tensor, steps: Tensor, rows: Any, ids: Tensor, without: Tensor) -> Tensor:
        self.without = without
        return torch.zeros_like(noisy, requires_grad=True)


def test_the_share_without_conditions() -> None:
    from diffusers import DDPMScheduler

    watched, schedule = Recorder(), DDPMScheduler()
    loss = LavitPixelLoss(dropout=0.2)
    made = loss(watched, schedule, torch.zeros(4000, 1, 1, 1), [], torch.zeros(4000, 6),
                generator=torch.Generator().manual_seed(0))
    assert abs(watched.without.float().mean() - 0.2) < 0.02 and made["mse"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("head", ["highres", "lowres"])
@torch.no_grad()
def test_without_conditions_it_is_the_unconditional_half_of_drawing(parts: Path, head: Any) -> None:
    """The same prediction as the drawing program's for what it steers away from, whatever the codes; with conditions
    the codes count."""
    pixels, decoder = LavitDetokenizer.from_pretrained(parts / head), code_decoder(head)
    if head == "lowres":
        decoder.unet_proj = nn.Linear(decoder.config.feature_dim, 16)
        decoder.config = decoder.config.__class__(**{**vars(decoder.config), "prompt_dim": 16})
    model = TrainedPixels(pixels.unet, decoder, pixels.null_embeds).eval()
    noisy, steps, ids = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), size_ids((16, 16), count=2)
    rows = [[torch.randn(n, 4) for n in lengths] for lengths in ((2, 7), (5, 16))]
    without = torch.tensor([True, False])
    made = [model(noisy, steps, one, ids, without) for one in rows]
    torch.testing.assert_close(made[0][0], made[1][0])
    assert not torch.allclose(made[0][1], made[1][1], atol=1e-4)
    asked: list[dict[str, Any]] = []
    model.unet.register_forward_pre_hook(lambda module, given, options: asked.append(dict(options)), with_kwargs=True)
    pixels.decoder = decoder
    pixels(rows[0], num_inference_steps=1, guidance_scale=3.0)
    wanted = model.unet(noisy.repeat(2, 1, 1, 1), steps.repeat(2), **asked[0]).sample
    torch.testing.assert_close(wanted[0], made[0][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(wanted[3], made[0][1], atol=1e-5, rtol=1e-4)


# ---- codes


def test_a_images_codes_are_its_own() -> None:
    """Drawn patches follow from the image, in any batch; another seed or rule has other codes."""
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    tokenizer = tiny_tokenizer()
    made = image_codes(tokenizer, pixels)
    assert made.shape == (5, 16) and made.dtype == torch.int32
    kept = (made >= 0).sum(1)
    assert 1 <= kept.min() < kept.max() and all((row[:n] >= 0).all() for row, n in zip(made, kept, strict=True))
    assert torch.equal(image_codes(tokenizer, pixels.flip(0)).flip(0), made)
    for other in (image_codes(tokenizer, pixels, seed=1), image_codes(tokenizer, pixels, "threshold")):
        assert not torch.equal(other, made)


# ---- the program


@pytest.mark.parametrize(("changes", "error", "said"), [
    ({"data": {"sizes": [[16, 4]]}}, ConfigError, "sizes are heights and widths of at least 8 pixels"),
    ({"data": {"tower_size": 32}}, ConfigError, "tower_size is 32, but the tokenizer expects 16 pixels a side"),
    ({"model": {"diffusion": "/nowhere"}}, CheckpointError, "/nowhere(/unet)?: no such folder"),
])
def test_settings_that_cannot_be(parts: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception],
                                 said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        train(config(parts, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_does_not_continue_with_other_codes(parts: Path, tmp_path: Path) -> None:
    """Another tokenizer or autoencoder in the same folder; the same ones in another may."""
    for name in ("tokenizer", "highres", "decoder", "pictures"):
        shutil.copytree(parts / name, tmp_path / "one" / name)
    changes: dict[str, Any] = {"trainer": {**SHORT, "max_steps": 1}}
    train(config(tmp_path / "one", tmp_path / "run", **changes))
    (tmp_path / "one").rename(tmp_path / "two")
    changes["trainer"]["max_steps"] = 2
    vae = tmp_path / "two" / "highres" / "vae" / "diffusion_pytorch_model.safetensors"
    whole = load_state_dict(vae)
    save_state_dict({name: value + 0.5 for name, value in whole.items()}, vae)
    with pytest.raises(CheckpointError, match="was trained with another autoencoder"):
        train(config(tmp_path / "two", tmp_path / "run", **changes))
    save_state_dict(whole, vae)
    assert train(config(tmp_path / "two", tmp_path / "run", **changes))["steps"] == 2
    save_dynamic_tokenizer(tiny_tokenizer(1), tmp_path / "two" / "tokenizer")
    changes["trainer"]["max_steps"] = 3
    with pytest.raises(CheckpointError, match="was trained with another tokenizer; use the same"):
        train(config(tmp_path / "two", tmp_path / "run", **changes))


def test_a_result_that_is_not_finished_leaves_the_one_before(parts: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on ends between the U-Net's file and the decoder's."""
    train(config(parts, tmp_path / "run", trainer={**SHORT, "max_steps": 1}))
    before = result(tmp_path / "run")

    def ends(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CodeDecoder, "save_pretrained", ends)
    with pytest.raises(KeyboardInterrupt):
        train(config(parts, tmp_path / "run", trainer=SHORT))
    now = result(tmp_path / "run")
    assert now.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in now.items())


@pytest.mark.parametrize("kind", ["highres", "lowres"])
def test_the_recipes_are_read(kind: str) -> None:
    chosen = [f"{group}={kind}" for group in ("model", "data", "trainer")]
    run = LavitPixelTask.read(compose([*chosen, "output_dir=x"], CONFIGS))
    assert run.trainer.max_steps == 20000 and run.data.tower_size == 224 and run.model.trained == "all"
    assert len(run.data.sizes) == (6 if kind == "highres" else 0) and run.data.view.seen_by == "bicubic"


