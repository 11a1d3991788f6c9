"""How much memory a SEED-X needs, before a tensor is read: from the sizes in its files.

    Memory on cuda: 16.3 GB at most
      language model (4bit)            7.4 GB
      …
      vision tower                     3.9 GB, only while it reads

On each device the parts that stay, and the largest of those that come and go, add up. What computing takes besides is
an estimate: the language model's keys and values for a whole context, and SDXL's passes at 1024 x 1024 pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.detokenizers.autoencoder import autoencoder_folder
from seed_multimodal.detokenizers.sdxl_adapter import FILES as ADAPTER_FILES
from seed_multimodal.device import Runtime
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.hub import find_file, first_file
from seed_multimodal.seed_x.vision import ADVICE, FILES, Resampler
from seed_multimodal.systems.picture_half import off_loaded
from seed_multimodal.systems.seed_x_spec import SeedXSpec, read_agent_sizes
from seed_multimodal.weights import load_state_dict

# Bytes of a weight of the language model's layers; bitsandbytes keeps one scale for 64 of 4 bits (two of them).
QUANTIZED = {"8bit": 1.01, "4bit": 0.53}
VAE_FILES = tuple(f"diffusion_pytorch_model.{ending}" for ending in ("safetensors", "fp16.safetensors", "bin"))
# Estimates for SDXL: a step of its U-Net with guidance, in bytes of 2 a number; its autoencoder in float32, which has
# about five tensors of 256 channels in full resolution at once.
STEP_PER_PIXEL, PICTURE_PER_PIXEL = 1500, 5000
GB = 1e9


@dataclass(frozen=True)
class Part:
    """What one part needs on a device while it is there; `stays`: always, or only while it works.

    `works`: bytes of its computations, beside its weights.
    """

    name: str
    device: str
    weights: float
    works: float = 0.0
    stays: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """The parts of a system and their devices."""

    parts: tuple[Part, ...]

    def most(self, device: str) -> float:
        """Bytes needed on a device at most: what stays there, and the part that needs most beside it."""
        here = [part for part in self.parts if part.device == device]
        return sum(part.weights for part in here if part.stays) + max(
            (part.works + (0 if part.stays else part.weights) for part in here), default=0.0)

    def __str__(self) -> str:
        lines = []
        for device in dict.fromkeys(part.device for part in self.parts):
            lines.append(f"Memory on {device}: {self.most(device) / GB:.1f} GB at most")
            for part in self.parts:
                if part.device == device:
                    busy = f", and {part.works / GB:.1f} GB while it works" if part.works > 0.05 * GB else ""
                    stay = "" if part.stays else ", only while it works"
                    lines.append(f"  {part.name:<24} {part.weights / GB:6.1f} GB{busy or stay}"
                                 + (stay if busy else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights: the language model's (its layers' matrices apart, which are quantised), resamplers and tower,
    SDXL's U-Net with its resampler, and its autoencoder; `cache`: numbers kept for a whole context; `pixels`: of a
    drawing. The defaults are the released sizes."""

    llm_layers: int = 12_687_769_600
    llm_rest: int = 331_473_920
    agent: int = 215_183_360
    tower: int = 1_935_610_624
    adapter: int = 2_567_463_684 + 61_245_696
    vae: int = 83_653_863
    cache: int = 2 * 40 * 5120 * 2048
    pixels: int = 1024 * 1024


def plan_memory(sizes: Sizes, llm: Runtime, here: Runtime, there: Runtime, quantization: str | None = None,
                offload: bool | Collection[str] = False, draws: bool = True) -> MemoryPlan:
    """The plan of a system.

    Args:
        llm, here, there: where the language model works, and where pictures are read and drawn.
        quantization, offload: as of `SeedX.from_pretrained`.
    """
    each, leaves = _bytes(llm.dtype), off_loaded(offload)
    layers = sizes.llm_layers * QUANTIZED.get(str(quantization), each)
    name = "language model" + (f" ({quantization})" if quantization else "")
    parts = [Part(name, str(llm.device), layers + sizes.llm_rest * each, sizes.cache * each,
                  stays=quantization is not None or "llm" not in leaves),
             Part("resamplers", str(llm.device), sizes.agent * each),
             Part("vision tower", str(here.device), sizes.tower * _bytes(here.dtype),
                  stays="encoder" not in leaves)]
    if draws:
        parts += [Part("SDXL's U-Net", str(there.device), sizes.adapter * _bytes(there.dtype),
                       sizes.pixels * STEP_PER_PIXEL * _bytes(there.dtype) / 2, stays="decoder" not in leaves),
                  Part("SDXL's autoencoder", str(there.device), sizes.vae * 4.0, sizes.pixels * PICTURE_PER_PIXEL,
                       stays="decoder" not in leaves)]
    return MemoryPlan(tuple(parts))


def llm_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Weights in the layers' matrices, the others, and numbers of a whole context's keys and values, of a LLaMA with
    this config.json."""
    width, inner, depth = int(config["hidden_size"]), int(config["intermediate_size"]), int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    kv = width // heads * int(config.get("num_key_value_heads") or heads)
    layers = depth * (2 * width * width + 2 * width * kv + 3 * width * inner)
    rest = 2 * int(config["vocab_size"]) * width + (2 * depth + 1) * width
    return layers, rest, 2 * depth * kv * int(config.get("max_position_embeddings", 2048))


def read_sizes(spec: SeedXSpec) -> Sizes:
    """Sizes of a system's files; released ones stand for parts of SDXL that are not there.

    Raises:
        CheckpointError: a tower that is missing or damaged, an SDXL or language model without its sizes.
    """
    try:
        layers, rest, cache = llm_sizes(read_json_object(spec.llm / "config.json"))
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{spec.llm}: its config.json gives no sizes ({first_line(error)}).") from error
    sizes, sdxl = read_agent_sizes(spec), spec.sdxl
    with torch.device("meta"):
        resamplers = [Resampler(config) for config in (sizes.input_resampler, sizes.output_resampler)]
    agent = sum(value.numel() for one in resamplers for value in one.parameters())
    agent += 4 * sizes.input_resampler.embed_dim if sizes.settings.add_patch_pos else 0
    tower = _file_weights(find_file(spec.vision, FILES, ADVICE))
    adapter = None if spec.detokenizer is None else (
        spec.detokenizer if spec.detokenizer.is_file() else first_file(spec.detokenizer, ADAPTER_FILES))
    found = {} if adapter is None else {"adapter": _file_weights(adapter)}
    decoder = autoencoder_folder(sdxl)
    if (decoder / "config.json").is_file() and (sdxl / "unet" / "config.json").is_file():
        vae, unet = (read_json_object(folder / "config.json") for folder in (decoder, sdxl / "unet"))
        try:
            side = int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
        except (LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{sdxl}: unet/config.json gives no sample_size, or vae/config.json no "
                                  f"block_out_channels ({first_line(error)}).") from error
        found["pixels"] = side * side
        file = first_file(decoder, VAE_FILES)
        found |= {} if file is None else {"vae": _file_weights(file)}
    return Sizes(layers, rest, agent, tower, cache=cache, **found)


def _file_weights(file: Path) -> int:
    return sum(value.numel() for value in load_state_dict(file, mapped=True).values())


def _bytes(dtype: torch.dtype) -> int:
    return dtype.itemsize
