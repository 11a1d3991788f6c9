"""StableDiffusionDetokenizer: folders, batches and generators, guidance, schedulers, safety checker, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_seed1
import torch
from safetensors.torch import load_file, save_file

from seed_multimodal.detokenizers.stable_diffusion import StableDiffusionDefaults, StableDiffusionDetokenizer
from seed_multimodal.errors import CheckpointError, ConfigError

N, W = tiny_seed1.TEXT_TOKENS, tiny_seed1.TEXT_WIDTH
QUICK = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_seed1.diffusion_folder(tmp_path_factory.mktemp("sd") / "stable-diffusion-v1-4")


@pytest.fixture(scope="module")
def model(folder: Path) -> StableDiffusionDetokenizer:
    return StableDiffusionDetokenizer.from_pretrained(folder)


@pytest.fixture
def embeds() -> torch.Tensor:
    return torch.randn(4, N, W, generator=torch.Generator().manual_seed(3)) * 3


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _pixels(pictures: list) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=np.int32) for picture in pictures])


@pytest.mark.slow
def test_pictures_do_not_depend_on_their_batch_mates(model: StableDiffusionDetokenizer, embeds: torch.Tensor) -> None:
    together = _pixels(model.decode(embeds, generator=_generators(1, 2, 3, 4), **QUICK))
    assert together.shape == (4, 16, 16, 3)
    alone = [_pixels(model.decode(embeds[i:i + 1], generator=_generators(i + 1), **QUICK)) for i in range(4)]
    assert np.abs(together - np.concatenate(alone)).max() <= 1
    other = _pixels(model.decode(embeds[[2, 0]], generator=_generators(3, 9), **QUICK))
    assert np.abs(other[0] - together[2]).max() <= 1
    assert np.abs(other[1] - together[0]).max() > 5, "another seed must give another picture"
    chunked = _pixels(model.decode(embeds, generator=_generators(1, 2, 3, 4), batch_size=3, **QUICK))
    assert np.abs(chunked - together).max() <= 1


def test_one_generator_gives_picture_i_in_any_batch_size(model: StableDiffusionDetokenizer,
                                                         embeds: torch.Tensor) -> None:
    four = _pixels(model.decode(embeds, generator=torch.Generator().manual_seed(7), **QUICK))
    two = _pixels(model.decode(embeds[:2], generator=torch.Generator().manual_seed(7), **QUICK))
    assert np.abs(four[:2] - two).max() <= 1
    first, second = _pixels(model.decode(embeds[:1].expand(2, -1, -1), generator=torch.Generator().manual_seed(7),
                                         **QUICK))
    assert np.abs(first - second).max() > 5, "pictures of one call start from different noise"


def test_the_stock_pipeline_gives_the_same_picture(folder: Path, model: StableDiffusionDetokenizer,
                                                   embeds: torch.Tensor) -> None:
    """Also: the empty prompt is the unconditional half, and 50 steps with guidance 7.5 are the defaults."""
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None, feature_extractor=None)
    stock.set_progress_bar_config(disable=True)
    expected = stock(prompt_embeds=embeds[:1], generator=torch.Generator().manual_seed(5)).images
    assert np.array_equal(_pixels(model.decode(embeds[:1], generator=_generators(5))), _pixels(expected))
    assert model.defaults == StableDiffusionDefaults(50, 7.5)
    with torch.no_grad():
        ids = torch.tensor([[2, *[3] * (N - 1)]])
        empty = stock.text_encoder(ids).last_hidden_state
    for options in ({"negative_embeds": empty}, {}):
        mine = model.decode(embeds[:1], generator=_generators(5), guidance_scale=3.0, **QUICK, **options)
        assert np.array_equal(_pixels(mine), _pixels(stock(
            prompt_embeds=embeds[:1], generator=_generators(5), guidance_scale=3.0, **QUICK).images))


def test_guidance_of_one_runs_the_unet_once_a_step(model: StableDiffusionDetokenizer, embeds: torch.Tensor) -> None:
    sizes: list[int] = []
    handle = model.pipeline.unet.register_forward_pre_hook(lambda _module, given: sizes.append(len(given[0])))
    try:
        model.decode(embeds[:2], guidance_scale=1.0, **QUICK)
        assert sizes == [2] * 5, "four steps, the second one twice"
        sizes.clear()
        model.decode(embeds[:2], **QUICK)
        assert sizes == [4] * 5
    finally:
        handle.remove()


def test_negatives_latents_and_size_matter(model: StableDiffusionDetokenizer, embeds: torch.Tensor) -> None:
    def render(**options: object) -> torch.Tensor:
        return torch.stack(list(model.decode(embeds[:2], generator=_generators(1, 2), output_type="latent",
                                             **{**QUICK, **options})))  # type: ignore[arg-type]

    plain = render()
    away = render(negative_embeds=embeds[3:])
    torch.testing.assert_close(away, render(negative_embeds=embeds[[3, 3]]))
    assert not torch.allclose(plain, away, atol=1e-3)
    latents = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(render(latents=latents), render(latents=latents.expand(2, -1, -1, -1)))
    assert render(height=24, width=32).shape == (2, 4, 12, 16)
    assert model.decode(embeds[:1], height=24, width=32, **QUICK)[0].size == (32, 24)


def test_any_scheduler_by_name_or_object(model: StableDiffusionDetokenizer, embeds: torch.Tensor) -> None:
    from diffusers import EulerDiscreteScheduler

    usual, latents = model.pipeline.scheduler, torch.randn(1, 4, 8, 8)
    results = {}
    for name in (None, "plms", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        picture = model.decode(embeds[:1], latents=latents, scheduler=name, num_inference_steps=5,
                               output_type="latent")[0]
        assert picture.isfinite().all()
        results[name] = picture
        assert model.pipeline.scheduler is usual
    torch.testing.assert_close(results["plms"], results[None])
    assert not torch.allclose(results["DDIMScheduler"], results[None], atol=1e-3)
    as_object = model.decode(embeds[:1], latents=latents, scheduler=EulerDiscreteScheduler.from_config(usual.config),
                             num_inference_steps=5, output_type="latent")[0]
    torch.testing.assert_close(as_object, results["EulerDiscreteScheduler"])
    noisy = [model.decode(embeds[:1], latents=latents, scheduler="DDIMScheduler", num_inference_steps=5, eta=eta,
                          generator=_generators(1), output_type="latent")[0] for eta in (0.0, 1.0)]
    torch.testing.assert_close(noisy[0], results["DDIMScheduler"])
    assert not torch.allclose(noisy[1], noisy[0], atol=1e-3)
    with pytest.raises(ConfigError, match="Unknown scheduler 'DDIMSheduler', did you mean 'DDIMScheduler'"):
        model.decode(embeds[:1], scheduler="DDIMSheduler")


@pytest.mark.parametrize(("asked", "times"), [
    (5, [801, 601, 401, 201, 1]), (7, [995, 853, 711, 569, 427, 285, 143, 1]), (3, [667, 334, 1]), (1, [1])])
def test_plms_takes_the_original_time_steps(asked: int, times: list[int]) -> None:
    """7 asked are 8 done; 3 would begin past the end of the schedule, where the original fails."""
    from diffusers import PNDMScheduler

    from seed_multimodal.detokenizers.plms import PlmsScheduler

    scheduler = PlmsScheduler.from_sampler(PNDMScheduler(skip_prk_steps=True).config)
    scheduler.set_timesteps(asked)
    assert scheduler.timesteps.tolist() == [*times[:2], *times[1:]]
    assert float(scheduler.final_alpha_cumprod) == float(scheduler.alphas_cumprod[0])


def test_a_folder_with_its_own_defaults_and_without_text_encoder(tmp_path: Path, embeds: torch.Tensor) -> None:
    place = tiny_seed1.diffusion_folder(tmp_path / "bare", text=False)
    (place / "seed_decode.json").write_text(json.dumps({"num_inference_steps": 2, "scheduler": "DDIMScheduler"}))
    model = StableDiffusionDetokenizer.from_pretrained(place, dtype=torch.bfloat16)
    assert model.defaults == StableDiffusionDefaults(2, 7.5, "DDIMScheduler")
    assert model.pipeline.unet.dtype == torch.bfloat16
    seen: list[torch.Tensor] = []
    handle = model.pipeline.unet.register_forward_pre_hook(
        lambda _module, _given, keywords: seen.append(keywords["encoder_hidden_states"]), with_kwargs=True)
    model.decode(embeds[:1])
    handle.remove()
    assert len(seen) == 2 and not seen[0][0].any(), "without a text encoder the unconditional half is zero"


def test_a_safety_checker_in_the_folder_is_used(tmp_path: Path, embeds: torch.Tensor) -> None:
    place = tiny_seed1.diffusion_folder(tmp_path / "checked", checker=True)
    flagged = StableDiffusionDetokenizer.from_pretrained(place)
    assert not _pixels(flagged.decode(embeds[:1], generator=_generators(1), **QUICK)).any()
    free = StableDiffusionDetokenizer.from_pretrained(place, safety_checker=False)
    assert _pixels(free.decode(embeds[:1], generator=_generators(1), **QUICK)).any()
    shutil.rmtree(place / "safety_checker")  # left out of the download
    assert StableDiffusionDetokenizer.from_pretrained(place).pipeline.safety_checker is None


def test_empty_batch(model: StableDiffusionDetokenizer) -> None:
    assert model.decode(torch.zeros(0, N, W)) == []


@pytest.mark.parametrize(("options", "error", "said"), [
    ({"embeds": torch.zeros(2, N, 17)}, CheckpointError, "width 17.*width 16.*do not belong together"),
    ({"embeds": torch.zeros(2, W)}, ConfigError, r"\[B, n, 16\], got \[2, 16\]"),
    ({"embeds": [[0.0]]}, ConfigError, "got list"),
    ({"negative_embeds": torch.zeros(3, N, W)}, ConfigError, "negative_embeds hold 3 samples for 2 pictures"),
    ({"latents": torch.zeros(3, 4, 8, 8)}, ConfigError, "latents hold 3 samples for 2 pictures"),
    ({"generator": _generators(1)}, ConfigError, "1 generators were given for 2 pictures"),
    ({"num_inference_steps": 0}, ConfigError, "num_inference_steps must be at least 1, not 0"),
    ({"num_inference_steps": 1001}, ConfigError, "num_inference_steps must be at most 1000, not 1001"),
    ({"height": 16}, ConfigError, "both, or neither"),
    ({"height": 16, "width": 20}, ConfigError, "width must be a multiple of 8 pixels, got 20"),
])
def test_bad_arguments(model: StableDiffusionDetokenizer, options: dict, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        model.decode(**{"embeds": torch.zeros(2, N, W), **options})


def test_missing_and_damaged_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model_index\.json.*pretrained/stable-diffusion-v1-4"):
        StableDiffusionDetokenizer.from_pretrained(tmp_path / "absent")
    single = tmp_path / "sd-v1-4.ckpt"
    single.write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=r"sd-v1-4\.ckpt: a checkpoint in one file.*hf download") as caught:
        StableDiffusionDetokenizer.from_pretrained(single)
    assert "\n" not in str(caught.value)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="broken: not a complete Stable Diffusion folder"):
        StableDiffusionDetokenizer.from_pretrained(broken)
    config = json.loads((folder / "unet" / "config.json").read_text())
    shutil.copytree(folder, tmp_path / "unclip")
    (tmp_path / "unclip" / "unet" / "config.json").write_text(json.dumps({**config, "class_embed_type": "identity"}))
    with pytest.raises(CheckpointError, match="needs class embeddings"):
        StableDiffusionDetokenizer.from_pretrained(tmp_path / "unclip")
    (broken / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="broken: not a complete Stable Diffusion folder"):
        StableDiffusionDetokenizer.from_pretrained(broken)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_missing_tensor_is_refused_and_never_made_up(folder: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(folder, tmp_path / "less")
    file = next((tmp_path / "less" / part).glob("*.safetensors"))
    tensors = load_file(file)
    lost = sorted(tensors)[-1]
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"less/{part}: 1 tensors are missing from the file: '.*{lost[-12:]}'"):
        StableDiffusionDetokenizer.from_pretrained(tmp_path / "less")
