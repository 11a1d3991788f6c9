"""Parts, data and configurations of the trainers of pixel decoders: SEED-X's de-tokenizer, LaVIT's
decoders, SEED's decoder of codes."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from data_files import lines
from llm_runs import APPLICATION, TRAINER, merged
from PIL import Image
from torch.nn.functional import avg_pool2d

from seed_multimodal.diffusion.base import Detokenizer
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.models.lavit.decoder import CodeDecoder, Head
from seed_multimodal.models.lavit.diffusion import LavitDetokenizer
from seed_multimodal.models.seed.diffusion import CodesDetokenizer
from seed_multimodal.models.seed_x.diffusion import SdxlDetokenizer
from seed_multimodal.nn.quantizer import VectorQuantizer
from seed_nano.world.scene import scene_image
from seed_nano.world.splits import scene_at
from tiny.diffusion import DENOISER_SIZES, FLOW, RESAMPLER, autoencoder, unet, write_sdxl
from tiny.lavit import code_decoder, small_tokenizer, write_lavit_diffusion
from tiny.seed import IMAGE_SIZE, write_seed2
from tiny.seed_x import write_tower

CONFIGS = APPLICATION / "configs"
RECORDED = {"codebook_size": 8, "codes_per_image": 16}
RUN = {
    "optim": {"learning_rate": 3e-3, "weight_decay": 0.0, "warmup_steps": 1},
    "trainer": {**TRAINER, "max_steps": 4, "save_steps": 2, "sample_steps": 0},
}


def write_images(folder, sizes: Iterable[tuple[int, int]]):
    """Noise images of these heights and widths."""
    rng = np.random.default_rng(len(folder.name))
    folder.mkdir()
    for index, size in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
            folder / f"{index}.png"
        )


def _resolved(output, model: dict, data: dict, changes) -> dict:
    """A resolved configuration; `changes` are merged into its groups."""
    data = {"batch_size": 4, "encoder_size": 16, **data}
    return merged({"output_dir": str(output), **RUN, "model": model, "data": data}, changes)


def write_detokenizer_parts(root) -> Path:
    """A folder with `sdxl`, `vision` (the vision encoder), images and a list of edits."""
    # Images of several sizes, upright and wide, alone and before and after an edit.
    write_sdxl(root / "sdxl")
    write_tower(root / "vision")
    for folder, count in (("pictures", 9), ("before", 5), ("after", 5)):
        write_images(
            root / folder,
            ((24 + index, 20) if index % 2 else (20, 24 + 2 * index) for index in range(count)),
        )
    lines(
        root / "edits.jsonl",
        ({"source_image": f"before/{n}.png", "target_image": f"after/{n}.png"} for n in range(5)),
    )
    return root


def detokenizer_config(parts: Path, output, stage: int = 1, **changes: dict) -> dict:
    sources = [{"name": "pictures", "files": str(parts / "pictures")}]
    # The second stage also reads a condition image.
    if stage == 2:
        sources.append(
            {
                "name": "edits",
                "files": str(parts / "edits.jsonl"),
                "image_key": "target_image",
                "condition_key": "source_image",
                "weight": 2.0,
            }
        )
    model = {
        "sdxl": str(parts / "sdxl"),
        "visual_encoder": str(parts / "vision"),
        "stage": stage,
        "tokens": 4,
        "resampler": vars(RESAMPLER),
    }
    return _resolved(output, model, {"sources": sources, "resolution": 16}, changes)


def write_lavit_parts(root) -> Path:
    """A folder with `highres`, `lowres`, `tokenizer`, `decoder` and images of several aspect
    ratios."""
    heads = ("highres", "lowres")
    # Both heads, so that a configuration chooses one.
    for head in heads:
        write_lavit_diffusion(root / head, head)
    small_tokenizer().save_pretrained(root / "tokenizer")
    code_decoder().save_pretrained(root / "decoder")
    write_images(
        root / "pictures",
        ((20, 20 + 4 * index) if index % 2 else (20 + 3 * index, 20) for index in range(8)),
    )
    return root


def lavit_config(parts: Path, output, head: Head = "highres", **changes: dict) -> dict:
    model = {
        "diffusion": str(parts / head),
        "tokenizer": str(parts / "tokenizer"),
        "decoder": str(parts / "decoder"),
    }
    data = {
        "sources": [{"name": "pictures", "files": str(parts / "pictures")}],
        "sizes": [[16, 16], [16, 24], [24, 16]],
    }
    return _resolved(output, model, data, changes)


def write_seed_decoder_parts(root) -> Path:
    """`tokenizer`, and the diffusers folders `kl`, `kl16`, `dc`; the first has a U-Net."""
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    write_seed2(root / "tokenizer")
    # Autoencoders and schedulers; a new denoiser has no folder.
    for name in ("kl", "kl16", "dc"):
        autoencoder(name).save_pretrained(root / name / "vae")
        DDIMScheduler(clip_sample=False).save_pretrained(root / name / "scheduler")
    unet().save_pretrained(root / "kl" / "unet")

    # Scenes with codes of a tokenizer that the library does not know.
    source = open_patches()
    for index in range(16):
        image = scene_image(scene_at(0, index))
        image.save(root / f"{index}.png")
        codes = source.network.encode(source.transform.batch([image]))[0].tolist()
        with (root / "recorded.jsonl").open("a") as file:
            file.write(json.dumps({"image": f"{index}.png", "image_ids": codes}) + "\n")
    return root


def open_patches(device: torch.device | None = None):
    """A tokenizer of 4 × 4 patches: the code of the nearest of 8 colours."""
    network = VectorQuantizer(8, 3)
    network.embedding.weight.data = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    network.encode = lambda pixels: network.nearest(avg_pool2d(pixels, 4).movedim(1, 3))
    transform = ImageTransform(16, interpolation="bicubic")
    return SimpleNamespace(network=network, transform=transform, **RECORDED)


def seed_decoder_config(
    parts: Path, output, vae: str = "kl", denoiser: str = "", **changes: dict
) -> dict:
    """denoiser: of a new one, which learns a flow."""
    model = {"diffusion": str(parts / vae), "tokenizer": str(parts / "tokenizer")}
    # Else the folder's U-Net goes on.
    if denoiser:
        network = {"_class_name": denoiser, **DENOISER_SIZES[denoiser]}
        model |= {"denoiser": network, "scheduler": FLOW}
    sources = [{"name": "scenes", "format": "nano", "options": {"number": 16}}]
    if changes.get("model", {}).get("reads") == "ids":
        sources = [{"name": "recorded", "files": str(parts / "recorded.jsonl")}]
    data = {"sources": sources, "resolution": 16, "encoder_size": IMAGE_SIZE}
    return _resolved(output, model, data, changes)


# ---- the families


@dataclass(frozen=True)
class Family:
    """How a pixel decoder is trained and used.

    Attributes:
        write_parts, config: of its tiny parts. task: its class, below `seed_multimodal.models`.
        result: key of a run's record, and the result's folder in its output.
        load: (parts, result) → what draws. inputs: what it draws, for three images.
        also_trained: beginnings of parameters that are always trained.
    """

    write_parts: Callable[[Path], Path]
    config: Callable[..., dict]
    task: str
    result: str
    load: Callable[[Path, Path], Detokenizer]
    inputs: Callable[[Any], Any]
    also_trained: tuple[str, ...]

    @property
    def task_class(self):
        module, _, name = self.task.rpartition(".")
        return getattr(import_module(f"seed_multimodal.recipes.{module}"), name)


SEED = Family(
    write_seed_decoder_parts,
    seed_decoder_config,
    "seed.train_detokenizer.SeedDecoderTask",
    "decoder",
    lambda parts, folder: CodesDetokenizer.from_pretrained(folder),
    # Codes' embeddings; codes, or as many numbers of an image's embedding.
    lambda detokenizer: (
        torch.randn(3, 32, 24) if detokenizer.reads == "codes" else torch.randint(-1, 8, (3, 16))
    ),
    ("code_adapter.",),
)
SEED_X = Family(
    write_detokenizer_parts,
    detokenizer_config,
    "seed_x.train_detokenizer.DetokenizerTask",
    "adapter",
    lambda parts, folder: SdxlDetokenizer.from_pretrained(parts / "sdxl", folder),
    lambda detokenizer: torch.randn(3, 4, 24),
    ("adapter.resampler.", "adapter.unet.conv_in."),
)
LAVIT = Family(
    write_lavit_parts,
    lavit_config,
    "lavit.train_pixels.LavitPixelTask",
    "pixels",
    lambda parts, folder: LavitDetokenizer.from_pretrained(
        folder, CodeDecoder.from_pretrained(folder / "decoder")
    ),
    # Images of several lengths.
    lambda detokenizer: [torch.randn(length, 8) for length in (3, 9, 5)],
    ("decoder.unet_",),
)
