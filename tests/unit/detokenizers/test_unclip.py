"""UnclipDetokenizer: folders, batches and generators, guidance and negatives, schedulers, refusals."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from seed_multimodal.detokenizers.layout import LayoutDecoder
from seed_multimodal.detokenizers.pipelines import DecodeDefaults
from seed_multimodal.detokenizers.unclip import UnclipDetokenizer
from seed_multimodal.errors import CheckpointError, ConfigError

E, CROSS = 12, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano-like diffusers folder, saved by the stock pipeline class: no text encoder, no image encoder."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMScheduler,
        StableUnCLIPImg2ImgPipeline,
        UNet2DConditionModel,
    )
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, cross_attention_dim=CROSS, attention_head_dim=2, class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * E)
    vae = AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4)
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=None, image_encoder=None, image_normalizer=StableUnCLIPImageNormalizer(E),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"), tokenizer=None, text_encoder=None,
        unet=unet, vae=vae, scheduler=DDIMScheduler(prediction_type="v_prediction"))
    place = tmp_path_factory.mktemp("unclip") / "diffusion_model"
    pipeline.save_pretrained(place)
    (place / "seed_decode.json").write_text(json.dumps({"num_inference_steps": 3, "guidance_scale": 2.0}))
    return place


@pytest.fixture(scope="module")
def detokenizer(folder: Path) -> UnclipDetokenizer:
    return UnclipDetokenizer.from_pretrained(folder)


@pytest.fixture
def embeds() -> torch.Tensor:
    return torch.randn(4, E, generator=torch.Generator().manual_seed(3)) * 3


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _pixels(pictures: list) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=np.int32) for picture in pictures])


@pytest.mark.slow
def test_pictures_do_not_depend_on_their_batch_mates(detokenizer: UnclipDetokenizer, embeds: torch.Tensor) -> None:
    together = _pixels(detokenizer.decode(embeds, generator=_generators(1, 2, 3, 4)))
    assert together.shape == (4, 16, 16, 3)
    alone = [_pixels(detokenizer.decode(embeds[i:i + 1], generator=_generators(i + 1))) for i in range(4)]
    assert np.abs(together - np.concatenate(alone)).max() <= 1
    other = _pixels(detokenizer.decode(embeds[[2, 0]], generator=_generators(3, 9)))
    assert np.abs(other[0] - together[2]).max() <= 1
    assert np.abs(other[1] - together[0]).max() > 5, "another seed must give another picture"


def test_one_generator_gives_picture_i_in_any_batch_size(detokenizer: UnclipDetokenizer, embeds: torch.Tensor) -> None:
    four = _pixels(detokenizer.decode(embeds, generator=torch.Generator().manual_seed(7)))
    two = _pixels(detokenizer.decode(embeds[:2], generator=torch.Generator().manual_seed(7)))
    chunked = _pixels(detokenizer.decode(embeds, generator=torch.Generator().manual_seed(7), batch_size=3))
    assert np.abs(four[:2] - two).max() <= 1 and np.abs(four - chunked).max() <= 1
    same = embeds[:1].expand(2, -1)
    first, second = _pixels(detokenizer.decode(same, generator=torch.Generator().manual_seed(7)))
    assert np.abs(first - second).max() > 5, "pictures of one call start from different noise"


def test_a_single_picture_equals_the_stock_pipeline(folder: Path, detokenizer: UnclipDetokenizer,
                                                    embeds: torch.Tensor) -> None:
    """Same generator, same numbers as diffusers' own class (which needs an image encoder only for its dtype)."""
    from diffusers import StableUnCLIPImg2ImgPipeline

    stock = StableUnCLIPImg2ImgPipeline.from_pretrained(str(folder), image_encoder=None, feature_extractor=None,
                                                       tokenizer=None, text_encoder=None)
    stock.image_encoder = stock.unet  # any module: only its dtype is read
    stock.set_progress_bar_config(disable=True)
    zeros = torch.zeros(1, 1, CROSS)
    for guidance in (1.0, 4.0):
        expected = stock(image_embeds=embeds[:1], prompt_embeds=zeros, negative_prompt_embeds=zeros,
                         num_inference_steps=3, guidance_scale=guidance,
                         generator=torch.Generator().manual_seed(5)).images
        mine = detokenizer.decode(embeds[:1], guidance_scale=guidance, generator=torch.Generator().manual_seed(5))
        assert np.array_equal(_pixels(mine), _pixels(expected))


def test_defaults_come_from_the_folder(detokenizer: UnclipDetokenizer, embeds: torch.Tensor) -> None:
    assert detokenizer.defaults == DecodeDefaults(3, 2.0)
    assert DecodeDefaults() == DecodeDefaults(20, 10.0)
    plain = _pixels(detokenizer.decode(embeds[:1], generator=_generators(1)))
    told = _pixels(detokenizer.decode(embeds[:1], generator=_generators(1), num_inference_steps=3, guidance_scale=2.0))
    more = _pixels(detokenizer.decode(embeds[:1], generator=_generators(1), num_inference_steps=5))
    assert np.array_equal(plain, told) and not np.array_equal(plain, more)


def test_negative_embeddings_noise_level_and_latents_matter(detokenizer: UnclipDetokenizer,
                                                            embeds: torch.Tensor) -> None:
    def render(**options: object) -> torch.Tensor:
        return torch.stack(list(detokenizer.decode(embeds[:2], generator=_generators(1, 2), output_type="latent",
                                                   **options)))  # type: ignore[arg-type]

    plain = render()
    one_for_all = render(negative_image_embeds=embeds[3:])
    torch.testing.assert_close(one_for_all, render(negative_image_embeds=embeds[[3, 3]]))
    assert not torch.allclose(plain, one_for_all, atol=1e-3)
    assert detokenizer.pipeline.negative_image_embeds is None, "negatives must not leak into the next call"
    torch.testing.assert_close(plain, render())
    assert not torch.allclose(plain, render(noise_level=700), atol=1e-4)
    latents = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(render(latents=latents), render(latents=latents.expand(2, -1, -1, -1)))


def test_any_scheduler_by_name_or_object(detokenizer: UnclipDetokenizer, embeds: torch.Tensor) -> None:
    from diffusers import EulerDiscreteScheduler

    usual, latents = detokenizer.pipeline.scheduler, torch.randn(1, 4, 8, 8)
    results = {}
    for name in ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler",
                 "UniPCMultistepScheduler"):
        picture = detokenizer.decode(embeds[:1], generator=_generators(1), latents=latents, scheduler=name,
                                     num_inference_steps=6, output_type="latent")[0]
        assert picture.isfinite().all()
        results[name] = picture
        assert detokenizer.pipeline.scheduler is usual
    euler = EulerDiscreteScheduler.from_config(usual.config)
    as_object = detokenizer.decode(embeds[:1], generator=_generators(1), latents=latents, scheduler=euler,
                                   num_inference_steps=6, output_type="latent")[0]
    torch.testing.assert_close(as_object, results["EulerDiscreteScheduler"])
    assert not torch.allclose(results["DDIMScheduler"], results["PNDMScheduler"], atol=1e-3)
    with pytest.raises(ConfigError, match="Unknown scheduler 'DDIMSheduler', did you mean 'DDIMScheduler'"):
        detokenizer.decode(embeds[:1], scheduler="DDIMSheduler")


def test_layout_sub_folder_conditions_and_warms_up(folder: Path, tmp_path: Path, embeds: torch.Tensor) -> None:
    place = tmp_path / "with_layout"
    shutil.copytree(folder, place)
    torch.manual_seed(1)
    labels = {"first": 2, "second": 3, "style": 2, "background": 2, "layout": 1}
    LayoutDecoder(E, 4, 8, CROSS, labels, [[(0, 0.5, 0.5, 0.8)]], width=16).save_pretrained(place / "layout")
    model = UnclipDetokenizer.from_pretrained(place)
    seen: list[torch.Tensor] = []
    handle = model.pipeline.unet.register_forward_pre_hook(
        lambda _module, arguments, keywords: seen.append((arguments[0], keywords["encoder_hidden_states"])),
        with_kwargs=True)
    model.decode(embeds[:2], generator=_generators(1, 2))
    handle.remove()
    latents, tokens = seen[0]
    with torch.no_grad():
        torch.testing.assert_close(tokens[2:], model.layout.prompt_embeds(embeds[:2]))
        start = model.layout.warm_latents(embeds[:2], _generators(1, 2), model.pipeline.scheduler)
    assert not tokens[:2].any(), "the unconditional half gets zeros"
    torch.testing.assert_close(latents[:2], start)
    half = UnclipDetokenizer.from_pretrained(place, dtype=torch.bfloat16)
    assert half.decode(embeds[:1], generator=_generators(1))[0].size == (16, 16)


def test_without_layout_the_text_condition_is_zero(detokenizer: UnclipDetokenizer, embeds: torch.Tensor) -> None:
    assert detokenizer.layout is None
    condition = detokenizer._text_condition(embeds, guided=True)
    assert condition["prompt_embeds"].shape == (4, 1, CROSS) and not condition["prompt_embeds"].any()


def test_empty_batch(detokenizer: UnclipDetokenizer) -> None:
    assert detokenizer.decode(torch.zeros(0, E)) == []


@pytest.mark.parametrize(("options", "error", "said"), [
    ({"image_embeds": torch.zeros(2, 13)}, CheckpointError, "width 13.*width 12.*do not belong together"),
    ({"image_embeds": torch.zeros(E)}, ConfigError, r"\[B, 12\], got \[12\]"),
    ({"image_embeds": [[0.0]]}, ConfigError, "got list"),
    ({"negative_image_embeds": torch.zeros(3, E)}, ConfigError, "negative_image_embeds hold 3 samples for 2 pictures"),
    ({"latents": torch.zeros(3, 4, 8, 8)}, ConfigError, "latents hold 3 samples for 2 pictures"),
    ({"latents": 1.5}, ConfigError, "latents must be a floating tensor with one sample for each picture, not float"),
    ({"generator": _generators(1)}, ConfigError, "1 generators were given for 2 pictures"),
    ({"noise_level": 1000}, ConfigError, "noise_level must be at most 999, not 1000"),
    ({"num_inference_steps": 0}, ConfigError, "num_inference_steps must be at least 1, not 0"),
    ({"num_inference_steps": 1001}, ConfigError, "num_inference_steps must be at most 1000, not 1001"),
])
def test_bad_arguments(detokenizer: UnclipDetokenizer, options: dict, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        detokenizer.decode(**{"image_embeds": torch.zeros(2, E), **options})


def test_missing_and_damaged_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model_index\.json.*pretrained/stable-diffusion-2-1-unclip"):
        UnclipDetokenizer.from_pretrained(tmp_path / "absent")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="broken: not a complete stable-unCLIP folder"):
        UnclipDetokenizer.from_pretrained(broken)
    shutil.rmtree(broken / "unet")
    with pytest.raises(CheckpointError, match="broken: not a complete stable-unCLIP folder"):
        UnclipDetokenizer.from_pretrained(broken)
    shutil.copytree(folder, tmp_path / "json")
    (tmp_path / "json" / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="json: not a complete stable-unCLIP folder"):
        UnclipDetokenizer.from_pretrained(tmp_path / "json")
    (tmp_path / "json" / "seed_decode.json").write_text('{"guidance": 3}')
    with pytest.raises(ConfigError, match="unknown key 'guidance'"):
        UnclipDetokenizer.from_pretrained(tmp_path / "json")


def test_loading_and_casting_bring_no_remarks_of_the_library(folder: Path) -> None:
    from diffusers.utils import logging as loudness

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    library, before = logging.getLogger("diffusers"), loudness.get_verbosity()
    library.addHandler(handler)
    loudness.set_verbosity_warning()  # a command that ran before in this process may have silenced it
    try:
        logging.getLogger("diffusers.models.modeling_utils").warning("heard")
        UnclipDetokenizer.from_pretrained(folder).to("cpu", torch.float64).to("cpu")
        logging.getLogger("diffusers.models.modeling_utils").warning("heard again")
    finally:
        loudness.set_verbosity(before)
        library.removeHandler(handler)
    assert told == ["heard", "heard again"]


def test_another_kind_of_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.0", "unet": [None, None]}))
    with pytest.raises(CheckpointError, match="holds no 'unet'|not a complete stable-unCLIP folder"):
        UnclipDetokenizer.from_pretrained(tmp_path)
