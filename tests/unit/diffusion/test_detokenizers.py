"""Contract of all de-tokenizers: batches, seeds, settings, precision, devices, folders."""

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import read_json, spread, write_json
from torch import Tensor

from seed_multimodal.errors import CheckpointError, ConfigError, GenerationError

FAMILIES = "sd unclip unclip_layout codes sdxl sdxl_edit lavit lavit_sd".split()
SEEDS = [1, 2, 3]


@dataclasses.dataclass
class Case:
    """A model and the conditions of three images.

    `more`: further arguments, a list with an entry per image.
    """

    model: Any
    conditions: Any
    more: dict = dataclasses.field(default_factory=dict)

    def draw(self, rows: list[int], seeds: list[int] | None, **settings) -> np.ndarray:
        values = self.conditions
        chosen = values[rows] if isinstance(values, Tensor) else [values[row] for row in rows]
        more = {name: [value[row] for row in rows] for name, value in self.more.items()}
        images = self.model(chosen, seeds=seeds, **more, **{"num_inference_steps": 2, **settings})
        return np.stack([np.asarray(image, dtype=np.int32) for image in images])


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory) -> Path:
    from tiny.diffusion import random_adapter, write_sd1, write_sdxl, write_unclip
    from tiny.lavit import write_lavit_diffusion
    from tiny.seed import write_code_decoder

    root = tmp_path_factory.mktemp("models")
    write_sd1(root / "sd")
    torch.manual_seed(0)
    write_unclip(root / "unclip_layout")
    no_layout = shutil.ignore_patterns("layout")
    shutil.copytree(root / "unclip_layout", root / "unclip", ignore=no_layout)
    write_code_decoder(root / "codes")
    write_sdxl(root / "sdxl_base")
    for stage, name in ((1, "sdxl"), (2, "sdxl_edit")):
        random_adapter(stage).save_pretrained(root / name)
    write_lavit_diffusion(root / "lavit", "highres")
    write_lavit_diffusion(root / "lavit_sd", "lowres")
    return root


def open_case(models_dir, family: str, dtype: torch.dtype = torch.float32) -> Case:
    from tiny import diffusion, lavit, seed

    from seed_multimodal.models.lavit.decoder import CodeDecoder
    from seed_multimodal.models.lavit.diffusion import LavitDetokenizer
    from seed_multimodal.models.seed import diffusion as seed_diffusion
    from seed_multimodal.models.seed_x.diffusion import SdxlDetokenizer

    folder = models_dir / family
    rng = torch.Generator().manual_seed(3)
    if family.startswith("lavit"):
        decoder = lavit.code_decoder()
        if family == "lavit_sd":  # whose U-Net has no pooled embeddings
            sizes = {"head": "lowres", "prompt_dim": diffusion.CROSS}
            decoder = CodeDecoder(dataclasses.replace(decoder.config, **sizes)).eval()
            spread(decoder, 0.5)
        model = LavitDetokenizer.from_pretrained(folder, decoder, dtype=dtype)
        width = decoder.config.code_dim
        return Case(model, [torch.randn(length, width, generator=rng) for length in (3, 8, 5)])
    if family.startswith("sdxl"):
        model = SdxlDetokenizer.from_pretrained(models_dir / "sdxl_base", folder, dtype=dtype)
        model.set_null_embeds(diffusion.PlainTower(), 16)
        edited = [Image.effect_noise((16, 16), 90), None, Image.new("RGB", (9, 5), "red")]
        more = {"condition_images": edited} if family == "sdxl_edit" else {}
        return Case(model, torch.randn(3, 4, diffusion.FEATURES, generator=rng), more)

    name, shape = {
        "sd": ("StableDiffusionDetokenizer", (diffusion.TEXT_TOKENS, diffusion.TEXT_WIDTH)),
        "unclip": ("UnclipDetokenizer", (diffusion.EMBEDDING,)),
        "unclip_layout": ("UnclipDetokenizer", (diffusion.EMBEDDING,)),
        "codes": ("CodesDetokenizer", (32, seed.QFORMER_WIDTH)),
    }[family]
    model = getattr(seed_diffusion, name).from_pretrained(folder, dtype=dtype)
    return Case(model, 3 * torch.randn(3, *shape, generator=rng))


@pytest.fixture(scope="module", params=FAMILIES)
def shared_case(models_dir, request) -> Case:
    return open_case(models_dir, request.param)


@pytest.fixture
def case(shared_case: Case) -> Case:
    return copy.deepcopy(shared_case)


@pytest.mark.slow
def test_images_depend_on_condition_and_seed_only(case):
    # A reader who repeats a seed gets the same image, whatever else is drawn with it.
    together = case.draw([0, 1, 2], SEEDS)
    for row, seed in enumerate(SEEDS):
        assert np.abs(case.draw([row], [seed])[0] - together[row]).max() <= 1
    swapped = case.draw([2, 0], [3, 9])
    assert np.abs(swapped[0] - together[2]).max() <= 1
    assert np.abs(swapped[1] - together[0]).max() > 5  # of another seed
    # Without seeds torch's global generator gives them.
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(case.draw([0], None))
    assert np.array_equal(*drawn)
    assert len(case.model(case.conditions[:0])) == 0


@pytest.mark.slow
def test_settings_change_what_is_drawn(case):
    image = case.draw([0], [1])
    for changed in ({"preset": "fast"}, {"guidance_scale": 1.0}, {"num_inference_steps": 3}):
        assert np.abs(case.draw([0], [1], **changed) - image).max() > 1, changed
    # Nothing of one call stays for the next one.
    assert np.array_equal(case.draw([0], [1]), image)
    assert case.draw([0], [1], height=24, width=16).shape == (1, 24, 16, 3)


def test_check_settings(case):
    model = case.model
    steps = model.defaults.num_inference_steps
    for overrides, expected in (
        ({"num_inference_steps": 7, "guidance_scale": None}, 7),
        ({"preset": "fast"}, min(steps, 12)),
        ({"preset": "fast", "num_inference_steps": 15}, 15),
    ):
        assert model.check_settings(**overrides).num_inference_steps == expected
    for overrides, named in (
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"height": 16, "width": 20}, "20"),  # no multiple of a latent's side
    ):
        with pytest.raises(ConfigError, match=named):
            model.check_settings(**overrides)


def test_guidance_of_one_runs_the_denoiser_once_per_step(case):
    # Twice the runs are twice the time.
    from diffusers import DDIMScheduler

    # A scheduler with one run a step, where the folder's has several.
    if "prediction_type" in case.model.scheduler.config:
        case.model.scheduler = DDIMScheduler.from_config(case.model.scheduler.config)
    rows = []
    hook = case.model.denoiser.register_forward_pre_hook(
        lambda module, args: rows.append(len(args[0]))
    )
    for guidance in (1.0, 3.0):
        case.draw([0, 1], [1, 2], guidance_scale=guidance)
    hook.remove()
    per_step = 6 if case.more else 4  # an edit is guided by its image, too
    assert rows == [2, 2, per_step, per_step]


@pytest.mark.parametrize("family", ["unclip_layout", "codes", "sdxl_edit", "lavit"])
def test_draw_in_half_precision(models_dir, family):
    half = open_case(models_dir, family, torch.bfloat16)
    full = open_case(models_dir, family)
    assert half.model.denoiser.dtype == torch.bfloat16
    # SDXL's autoencoder overflows in half precision.
    is_seed = family in ("unclip_layout", "codes")
    assert half.model.vae.dtype == (torch.bfloat16 if is_seed else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        drawn = half.draw([0, 1, 2], SEEDS, guidance_scale=1.0)
    assert np.abs(drawn - full.draw([0, 1, 2], SEEDS, guidance_scale=1.0)).mean() < 10


def test_draw_with_nan_weights_fails(case):
    # In place of a black image.
    torch.nn.init.constant_(next(case.model.denoiser.parameters()), torch.nan)
    with pytest.raises(GenerationError):
        case.draw([0], [1])


def test_sdxl_guides_without_null_embeds(models_dir):
    # Before the vision encoder gave them, zeros are unconditional.
    case = open_case(models_dir, "sdxl")
    case.model.null_embeds = None
    unguided = case.draw([0], [1], guidance_scale=1.0)
    assert np.abs(case.draw([0], [1], guidance_scale=5.0) - unguided).max() > 1


@pytest.mark.parametrize("family", ["sd", "unclip", "sdxl", "lavit"])
def test_draw_of_embeddings_of_another_width(models_dir, family):
    shape = (1, 5) if family == "unclip" else (1, 4, 5)
    with pytest.raises(CheckpointError, match="width 5"):
        open_case(models_dir, family).model(torch.zeros(shape))


# ---- folders


@pytest.fixture
def folder(models_dir, tmp_path) -> Path:
    """A copy of Stable Diffusion's folder."""
    return shutil.copytree(models_dir / "sd", tmp_path / "sd")


def test_defaults_of_seed_decode_json(folder):
    write_json(folder / "seed_decode.json", {"num_inference_steps": 3, "guidance_scale": 2.0})
    defaults = open_case(folder.parent, "sd").model.defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (3, 2)
    write_json(folder / "seed_decode.json", {"guidance": 3})
    with pytest.raises(ConfigError, match="seed_decode.json.*guidance"):
        open_case(folder.parent, "sd")


@pytest.mark.parametrize("lost", ["", "unet", "vae", "scheduler/scheduler_config.json"])
def test_from_pretrained_names_what_is_missing(folder, lost):
    # diffusers would ask its hub for a folder that does not exist.
    path = folder / lost
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(CheckpointError, match=str(path)):
        open_case(folder.parent, "sd")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_from_pretrained_names_an_incomplete_part(folder, part):
    # diffusers and transformers would fill it with random values.
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    lost, _ = tensors.popitem()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=lost[-12:]):
        open_case(folder.parent, "sd")


@pytest.mark.parametrize(
    "file, values",
    [
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"}),
        ("vae/config.json", {"_class_name": "AutoencoderOobleck"}),
    ],
    ids=str,
)
def test_from_pretrained_refuses_a_part_of_another_class(folder, file, values):
    # A tokenizer of bytes was read as CLIP's, without an error.
    path = folder / file
    content = read_json(path) if path.is_file() else {}
    write_json(path, {**content, **values})
    [name] = [value[0] if isinstance(value, list) else value for value in values.values()]
    with pytest.raises(CheckpointError, match=f"{path}.*{name}"):
        open_case(folder.parent, "sd")


@pytest.mark.parametrize("family", ["lavit", "sd"])
def test_weights_in_torch_files(models_dir, tmp_path, family):
    """Networks of diffusers, and a text encoder of transformers."""
    shutil.copytree(models_dir / family, tmp_path / family)
    for file in tmp_path.rglob("*.safetensors"):
        name = "pytorch_model.bin" if file.name == "model.safetensors" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    expected = open_case(models_dir, family).draw([0], [1])
    assert np.array_equal(open_case(tmp_path, family).draw([0], [1]), expected)
