"""LavitPixels: both kinds of U-Net against loops written by hand, batches and seeds, sizes, folders, refusals."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_lavit_pixels
import torch
from torch import Tensor

from seed_multimodal.detokenizers.lavit import RATIOS, UNCONDITIONAL, LavitDefaults, LavitPixels
from seed_multimodal.detokenizers.layout import LayoutDecoder
from seed_multimodal.errors import CheckpointError, ConfigError, SeedWarning
from seed_multimodal.lavit.decoder import Conditions

N, WIDTH, POOLED, NOTHING = (tiny_lavit_pixels.TOKENS, tiny_lavit_pixels.WIDTH, tiny_lavit_pixels.POOLED,
                             tiny_lavit_pixels.NOTHING)
QUICK: dict[str, Any] = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of both kinds, as released: U-Nets in torch files, the checker in one of them."""
    place = tmp_path_factory.mktemp("LaVIT")
    tiny_lavit_pixels.folder(place / "highres_pixel_decoding", "highres")
    tiny_lavit_pixels.folder(place / "pixel_decoding", "lowres")
    return place


@pytest.fixture(scope="module")
def high(place: Path) -> LavitPixels:
    return LavitPixels.from_pretrained(place / "highres_pixel_decoding")


@pytest.fixture(scope="module")
def low(place: Path) -> LavitPixels:
    return LavitPixels.from_pretrained(place / "pixel_decoding")


def conditions(count: int, pooled: bool = True, seed: int = 3) -> Conditions:
    generator = torch.Generator().manual_seed(seed)
    return Conditions(torch.randn(count, N, WIDTH, generator=generator),
                      torch.randn(count, POOLED, generator=generator) if pooled else None)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(seed: int, *size: int) -> Tensor:
    return torch.randn(4, *size, generator=torch.Generator().manual_seed(seed))[None]


def latents(model: LavitPixels, given: Conditions, **options: Any) -> Tensor:
    return torch.stack(list(model.decode(given, output_type="latent", **{**QUICK, **options})))


def by_hand(model: LavitPixels, start: Tensor, toward: dict[str, Any], away: dict[str, Any], steps: int,
            guidance: float) -> Tensor:
    """The two halves of the guidance in calls of their own."""
    scheduler, unet = model.pipeline.scheduler, model.pipeline.unet
    scheduler.set_timesteps(steps)
    for step in scheduler.timesteps:
        plain, told = (unet(start, step, **one).sample for one in (away, toward))
        start = scheduler.step(plain + guidance * (told - plain), step, start, eta=0.0).prev_sample
    return start


# ---- what is drawn


@torch.no_grad()
def test_the_kind_of_sdxl_is_told_sizes_and_steered_away_from_zeros(high: LavitPixels) -> None:
    """Also: 25 steps and guidance 7 are the defaults, noise is the CPU generator's, sizes are (height, width)."""
    given, ids = conditions(1), torch.tensor([[40.0, 30, 2, 4, 16, 24]])
    toward = {"encoder_hidden_states": given.prompt_embeds,
              "added_cond_kwargs": {"text_embeds": given.pooled, "time_ids": ids}}
    away = {"encoder_hidden_states": torch.zeros(1, N, WIDTH),
            "added_cond_kwargs": {"text_embeds": torch.zeros(1, POOLED), "time_ids": ids}}
    want = by_hand(high, noise(5, 8, 12), toward, away, 25, 7.0)
    made = high.decode(given, height=16, width=24, original_size=(40, 30), crops_coords_top_left=(2, 4),
                       generator=generators(5), output_type="latent")
    assert high.defaults == LavitDefaults(25, 7.0)
    assert torch.allclose(made[0], want[0], atol=1e-4)
    other = high.decode(given, height=16, width=24, generator=generators(5), output_type="latent")
    assert not torch.allclose(other[0], want[0], atol=1e-3)


@torch.no_grad()
def test_the_kind_of_stable_diffusion_is_steered_away_from_the_empty_text(low: LavitPixels) -> None:
    """Of the unconditional prompt, embeddings behind the empty text's are masked: their content plays no role."""
    given = conditions(1, pooled=False)
    nothing = torch.cat([tiny_lavit_pixels.nothing(), torch.full((1, N - NOTHING, WIDTH), 9.0)], 1)
    mask = torch.arange(N)[None] < NOTHING
    toward = {"encoder_hidden_states": given.prompt_embeds}
    away = {"encoder_hidden_states": nothing, "encoder_attention_mask": mask}
    want = by_hand(low, noise(6, 8, 8), toward, away, 3, 5.0)
    made = latents(low, given, num_inference_steps=3, guidance_scale=5.0, generator=generators(6))
    assert torch.allclose(made, want, atol=1e-4)
    unmasked = {"encoder_hidden_states": nothing}
    assert not torch.allclose(by_hand(low, noise(6, 8, 8), toward, unmasked, 3, 5.0), want, atol=1e-3)


@pytest.mark.parametrize("kind", ["high", "low"])
def test_a_picture_alone_is_as_in_a_batch(kind: str, request: pytest.FixtureRequest) -> None:
    model, given = request.getfixturevalue(kind), conditions(3, kind == "high")
    together = latents(model, given, generator=generators(1, 2, 3))
    for number in range(3):
        one = Conditions(*(None if part is None else part[number:number + 1] for part in given))
        assert torch.allclose(latents(model, one, generator=generators(number + 1))[0], together[number], atol=1e-4)
    in_parts = latents(model, given, generator=generators(1, 2, 3), batch_size=2)
    assert torch.allclose(in_parts, together, atol=1e-4)
    single = torch.Generator().manual_seed(1)
    assert torch.allclose(latents(model, given, generator=single)[0], together[0], atol=1e-4)


def test_without_guidance_the_unet_runs_once_a_step_and_steps_are_told(high: LavitPixels) -> None:
    seen: list[int] = []
    told: list[tuple[int, int]] = []
    handle = high.pipeline.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        for guidance in (1.0, 1.5):
            high.decode(conditions(2), guidance_scale=guidance, num_inference_steps=3,
                        on_step=lambda done, total: told.append((done, total)))
    finally:
        handle.remove()
    assert seen == [2] * 3 + [4] * 3
    assert told == [(1, 3), (2, 3), (3, 3)] * 2


def test_pictures_of_every_type(high: LavitPixels) -> None:
    options: dict[str, Any] = {**QUICK, "ratio": "3:2", "generator": torch.Generator().manual_seed(0)}
    images = {kind: high.decode(conditions(1), output_type=kind, **{**options, "generator": generators(0)})[0]
              for kind in ("pil", "np", "pt")}
    height, width = high.ratio_size("3:2")
    assert images["pil"].size == (width, height) and images["np"].shape == (height, width, 3)
    assert np.allclose(images["pt"].permute(1, 2, 0).numpy(), images["np"])
    assert np.abs(np.asarray(images["pil"]) / 255 - images["np"]).max() <= 0.5 / 255 + 1e-6
    assert np.asarray(high.draw(conditions(1), height, width, **QUICK, generator=generators(0))[0]
                      ).tolist() == np.asarray(images["pil"]).tolist()


def test_ratios_in_the_units_size(high: LavitPixels) -> None:
    assert len(RATIOS) == 6 and all(one % 64 == 0 for size in RATIOS.values() for one in size)
    model = LavitPixels(tiny_lavit_pixels.unet("highres", sample_size=512), high.pipeline.vae, high.pipeline.scheduler)
    assert {name: model.ratio_size(name) for name in RATIOS} == RATIOS
    assert high.ratio_size("16:9") == (16, 24)  # of 16 pixels: 12 x 21
    with pytest.raises(ConfigError, match="The ratio must be one of 1:1, 4:3, 3:2"):
        high.decode(conditions(1), ratio="1:3")
    with pytest.raises(ConfigError, match="Give a ratio, or height and width, not both"):
        high.decode(conditions(1), ratio="1:1", height=16, width=16)
    with pytest.raises(ConfigError, match="The width must be a multiple of 8 pixels, got 20"):
        high.decode(conditions(1), height=16, width=20)


def test_size_conditions_are_exact_in_half_precision(high: LavitPixels, place: Path) -> None:
    """In bfloat16, 375 pixels would become 376."""
    model = LavitPixels.from_pretrained(place / "highres_pixel_decoding", dtype=torch.bfloat16)
    seen: list[dict[str, Tensor]] = []
    handle = model.pipeline.unet.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["added_cond_kwargs"]), with_kwargs=True)
    made = latents(model, conditions(1), original_size=(375, 1333), generator=generators(1))
    handle.remove()
    assert seen[0]["time_ids"].tolist() == [[375, 1333, 0, 0, 16, 16]] * 2
    assert made.dtype == torch.float32 and model.pipeline.vae.dtype == torch.float32
    exact = latents(high, conditions(1), original_size=(375, 1333), generator=generators(1))
    assert torch.nn.functional.cosine_similarity(made.flatten(), exact.flatten(), dim=0) > 0.98


def test_a_layout_decides_where_sampling_starts_in_any_ratio(place: Path, tmp_path: Path) -> None:
    features, folder = 6, tmp_path / "with_layout"
    shutil.copytree(place / "highres_pixel_decoding", folder)
    classes = {"first": 2, "second": 3, "style": 2, "background": 2, "layout": 2}
    torch.manual_seed(0)
    layout = LayoutDecoder(4 * features, 4, 8, 0, classes, [[[0, 0.5, 0.5, 0.5]]] * 2, width=8, features=4, side=2,
                           hidden=8, depth=1, coarse=4, patch=1)
    layout.save_pretrained(folder / "layout")
    model = LavitPixels.from_pretrained(folder)
    shown = torch.randn(2, N, features, generator=torch.Generator().manual_seed(8))
    given = conditions(2)._replace(features=shown)
    starts: list[Tensor] = []
    for height, width in ((16, 16), (16, 24)):
        model.decode(given, height=height, width=width, generator=generators(1, 2), **QUICK)
        starts.append(model._start(shown, generators(1, 2), (height, width), 2))
        signal = float(model.pipeline.scheduler.alphas_cumprod[-1])
        mean = model.layout.latents(shown.unflatten(1, (4, -1)).mean(2).flatten(1))
        mean = torch.nn.functional.interpolate(mean, (height // 2, width // 2), mode="bilinear", antialias=True)
        noises = torch.cat([noise(seed, height // 2, width // 2) for seed in (1, 2)])
        assert torch.allclose(starts[-1], signal**0.5 * mean + (1 - signal)**0.5 * noises, atol=1e-4)
    with pytest.raises(ConfigError, match="features, which are missing"):
        model.decode(conditions(2))
    with pytest.raises(ConfigError, match="layout decoder reads 3 embeddings"):
        model.decode(given._replace(features=torch.randn(2, N, 8)))


# ---- folders


def test_released_folders_hold_torch_files_and_nothing_that_runs(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unsafe"
    shutil.copytree(place / "highres_pixel_decoding", folder)
    assert [file.name for file in (folder / "unet").iterdir() if file.suffix != ".json"] == [
        "diffusion_pytorch_model.bin"]
    torch.save({"conv_in.weight": Path}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a complete LaVIT pixel decoder folder"):
        LavitPixels.from_pretrained(folder)
    assert LavitPixels.from_pretrained(place / "pixel_decoding").nothing.shape == (1, NOTHING, WIDTH)


def test_defaults_and_an_autoencoder_elsewhere(place: Path, tmp_path: Path, high: LavitPixels) -> None:
    folder = tmp_path / "own"
    shutil.copytree(place / "highres_pixel_decoding", folder)
    shutil.move(folder / "vae", tmp_path / "shared_vae")
    (folder / "vae.json").write_text(json.dumps({"folder": "../shared_vae"}))
    (folder / "seed_decode.json").write_text(json.dumps({"num_inference_steps": 2, "guidance_scale": 1.0}))
    model = LavitPixels.from_pretrained(folder)
    made = model.decode(conditions(1), generator=generators(4), output_type="pt")[0]
    want = high.decode(conditions(1), generator=generators(4), output_type="pt", guidance_scale=1.0, **QUICK)[0]
    assert torch.allclose(made, want, atol=1e-5)


def test_folders_that_are_not_complete(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rain1011/LaVIT-7B-v2"):
        LavitPixels.from_pretrained(tmp_path / "absent")
    folder = tmp_path / "low"
    shutil.copytree(place / "pixel_decoding", folder)
    torch.save(torch.zeros(1, 3, WIDTH + 1), folder / UNCONDITIONAL)
    with pytest.raises(CheckpointError, match=rf"must hold a tensor \[1, L, {WIDTH}\], got \[1, 3, {WIDTH + 1}\]"):
        LavitPixels.from_pretrained(folder)
    torch.save({"a": torch.zeros(1), "b": torch.zeros(1)}, folder / UNCONDITIONAL)
    with pytest.raises(CheckpointError, match="must hold one tensor and nothing else"):
        LavitPixels.from_pretrained(folder)
    torch.save(torch.zeros(1, N + 1, WIDTH), folder / UNCONDITIONAL)
    with pytest.raises(CheckpointError, match=f"holds {N + 1} embeddings, but a prompt has {N}"):
        LavitPixels.from_pretrained(folder).decode(conditions(1, pooled=False), **QUICK)
    torch.save(torch.full((1, 3, WIDTH), torch.nan), folder / UNCONDITIONAL)
    with pytest.raises(CheckpointError, match=f"{UNCONDITIONAL}: holds NaN or infinity"):
        LavitPixels.from_pretrained(folder)
    (folder / UNCONDITIONAL).unlink()
    with pytest.raises(CheckpointError, match=f"{UNCONDITIONAL}: there is no such file"):
        LavitPixels.from_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="names no scheduler"):
        LavitPixels.from_pretrained(folder)


# ---- the safety checker


def test_the_checker_works_in_its_own_precision_and_makes_pictures_black(place: Path) -> None:
    """The released one is in the other decoder's folder."""
    model = LavitPixels.from_pretrained(place / "highres_pixel_decoding", check_safety=True, dtype=torch.bfloat16)
    given, options = conditions(2), {**QUICK, "generator": generators(1, 2)}
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error", SeedWarning)
        shown = model.decode(given, **options)
    assert all(np.asarray(picture).any() for picture in shown)
    checker = model.safety.model
    pixels = model.safety.extractor(shown, return_tensors="pt").pixel_values
    first, second = torch.nn.functional.normalize(checker.visual_projection(checker.vision_model(pixels)[1])).detach()
    checker.concept_embeds.data[0] = first - second  # now it recognises the first one
    checker.concept_embeds_weights.data[0] = 0.0
    for kind in ("pil", "pt"):
        with torch.autocast("cpu", torch.bfloat16), pytest.warns(SeedWarning, match="made 1 of 2 pictures black"):
            made = model.decode(given, output_type=kind, **{**QUICK, "generator": generators(1, 2)})
        assert [bool(np.asarray(picture).any()) for picture in made] == [False, True]


def test_no_checker_is_one_sentence(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    shutil.copytree(place / "highres_pixel_decoding", folder)
    with pytest.warns(SeedWarning, match="holds no safety checker .* drawn without one"):
        assert LavitPixels.from_pretrained(folder, check_safety=True).safety is None
    model = LavitPixels.from_pretrained(folder, check_safety=True, safety=place / "pixel_decoding")
    assert model.safety is not None and LavitPixels.from_pretrained(folder).safety is None


# ---- refusals


def test_wrong_conditions_and_settings_are_one_sentence(high: LavitPixels, low: LavitPixels) -> None:
    with pytest.raises(CheckpointError, match=r"prompt_embeds have width 7, but .* is conditioned on width"):
        high.decode(Conditions(torch.zeros(1, N, 7), torch.zeros(1, POOLED)))
    with pytest.raises(CheckpointError, match=rf"reads pooled embeddings \[1, {POOLED}\], but there are none"):
        high.decode(conditions(1, pooled=False))
    with pytest.raises(CheckpointError, match=r"reads pooled embeddings \[2, .*but there are \[1, "):
        high.decode(conditions(2)._replace(pooled=torch.zeros(1, POOLED)))
    with pytest.raises(ConfigError, match="Conditions of LaVIT's decoder are drawn, not a Tensor"):
        low.decode(torch.zeros(1, N, WIDTH))  # type: ignore[arg-type]
    for wrong, sentence in (({"num_inference_steps": 0}, "num_inference_steps"), ({"on_step": "yes"}, "on_step"),
                            ({"original_size": (3,)}, "original_size must be two whole numbers"),
                            ({"crops_coords_top_left": (0, -1)}, "crops_coords_top_left"),
                            ({"height": 16}, "height and width both"), ({"scheduler": "DDIM"}, "Unknown scheduler"),
                            ({"output_type": "jpg"}, "output_type")):
        for model in (high, low):
            with pytest.raises(ConfigError, match=sentence):
                model.check_settings(**wrong)
    high.check_settings(ratio="4:3", num_inference_steps=50, scheduler="EulerDiscreteScheduler")


def test_unets_of_another_kind_are_refused(high: LavitPixels) -> None:
    vae, scheduler = high.pipeline.vae, high.pipeline.scheduler
    with pytest.raises(CheckpointError, match="latents of 4 channels from 8, but the autoencoder reads 4"):
        LavitPixels(tiny_lavit_pixels.unet("highres", in_channels=8), vae, scheduler)
    other = tiny_lavit_pixels.unet("lowres", class_embed_type="timestep")
    with pytest.raises(CheckpointError, match="neither of SDXL's kind nor of Stable Diffusion 1's"):
        LavitPixels(other, vae, scheduler)
