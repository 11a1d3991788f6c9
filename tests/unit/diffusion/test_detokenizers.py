"""All de-tokenizers: batches, seeds, settings, schedulers, CPU off-loading, damaged folders."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny.diffusion import (
    CROSS,
    EMBEDDING,
    FEATURES,
    POOLED,
    TEXT_TOKENS,
    TEXT_WIDTH,
    PlainTower,
    random_adapter,
    write_sd1,
    write_sdxl,
    write_unclip,
)
from tiny.lavit import write_lavit_diffusion
from tiny.seed import QFORMER_WIDTH, write_code_decoder
from torch import Tensor

from seed_multimodal.errors import CheckpointError, ConfigError, GenerationError
from seed_multimodal.models.lavit.decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.models.lavit.diffusion import LavitDetokenizer
from seed_multimodal.models.seed.diffusion import (
    CodesDetokenizer,
    StableDiffusionDetokenizer,
    UnclipDetokenizer,
)
from seed_multimodal.models.seed_x.diffusion import SdxlDetokenizer

FAMILIES = ("sd", "unclip", "unclip_layout", "codes", "sdxl", "sdxl_edit", "lavit", "lavit_sd")
SEEDS = [1, 2, 3]


@dataclass
class Case:
    """A model and the conditions of three images.

    `more`: further arguments, a list with an entry per image.
    """

    model: Any
    conditions: Any
    more: dict[str, Any] = field(default_factory=dict)

    def draw(self, rows: list[int], seeds: list[int] | None, **settings: Any) -> np.ndarray:
        values = self.conditions
        chosen = values[rows] if isinstance(values, Tensor) else [values[row] for row in rows]
        more = {name: [value[row] for row in rows] for name, value in self.more.items()}
        images = self.model(chosen, seeds=seeds, **more, **{"num_inference_steps": 2, **settings})
        return np.stack([np.asarray(image, dtype=np.int32) for image in images])


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory) -> Path:
    models_dir = tmp_path_factory.mktemp("models")
    write_sd1(models_dir / "sd")
    torch.manual_seed(0)
    write_unclip(models_dir / "unclip_layout")
    shutil.copytree(
        models_dir / "unclip_layout", models_dir / "unclip", ignore=shutil.ignore_patterns("layout")
    )
    write_code_decoder(models_dir / "codes")
    write_sdxl(models_dir / "sdxl_base")
    for stage, name in ((1, "sdxl"), (2, "sdxl_edit")):
        random_adapter(stage).save_pretrained(models_dir / name)
    write_lavit_diffusion(models_dir / "lavit", "highres")
    write_lavit_diffusion(models_dir / "lavit_sd", "lowres")
    return models_dir


def open_case(models_dir: Path, family: str, dtype: torch.dtype = torch.float32) -> Case:
    rng = torch.Generator().manual_seed(3)
    if family == "sd":
        return Case(
            StableDiffusionDetokenizer.from_pretrained(models_dir / "sd", dtype=dtype),
            3 * torch.randn(3, TEXT_TOKENS, TEXT_WIDTH, generator=rng),
        )
    if family.startswith("unclip"):
        return Case(
            UnclipDetokenizer.from_pretrained(models_dir / family, dtype=dtype),
            3 * torch.randn(3, EMBEDDING, generator=rng),
        )
    if family == "codes":
        return Case(
            CodesDetokenizer.from_pretrained(models_dir / "codes", dtype=dtype),
            3 * torch.randn(3, 32, QFORMER_WIDTH, generator=rng),
        )
    if family.startswith("sdxl"):
        model = SdxlDetokenizer.from_pretrained(
            models_dir / "sdxl_base", models_dir / family, dtype=dtype
        )
        model.set_null_embeds(PlainTower(), 16)
        conditions = [
            Image.effect_noise((16, 16), 90).convert("RGB"),
            None,
            Image.new("RGB", (9, 5), "red"),
        ]
        return Case(
            model,
            torch.randn(3, 4, FEATURES, generator=rng),
            {"condition_images": conditions} if family == "sdxl_edit" else {},
        )
    torch.manual_seed(7)
    high = family == "lavit"
    width = CROSS
    pooled = POOLED
    decoder = CodeDecoder(
        LavitDecoderConfig(
            head="highres" if high else "lowres",
            tokens=8,
            code_dim=4,
            width=8,
            depth=1,
            heads=2,
            mlp_width=8,
            feature_dim=8,
            prompt_dim=width - pooled if high else width,
            pooled_dim=pooled,
        )
    ).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return Case(
        LavitDetokenizer.from_pretrained(models_dir / family, decoder, dtype=dtype),
        [torch.randn(length, 4, generator=rng) for length in (3, 8, 5)],
    )


@pytest.fixture(scope="module", params=FAMILIES)
def shared_case(models_dir: Path, request) -> Case:
    return open_case(models_dir, request.param)


@pytest.fixture
def case(shared_case: Case) -> Case:
    return copy.deepcopy(shared_case)


@pytest.mark.slow
def test_images_depend_on_condition_and_seed_only(case: Case):
    together = case.draw([0, 1, 2], SEEDS)
    assert np.abs(case.draw([0, 1, 2], SEEDS, batch_size=2) - together).max() <= 1
    for row, seed in enumerate(SEEDS):
        assert np.abs(case.draw([row], [seed])[0] - together[row]).max() <= 1
    swapped = case.draw([2, 0], [3, 9])
    assert np.abs(swapped[0] - together[2]).max() <= 1
    assert np.abs(swapped[1] - together[0]).max() > 5, "another seed gives another image"
    torch.manual_seed(5)
    outputs = case.draw([0], None)
    torch.manual_seed(5)
    assert np.array_equal(case.draw([0], None), outputs), "without seeds: torch's global generator"


def test_guidance_of_one_runs_the_unet_once_per_step(case: Case):
    rows: list[int] = []
    if "prediction_type" in case.model.scheduler.config:
        case.model.scheduler = DDIMScheduler.from_config(case.model.scheduler.config)
    denoiser = case.model.denoiser
    hook = denoiser.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for guidance in (1.0, 3.0):
        case.draw([0, 1], [1, 2], guidance_scale=guidance, num_inference_steps=2)
    hook.remove()
    assert rows == [2, 2, *(6, 6)] if case.more else [2, 2, 4, 4]
    assert len(case.model([] if isinstance(case.conditions, list) else case.conditions[:0])) == 0


@pytest.mark.slow
def test_enable_cpu_offload_draws_the_same(case: Case):
    """Every part has a hook (from CPU to CPU); `to` removes it."""
    plain = case.draw([0, 1], [1, 2])
    case.model.enable_cpu_offload("cpu")
    assert all(hasattr(part, "_hf_hook") for part in case.model.parts.values())
    assert np.array_equal(case.draw([0, 1], [1, 2]), plain)
    assert not any(hasattr(part, "_hf_hook") for part in case.model.to("cpu").parts.values())
    assert np.array_equal(case.draw([0, 1], [1, 2]), plain)


@pytest.mark.parametrize("family", ["unclip_layout", "codes", "sdxl_edit", "lavit"])
def test_draw_in_half_precision(models_dir: Path, family):
    half = open_case(models_dir, family, torch.bfloat16)
    full = open_case(models_dir, family)
    assert half.model.denoiser.dtype == torch.bfloat16
    of_seed = family in ("unclip_layout", "codes")
    assert half.model.vae.dtype == (torch.bfloat16 if of_seed else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = half.draw([0, 1, 2], SEEDS, guidance_scale=1.0)
    assert np.abs(outputs - full.draw([0, 1, 2], SEEDS, guidance_scale=1.0)).mean() < 10


def test_check_settings_and_preset_fast(case: Case):
    """`fast` has fewer steps of another scheduler."""
    model = case.model
    steps = model.defaults.num_inference_steps
    assert model.check_settings(num_inference_steps=7, guidance_scale=None).num_inference_steps == 7
    assert model.check_settings(preset="fast").num_inference_steps == min(steps, 12)
    assert model.check_settings(preset="fast", num_inference_steps=15).num_inference_steps == 15
    assert model.check_settings(preset="original") == model.defaults
    for settings, sentence in (
        ({"num_inference_steps": 1001}, "num_inference_steps must be at most 1000, not 1001"),
        ({"guidance": 3.0}, r"unknown key 'guidance' \(did you mean 'guidance_scale'\?\)"),
        ({"preset": "slow"}, "preset"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            model.check_settings(**settings)
    image = case.draw([0], [1])
    assert np.abs(case.draw([0], [1], preset="fast") - image).max() > 1 and np.array_equal(
        case.draw([0], [1]), image
    )


def test_draw_at_another_size(models_dir: Path):
    for family in ("sd", "unclip", "codes", "sdxl", "lavit"):
        case = open_case(models_dir, family)
        assert case.draw([0], [1], height=24, width=16).shape == (1, 24, 16, 3)
        with pytest.raises(ConfigError, match="multiples of 8 pixels, not 16 and 20"):
            case.draw([0], [1], height=16, width=20)


def test_defaults_of_seed_decode_json(models_dir: Path, tmp_path):
    shutil.copytree(models_dir / "sd", tmp_path / "sd")
    (tmp_path / "sd" / "seed_decode.json").write_text(
        json.dumps({"num_inference_steps": 3, "guidance_scale": 2.0})
    )
    model = open_case(tmp_path, "sd").model
    assert (model.defaults.num_inference_steps, model.defaults.guidance_scale) == (3, 2)
    (tmp_path / "sd" / "seed_decode.json").write_text('{"guidance": 3}')
    with pytest.raises(ConfigError, match="seed_decode.json: unknown key 'guidance'"):
        open_case(tmp_path, "sd")


def test_draw_of_embeddings_of_another_width(models_dir: Path):
    for family in ("sd", "unclip", "sdxl"):
        with pytest.raises(CheckpointError, match="have width 5, but .* do not belong together"):
            open_case(models_dir, family).model(
                torch.zeros(1, 4, 5)[:, 0] if family == "unclip" else torch.zeros(1, 4, 5)
            )


def test_draw_with_nan_weights_fails(case: Case):
    torch.nn.init.constant_(next(case.model.denoiser.parameters()), torch.nan)
    with pytest.raises(GenerationError, match="computed NaN or infinity"):
        case.draw([0], [1])


def test_from_pretrained_of_incomplete_folders(models_dir: Path, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no such folder; put Stable Diffusion 1\.4 .*/stable-diffusion-v1-4"
    ):
        open_case(tmp_path, "sd")
    for part in ("unet", "vae", "text_encoder"):
        folder = tmp_path / part / "sd"
        shutil.copytree(models_dir / "sd", folder)
        file = next((folder / part).glob("*.safetensors"))
        tensors = load_file(file)
        lost = sorted(tensors)[-1]
        save_file(
            {name: tensors[name] for name in tensors if name != lost},
            file,
            metadata={"format": "pt"},
        )
        with pytest.raises(
            CheckpointError, match=f"{part}: 1 tensors are missing from the file: '.*{lost[-12:]}'"
        ):
            open_case(tmp_path / part, "sd")
        file.write_bytes(file.read_bytes()[:500])
        with pytest.raises(CheckpointError, match="sd: not a complete Stable Diffusion folder"):
            open_case(tmp_path / part, "sd")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(
        CheckpointError, match="scheduler_config.json: no such file, so the Stable Diff"
    ):
        open_case(tmp_path / "text_encoder", "sd")
    shutil.copytree(models_dir / "lavit", tmp_path / "lavit")
    torch.save(
        {"conv_in.weight": Path}, tmp_path / "lavit" / "unet" / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(
        CheckpointError, match="not a complete LaVIT pixel decoder folder"
    ):  # unsafe pickle content
        open_case(tmp_path, "lavit")


def test_weights_in_torch_files(models_dir: Path, tmp_path):
    """Networks of diffusers, and a text encoder of transformers."""
    for family in ("lavit", "sd"):
        shutil.copytree(models_dir / family, tmp_path / family)
    for file in tmp_path.rglob("*.safetensors"):
        name = "pytorch_model.bin" if file.name == "model.safetensors" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    for family in ("lavit", "sd"):
        expected = open_case(models_dir, family).draw([0], [1])
        assert np.array_equal(open_case(tmp_path, family).draw([0], [1]), expected)


def test_vae_of_another_folder(models_dir: Path, tmp_path):
    shutil.copytree(models_dir / "lavit", tmp_path / "lavit")
    shutil.move(tmp_path / "lavit" / "vae", tmp_path / "shared")
    (tmp_path / "lavit" / "vae.json").write_text(json.dumps({"folder": "../shared"}))
    assert np.array_equal(
        open_case(tmp_path, "lavit").draw([0], [1]), open_case(models_dir, "lavit").draw([0], [1])
    )
    shutil.rmtree(tmp_path / "shared")
    with pytest.raises(CheckpointError, match="shared: no such folder, so the LaVIT pixel decoder"):
        open_case(tmp_path, "lavit")
