"""How much memory a LaVIT needs, before a tensor is read: `memory_plan` for its parts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from seed_multimodal.detokenizers.autoencoder import autoencoder_folder
from seed_multimodal.device import Runtime
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.hub import first_file
from seed_multimodal.lavit.checkpoints import find_files
from seed_multimodal.systems.lavit_files import DECODERS, VISUAL, LavitSpec, weights_file
from seed_multimodal.systems.memory_plan import (
    PICTURE_PER_PIXEL,
    QUANTIZED,
    STEP_PER_PIXEL,
    VAE_FILES,
    MemoryPlan,
    Part,
    llm_sizes,
)
from seed_multimodal.systems.picture_half import off_loaded
from seed_multimodal.weights import load_state_dict

CONTEXT = 2560  # tokens whose keys and values are kept at once: an answer's five beams, or a drawing's two streams
OURS = "model.safetensors"


@dataclass(frozen=True)
class LavitSizes:
    """Numbers of weights: the language model's (its layers' matrices apart, which are quantised), tower, the rest of
    the dynamic tokenizer, its second merger and projector, decoder of codes, U-Net and autoencoder; `cache`: numbers
    kept of the context; `pixels`: of a drawing. The defaults are the released sizes."""

    llm_layers: int = 6_476_005_376
    llm_rest: int = 396_644_352
    tower: int = 1_012_588_928
    tokenizer: int = 404_048_130
    understanding: int = 404_038_656
    decoder: int = 414_002_304
    unet: int = 2_567_463_684
    vae: int = 83_653_863
    cache: int = 2 * 32 * 4096 * CONTEXT
    pixels: int = 1024 * 1024


def plan_lavit(sizes: LavitSizes, llm: Runtime, here: Runtime, there: Runtime, quantization: str | None = None,
               offload: bool | Collection[str] = False,
               modes: Collection[str] = ("understanding", "generation")) -> MemoryPlan:
    """The plan of a system; arguments as of `Lavit.from_pretrained`."""
    each, leaves = llm.dtype.itemsize, off_loaded(offload)
    layers = sizes.llm_layers * QUANTIZED.get(str(quantization), each)
    name = "language model" + (f" ({quantization})" if quantization else "")
    reads, draws = "understanding" in modes, "generation" in modes
    place, of_half = str(here.device), here.dtype.itemsize
    parts = [Part(name, str(llm.device), layers + sizes.llm_rest * each, sizes.cache * each,
                  stays=quantization is not None or "llm" not in leaves)]
    parts += _half("tower and dynamic tokenizer", "encoder" in leaves, [
        Part("vision tower", place, sizes.tower * of_half),
        Part("dynamic tokenizer", place, (sizes.tokenizer + sizes.understanding * (reads and draws)) * of_half)])
    if draws:
        place, each = str(there.device), there.dtype.itemsize
        parts += _half("decoders", "decoder" in leaves, [
            Part("decoder of codes", place, sizes.decoder * each),
            Part("U-Net", place, sizes.unet * each, sizes.pixels * STEP_PER_PIXEL * each / 2),
            Part("autoencoder", place, sizes.vae * 4.0, sizes.pixels * PICTURE_PER_PIXEL)])
    return MemoryPlan(tuple(parts))


def _half(name: str, leaves: bool, parts: list[Part]) -> list[Part]:
    """Parts that stay; or, as they come and go together, one."""
    if not leaves:
        return parts
    return [Part(name, parts[0].device, sum(part.weights for part in parts), max(part.works for part in parts),
                 stays=False)]


def read_lavit_sizes(spec: LavitSpec) -> LavitSizes:
    """Sizes of a system's files; what is not there counts nothing.

    Raises:
        CheckpointError: a file that is damaged, or a language model without its sizes.
    """
    try:
        config = read_json_object(spec.llm / "config.json")
        layers, rest, cache = llm_sizes({**config, "max_position_embeddings": CONTEXT})
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{spec.llm}: its config.json gives no sizes ({first_line(error)}).") from error
    counted, decoder = (0, 0, 0), None if spec.decoder is None else spec.decoder / OURS
    if spec.released:
        decoder = weights_file(spec.tokenizer / VISUAL / DECODERS[spec.head])
    if spec.has("tokenizer"):
        files = find_files(spec.tokenizer, str(spec.llm.resolve()) if spec.has("understanding") else None)
        numbers = {name: value.numel() for name, value in files.state(False).items()}
        tower = sum(number for name, number in numbers.items() if name.startswith("encoder."))
        counted = tower, sum(numbers.values()) - tower, _count(files.reader if spec.has("understanding") else None)
    tower, tokenizer, second = counted
    unet = vae = pixels = 0
    if spec.has("pixels") and spec.pixels is not None:
        unet = _count(first_file(spec.pixels / "unet", VAE_FILES))  # diffusers' names are the same for both
        vae = _count(first_file(autoencoder_folder(spec.pixels), VAE_FILES))
        pixels = _pixels(spec.pixels)
    return LavitSizes(layers, rest, tower, tokenizer, second, _count(decoder), unet, vae, cache, pixels)


def _pixels(folder: Path) -> int:
    """Pixels of a drawing of the U-Net's own size."""
    vae, unet = (read_json_object(place / "config.json") for place in (autoencoder_folder(folder), folder / "unet"))
    try:
        side = int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: unet/config.json gives no sample_size, or vae/config.json no "
                              f"block_out_channels ({first_line(error)}).") from error
    return side * side


def _count(file: Path | None) -> int:
    """Numbers in a file's tensors; 0 where there is no file."""
    if file is None or not file.is_file():
        return 0
    return sum(value.numel() for value in load_state_dict(file, mapped=True).values())
