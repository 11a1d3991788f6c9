"""SdxlDetokenizer: both stages against diffusers' own loops, batches and seeds, conditions, guidance, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sdxl
import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.detokenizers.sdxl import SdxlDefaults, SdxlDetokenizer, pooled_tokens
from seed_multimodal.errors import CheckpointError, ConfigError

W = tiny_sdxl.WIDTH
QUICK: dict[str, Any] = {"num_inference_steps": 3}
NOTHING = torch.zeros(1, 16, W)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sdxl` and the adapters `first` and `second`."""
    place = tmp_path_factory.mktemp("seedx")
    tiny_sdxl.sdxl_folder(place / "sdxl")
    tiny_sdxl.adapter(1).save_pretrained(place / "first")
    tiny_sdxl.adapter(2).save_pretrained(place / "second")
    return place


def _open(place: Path, stage: str) -> SdxlDetokenizer:
    made = SdxlDetokenizer.from_pretrained(place / "sdxl", place / stage)
    made.look_at_nothing(tiny_sdxl.Tower(), 16)
    return made


@pytest.fixture(scope="module")
def first(place: Path) -> SdxlDetokenizer:
    return _open(place, "first")


@pytest.fixture(scope="module")
def second(place: Path) -> SdxlDetokenizer:
    return _open(place, "second")


@pytest.fixture
def embeds() -> Tensor:
    return torch.randn(3, 4, W, generator=torch.Generator().manual_seed(3)) * 2


def _picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _pixels(pictures: list) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=np.int32) for picture in pictures])


def _latents(model: SdxlDetokenizer, embeds: Tensor, **options: Any) -> Tensor:
    return torch.stack(list(model.decode(embeds, output_type="latent", **{**QUICK, **options})))


# ---- what is drawn


def test_the_first_stage_is_the_stock_pipeline(place: Path, first: SdxlDetokenizer, embeds: Tensor) -> None:
    """Also: 50 steps and guidance 7.5 are the defaults, and guidance steers away from an empty picture."""
    from diffusers import StableDiffusionXLPipeline

    stock = StableDiffusionXLPipeline.from_pretrained(str(place / "sdxl"), unet=first.adapter.unet,
                                                     add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    with torch.no_grad():
        prompt, pooled = first.adapter.resampler(embeds[:1])
        tower = tiny_sdxl.Tower()
        nothing = tower(torch.zeros(1, 3, 16, 16))
        no_prompt, no_pooled = first.adapter.resampler(nothing.unflatten(1, (4, 4)).mean(2))
    arguments = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled, "negative_prompt_embeds": no_prompt,
                 "negative_pooled_prompt_embeds": no_pooled}
    assert first.defaults == SdxlDefaults(50, 7.5, None, 1.5)
    expected = stock(**arguments, num_inference_steps=50, guidance_scale=7.5, generator=_generators(5)).images
    assert np.abs(_pixels(first.decode(embeds[:1], generator=_generators(5))) - _pixels(expected)).max() <= 1
    plain = stock(prompt_embeds=prompt, pooled_prompt_embeds=pooled, guidance_scale=1.0, generator=_generators(5),
                  height=24, width=32, **QUICK).images
    mine = first.decode(embeds[:1], guidance_scale=1.0, generator=_generators(5), height=24, width=32, **QUICK)
    assert mine[0].size == (32, 24) and np.abs(_pixels(mine) - _pixels(plain)).max() <= 1


def _by_hand(model: SdxlDetokenizer, embeds: Tensor, source: Tensor, start: Tensor, guidance: float,
             by_image: float) -> Tensor:
    """The released loop: three runs at each step, estimated pictures combined, converted back into noise."""
    scheduler, adapter = model.pipeline.scheduler, model.adapter
    scheduler.set_timesteps(3)
    latents, ids = start * scheduler.init_noise_sigma, torch.tensor([[16.0, 16, 0, 0, 16, 16]])
    negatives = pooled_tokens(model.empty_features, embeds.shape[1])  # type: ignore[arg-type]
    runs = ((embeds, source), (negatives, source), (negatives, torch.zeros_like(source)))
    for step in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, step)
        sigma = scheduler.sigmas[scheduler.step_index]
        both, image, none = (latents - sigma * adapter(scaled, step, one, ids, seen) for one, seen in runs)
        combined = none + guidance * (both - image) + by_image * (image - none)
        latents = scheduler.step((combined - latents) / -sigma, step, latents).prev_sample
    return latents


@torch.no_grad()
def test_the_second_stage_guides_in_three_ways(second: SdxlDetokenizer, embeds: Tensor) -> None:
    start, source = torch.randn(1, 4, 8, 8), _picture(1)
    seen = second.encode_picture(source, 16, 16)
    signed = torch.from_numpy(np.asarray(source, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(seen, second.pipeline.vae.encode(signed).latent_dist.mean, msg="no scaling factor")
    for guidance, by_image in ((7.5, 1.5), (3.0, 1.0), (2.0, 4.0)):
        mine = _latents(second, embeds[:1], conditions=[source], latents=start, guidance_scale=guidance,
                        image_guidance_scale=by_image)
        torch.testing.assert_close(mine, _by_hand(second, embeds[:1], seen, start, guidance, by_image),
                                   rtol=1e-3, atol=1e-3)
    usual = _latents(second, embeds[:1], conditions=[source], latents=start)
    torch.testing.assert_close(usual, _by_hand(second, embeds[:1], seen, start, 7.5, 1.5), rtol=1e-3, atol=1e-3)


def test_no_condition_is_zeros_and_each_picture_has_its_own(second: SdxlDetokenizer, embeds: Tensor) -> None:
    start = torch.randn(1, 4, 8, 8)
    source, other = _picture(1), _picture(2)
    mixed = _latents(second, embeds, latents=start, conditions=[source, None, other])
    for row, condition in enumerate((source, None, other)):
        alone = _latents(second, embeds[row:row + 1], latents=start, conditions=[condition])
        torch.testing.assert_close(mixed[row:row + 1], alone, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixed[1:2], _latents(second, embeds[1:2], latents=start), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(_latents(second, embeds[:1], latents=start), mixed[:1], atol=1e-2)
    assert not torch.allclose(_latents(second, embeds[:1], latents=start, conditions=[other]), mixed[:1], atol=1e-2)


def test_conditions_of_any_size_are_squashed(second: SdxlDetokenizer, embeds: Tensor) -> None:
    wide = Image.new("RGBA", (50, 10), (200, 30, 30, 255))
    same = Image.new("RGB", (16, 24), (200, 30, 30))
    options: dict[str, Any] = {**QUICK, "height": 24, "width": 16}
    one, two = (_pixels(second.decode(embeds[:1], conditions=[condition], generator=_generators(1), **options))
                for condition in (wide, same))
    assert one.shape == (1, 24, 16, 3) and np.array_equal(one, two)


# ---- batches, seeds, output


@pytest.mark.parametrize("stage", ["first", "second"])
def test_pictures_do_not_depend_on_their_batch_mates(place: Path, stage: str, embeds: Tensor) -> None:
    model = _open(place, stage)
    options = {"conditions": [_picture(1), _picture(2), None]} if stage == "second" else {}

    def draw(rows: list[int], seeds: list[int], **more: Any) -> np.ndarray:
        own = {key: [value[row] for row in rows] for key, value in options.items()}
        return _pixels(model.decode(embeds[rows], generator=_generators(*seeds), **own, **QUICK, **more))

    together = draw([0, 1, 2], [1, 2, 3])
    assert np.abs(draw([0, 1, 2], [1, 2, 3], batch_size=2) - together).max() <= 1
    for row in range(3):
        assert np.abs(draw([row], [row + 1])[0] - together[row]).max() <= 1
    swapped = draw([2, 0], [3, 9])
    assert np.abs(swapped[0] - together[2]).max() <= 1
    assert np.abs(swapped[1] - together[0]).max() > 5, "another seed must give another picture"


def test_one_generator_serves_a_batch_of_any_size(first: SdxlDetokenizer, embeds: Tensor) -> None:
    three = _pixels(first.decode(embeds, generator=torch.Generator().manual_seed(7), **QUICK))
    two = _pixels(first.decode(embeds[:2], generator=torch.Generator().manual_seed(7), **QUICK))
    assert np.abs(three[:2] - two).max() <= 1
    assert first.decode(torch.zeros(0, 4, W)) == []


def test_output_types_and_schedulers(second: SdxlDetokenizer, embeds: Tensor) -> None:
    start = torch.randn(1, 4, 8, 8)
    results = {kind: second.decode(embeds[:1], latents=start, output_type=kind, **QUICK)[0]
               for kind in ("pil", "np", "pt", "latent")}
    assert results["np"].shape == (16, 16, 3) and results["latent"].shape == (4, 8, 8)
    torch.testing.assert_close(torch.from_numpy(results["np"]).permute(2, 0, 1), results["pt"])
    assert np.abs(np.asarray(results["pil"]) / 255 - results["np"]).max() < 0.003
    usual = second.pipeline.scheduler
    other = second.decode(embeds[:1], latents=start, scheduler="DDIMScheduler", output_type="latent", **QUICK)[0]
    assert other.isfinite().all() and not torch.allclose(other, results["latent"], atol=1e-3)
    assert second.pipeline.scheduler is usual


def test_runs_of_the_unet(second: SdxlDetokenizer, embeds: Tensor) -> None:
    """Three a step and picture; one where either guidance is off, and then nothing to steer away from is needed."""
    sizes: list[int] = []
    handle = second.pipeline.unet.register_forward_pre_hook(lambda _module, given: sizes.append(len(given[0])))
    try:
        second.decode(embeds[:2], **QUICK)
        second.decode(embeds[:2], guidance_scale=1.0, **QUICK)
        second.decode(embeds[:2], image_guidance_scale=0.5, **QUICK)
    finally:
        handle.remove()
    assert sizes == [6] * 3 + [2] * 6


# ---- negatives


def test_negatives_are_averaged_to_as_many(first: SdxlDetokenizer) -> None:
    """What the tower sees in nothing has 16 tokens; 4 embeddings of a language model are opposed to 4 means."""
    features = torch.arange(16.0).view(1, 16, 1)
    assert pooled_tokens(features, 4).flatten().tolist() == [1.5, 5.5, 9.5, 13.5]
    assert pooled_tokens(features, 16) is features and pooled_tokens(features, 5) is features
    start, embeds = torch.randn(1, 4, 8, 8), torch.randn(2, 4, W)
    usual = _latents(first, embeds, latents=start)
    assert first.empty_features is not None and first.empty_features.shape == (1, 16, W)
    given = _latents(first, embeds, latents=start, negative_image_embeds=pooled_tokens(first.empty_features, 4))
    torch.testing.assert_close(usual, given)
    away = _latents(first, embeds, latents=start, negative_image_embeds=torch.randn(2, 7, W))
    assert not torch.allclose(usual, away, atol=1e-2)


def test_guidance_needs_something_to_steer_away_from(place: Path, embeds: Tensor) -> None:
    model = SdxlDetokenizer.from_pretrained(place / "sdxl", place / "first")
    with pytest.raises(ConfigError, match="call look_at_nothing"):
        model.decode(embeds, **QUICK)
    assert len(model.decode(embeds, guidance_scale=1.0, **QUICK)) == 3


# ---- precision


def test_the_autoencoder_stays_in_float32(place: Path, embeds: Tensor) -> None:
    model = SdxlDetokenizer.from_pretrained(place / "sdxl", place / "second", dtype=torch.bfloat16)
    model.to("cpu", torch.bfloat16)
    model.look_at_nothing(tiny_sdxl.Tower(), 16)
    assert model.pipeline.vae.dtype == torch.float32 and model.adapter.resampler.latents.dtype == torch.bfloat16
    whole = _open(place, "second")
    options: dict[str, Any] = {**QUICK, "conditions": [_picture(1)] * 3, "guidance_scale": 1.0}
    half, full = (_pixels(one.decode(embeds, generator=_generators(1, 2, 3), **options)) for one in (model, whole))
    assert np.abs(half - full).mean() < 6
    assert model.pipeline.vae.dtype == torch.float32 and model.pipeline.unet.dtype == torch.bfloat16


def test_weights_that_are_no_numbers_are_named(place: Path, embeds: Tensor) -> None:
    model = _open(place, "first")
    with torch.no_grad():
        model.adapter.resampler.norm_out.weight[0] = torch.nan
    with pytest.raises(CheckpointError, match="resampler.norm_out.weight holds NaN"):
        model.decode(embeds, **QUICK)


# ---- refusals


@pytest.mark.parametrize(("options", "error", "said"), [
    ({"image_embeds": torch.zeros(2, 4, W + 1)}, CheckpointError, f"width {W + 1}.*width {W}.*do not belong together"),
    ({"image_embeds": torch.zeros(2, W)}, ConfigError, rf"image_embeds must be a floating tensor \[B, N, {W}\]"),
    ({"image_embeds": torch.zeros(2, 0, W)}, ConfigError, r"got \[2, 0, 24\]"),
    ({"negative_image_embeds": torch.zeros(3, 4, W)}, ConfigError, "hold 3 samples for 2 pictures"),
    ({"conditions": [None]}, ConfigError, r"a list of one picture \(or None\) for each of 2 pictures"),
    ({"conditions": _picture(1)}, ConfigError, "conditions must be a list"),
    ({"conditions": [None, "cat.jpg"]}, ConfigError, "conditions must be PIL pictures or None, not a str"),
    ({"latents": torch.zeros(1, 8, 8, 8)}, ConfigError, r"latents must be a tensor \[B, 4, h, w\]"),
    ({"latents": torch.zeros(1, 4, 8, 9)}, ConfigError, r"latents are 8 x 9, but a picture of 16 x 16 has 8 x 8"),
    ({"generator": _generators(1)}, ConfigError, "1 generators were given for 2 pictures"),
    ({"num_inference_steps": 0}, ConfigError, "num_inference_steps must be at least 1, not 0"),
    ({"image_guidance_scale": float("nan")}, ConfigError, "image_guidance_scale must be a finite number"),
    ({"height": 16}, ConfigError, "both, or neither"),
    ({"height": 16, "width": 20}, ConfigError, "width must be a multiple of 8 pixels, got 20"),
    ({"output_type": "jpg"}, ConfigError, "output_type must be one of pil, np, pt, latent"),
])
def test_bad_arguments(second: SdxlDetokenizer, options: dict, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        second.decode(**{"image_embeds": torch.zeros(2, 4, W), **QUICK, **options})


def test_a_first_stage_reads_no_condition(first: SdxlDetokenizer, embeds: Tensor) -> None:
    with pytest.raises(ConfigError, match="first stage and reads no condition picture; editing needs the second stage"):
        first.decode(embeds[:1], conditions=[_picture(1)])


def test_an_autoencoder_of_another_folder(place: Path, tmp_path: Path, first: SdxlDetokenizer, embeds: Tensor) -> None:
    shutil.copytree(place / "sdxl", tmp_path / "sdxl")
    shutil.move(tmp_path / "sdxl" / "vae", tmp_path / "shared")
    (tmp_path / "sdxl" / "vae.json").write_text(json.dumps({"folder": "../shared"}))
    drawn = [np.asarray(model.decode(embeds[:1], negative_image_embeds=NOTHING, **QUICK,
                                     generator=torch.Generator().manual_seed(1))[0])
             for model in (first, SdxlDetokenizer.from_pretrained(tmp_path / "sdxl", place / "first"))]
    assert np.array_equal(*drawn)
    shutil.rmtree(tmp_path / "shared")
    with pytest.raises(CheckpointError, match=r"vae.json: names the autoencoder \S+, where there is no config.json"):
        SdxlDetokenizer.from_pretrained(tmp_path / "sdxl", place / "first")


def test_folders_that_are_not_complete(place: Path, tmp_path: Path, embeds: Tensor) -> None:
    with pytest.raises(CheckpointError, match="no such folder; download the diffusers folder of SDXL base 1.0"):
        SdxlDetokenizer.from_pretrained(tmp_path / "absent", place / "first")
    shutil.copytree(place / "sdxl", tmp_path / "sdxl")
    (tmp_path / "sdxl" / "model_index.json").unlink()
    shutil.rmtree(tmp_path / "sdxl" / "text_encoder", ignore_errors=True)
    (tmp_path / "sdxl" / "seed_decode.json").write_text(json.dumps({"num_inference_steps": 2, "guidance_scale": 1.0}))
    for file in (tmp_path / "sdxl" / "unet").glob("*.safetensors"):
        file.unlink()  # neither these weights nor the index are needed
    bare = SdxlDetokenizer.from_pretrained(tmp_path / "sdxl", place / "first")
    assert bare.defaults == SdxlDefaults(2, 1.0) and len(bare.decode(embeds)) == 3
    vae = next((tmp_path / "sdxl" / "vae").glob("*.safetensors"))
    vae.write_bytes(vae.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="sdxl: not a complete SDXL folder") as caught:
        SdxlDetokenizer.from_pretrained(tmp_path / "sdxl", place / "first")
    assert "\n" not in str(caught.value)
    (tmp_path / "sdxl" / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match="scheduler_config.json: there is no such file; download"):
        SdxlDetokenizer.from_pretrained(tmp_path / "sdxl", place / "first")
    with pytest.raises(CheckpointError, match="no such file; put SEED-X's de-tokenizer"):
        SdxlDetokenizer.from_pretrained(place / "sdxl", tmp_path / "absent.bin")
