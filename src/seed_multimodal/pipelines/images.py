"""Devices of a system's parts, and `ImageCodec`: image encoder and de-tokenizer."""

from __future__ import annotations

import pkgutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.device import FP16_AS_ORIGINAL, Runtime, choose_device, on_device
from seed_multimodal.diffusion.base import Detokenizer
from seed_multimodal.diffusion.networks import compile_blocks
from seed_multimodal.errors import CheckpointError, CodesError
from seed_multimodal.images.io import MIN_OVERSAMPLING, ImageSource, code_row, is_image, open_image
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.inference.batching import DynamicBatcher, ThreadState
from seed_multimodal.inference.prompt import random_seed
from seed_multimodal.language.messages import Codes
from seed_multimodal.models.registry import find_family
from seed_multimodal.nn.layers import avoid_slow_bfloat16
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pipelines.world import Familiarity
from seed_multimodal.progress import LOADING, quiet_loading
from seed_multimodal.settings import SEEDS, check_keys, check_value

Log = Callable[[str], None] | None
Seed = int | Sequence[int | None] | None  # of all images, or of each; None: random
Options = dict[str, Any]  # generation settings and settings of the de-tokenizer, by name
ImageInput = Tensor | Sequence[int]  # of the de-tokenizer: features [N, W], or codes

DRAWING_BATCH = 8  # images that are decoded at once by default, and for a request at most
OFFLOADABLE = frozenset(("llm", "encoder", "decoder"))


@dataclass(frozen=True)
class Placement:
    """Devices of a system's parts, and how they are loaded.

    llm: of the language model. images: of the image encoder. drawing: of the de-tokenizer.
    offload: those of `OFFLOADABLE` that stay on the CPU while idle.
    load_llm: False: the engine has the language model, outside of torch.
    """

    llm: Runtime
    images: Runtime
    drawing: Runtime
    quantization: str | None = None
    offload: Collection[str] = ()
    load_llm: bool = True
    load_decoder: bool = True

    def load_device(self, part: str) -> torch.device:
        """The device on which the "llm" or the image "encoder" is loaded."""
        runtime = self.llm if part == "llm" else self.images
        return torch.device("cpu") if part in self.offload else runtime.device


def open_images(
    name: str | Path | SystemConfig,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    offload: bool = False,
    log: Log = None,
) -> Any:
    """The `ImageCodec` of a system without its language model, or of an image tokenizer."""
    config = name if isinstance(name, SystemConfig) else SystemConfig.find(name)
    runtime = choose_device(device, dtype, log, fp16=FP16_AS_ORIGINAL)
    offloaded = OFFLOADABLE if offload else ()
    placement = Placement(runtime, runtime, runtime, offload=offloaded)
    load_images = pkgutil.resolve_name(find_family(config.system).images)
    with LOADING:
        return load_images(config, placement)


class Encoded(NamedTuple):
    """An encoded image.

    value: codes or features, as prompts read them.
    distance: of `Familiarity`; None: not measured.
    """

    value: Any
    distance: float | None = None


class ImageCodec(ThreadState):
    """Images ⇄ codes or features; base of the families' codecs, which define five methods.

    encode(images, *, seed): codes or features of images, by `encode_batch` on rows of several
        threads; seed: of stochastic encoders.
    read(images, ...): the same for prompts, with distances.
    draw(image_inputs, *, seeds, **settings): images from them, by `draw_batch`; settings: of the
        de-tokenizer, with or without `batch_size` (images at a time) and `should_stop`.

    A codec that draws without a de-tokenizer also has `can_draw = True`.

    min_side: larger images are opened with at least so many pixels a side.
    load_decoder: builds the de-tokenizer; None: the system cannot draw.
    """

    drawing_settings: ClassVar[tuple[str, ...]] = ()  # keywords of `draw`
    codec_settings: ClassVar[tuple[str, ...]] = ()  # those of them not for the de-tokenizer
    name = "This system"  # for the message about a missing de-tokenizer
    advice = ""  # the end of that message
    compiled = False
    load_decoder: Callable[[], Detokenizer[Any]] | None = None
    familiarity = Familiarity()  # compares images with known ones
    codes_per_image: int = 0  # at most; 0: images are features
    encode: Callable[..., Sequence[Tensor]]
    read: Callable[..., list[Encoded]]
    draw: Callable[..., list[Image.Image]]
    encode_batch: Callable[..., Sequence[Any]]
    draw_batch: Callable[..., list[Image.Image]]

    def __init__(self, model: nn.Module, placement: Placement, min_side: int) -> None:
        self.model = model
        avoid_slow_bfloat16(model)
        self.device = placement.images.device
        self.drawing_device = placement.drawing.device
        self.min_side = min_side
        self._decoder: Detokenizer[Any] | None = None
        self._n_forgotten = 0
        self._encode_batcher = DynamicBatcher(self.encode_batch, max_rows=32, wait=0.005)
        self._draw_batcher = DynamicBatcher(self.draw_batch)
        super().__init__()
        self.offload(placement.offload)

    def _begin(self) -> None:
        self._lock = threading.RLock()  # held during encoding and loading of the de-tokenizer

    @property
    def can_draw(self) -> bool:
        return self.load_decoder is not None

    @property
    def decoder(self) -> Any:
        """The family's de-tokenizer, loaded on first use. Raises CheckpointError: none."""
        with self._lock:
            if self._decoder is None:
                if self.load_decoder is None:
                    raise CheckpointError(
                        f"{self.name} has no de-tokenizer, so it cannot draw{self.advice}."
                    )
                with quiet_loading("diffusers", "transformers"):
                    self._decoder = self.load_decoder()
                for part in self._decoder.parts.values():
                    avoid_slow_bfloat16(part)
                self.offload(self._offload)
                if self.compiled:
                    compile_blocks(self._decoder.denoiser)
            return self._decoder

    def forget(self) -> None:
        """Encode all images anew."""
        self._n_forgotten += 1

    def measured(
        self, values: Sequence[Any], pixels: Tensor, embed: Callable[[], Tensor]
    ) -> list[Encoded]:
        """Encoded images with their distances.

        pixels: normalised, [B, 3, S, S]. embed: what the conditioner reads of the images.
        """
        return [*map(Encoded, values, self.familiarity.distances(embed, pixels))]

    def prepare_drawing(self) -> None:
        """Load the de-tokenizer now, unless images are drawn without one.

        Raises CheckpointError: none.
        """
        if self.load_decoder is not None or not self.can_draw:
            _ = self.decoder

    def offload(self, parts: Collection[str]) -> None:
        """Keep these of "encoder" and "decoder" on the CPU while idle."""
        self._offload = parts
        self.model.to("cpu" if "encoder" in parts else self.device)
        if self._decoder is None:
            return
        if "decoder" in parts:
            self._decoder.enable_cpu_offload(self.drawing_device)
        else:
            self._decoder.to(self.drawing_device)

    def to(self, device: str | torch.device) -> None:
        """Move the encoder, and the de-tokenizer if it is loaded."""
        self.device = torch.device(device)
        self.drawing_device = self.device
        self.offload(self._offload)

    def compile(self) -> None:
        """Compile the blocks of the encoder, and of the de-tokenizer when it is loaded.

        Each kind of batch is compiled once.
        """
        self.compiled = True
        block_lists = [part for part in self.model.modules() if isinstance(part, nn.ModuleList)]
        for blocks in block_lists:
            for block in blocks:
                block.compile()

    def check_drawing(self, **settings: object) -> None:
        """Raise early for unknown settings of `draw` and a missing de-tokenizer."""
        not_for_decoder = (*self.codec_settings, "batch_size", "should_stop")
        for name in not_for_decoder:
            settings.pop(name, None)
        if self.load_decoder is None and self.can_draw:
            check_keys(settings, self.drawing_settings, "Settings of drawing")
            return
        self.decoder.check_settings(**settings)

    def open(self, image: ImageSource) -> Image.Image:
        """An image from a file, bytes, PIL or an array, as RGB; raises `ImageError` naming it."""
        return open_image(image, at_least=self.min_side).image

    def preprocess(self, image: ImageSource) -> ImageSource:
        """An image with the same codes, small where the encoder's input has one size."""
        return image

    def draw_batched(self, settings: Options, *columns: Sequence[object]) -> list[Image.Image]:
        """Decode rows with `draw_batch`, batched with those of other threads.

        settings: of `draw`, equal for all rows.
        columns: one value for each row in each.
        """
        settings = dict(settings)
        batch_size = check_value(
            int, settings.pop("batch_size", DRAWING_BATCH), "batch_size", minimum=1
        )
        should_stop = settings.pop("should_stop", None)
        rows = [*zip(*columns, strict=True)]
        images: list[Image.Image] = []
        for start in range(0, len(rows), batch_size):
            images += self._draw_batcher(settings, rows[start : start + batch_size], should_stop)
        return images

    def reconstruct(
        self, inputs: Sequence[Any], *, seeds: Sequence[int], **settings: Any
    ) -> list[Image.Image]:
        """Images → images from their codes or features; given codes stay."""
        rows = [row for row, item in enumerate(inputs) if is_image(item)]
        image_inputs = list(inputs)
        if rows:
            encoded = self.encode([inputs[row] for row in rows], seed=[seeds[row] for row in rows])
            for row, codes in zip(rows, encoded, strict=True):
                image_inputs[row] = codes
        return self.draw(image_inputs, seeds=seeds, **settings)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Context with the encoder on its device, exclusively for this thread."""
        is_offloaded = "encoder" in self._offload
        on_its_device = on_device(self.model, self.device) if is_offloaded else nullcontext()
        with self._lock, on_its_device:
            yield


class CodeCodec(ImageCodec):
    """An `ImageCodec` whose `encode` returns the codes `[n]` int64 of each image.

    A family defines `draw_batch`, and the network `model` with this method:

    model.encode(pixels): normalised pixels `[B, 3, S, S]` → codes `[B, n]` int64, the rows of
        images with fewer codes padded with -1.

    transform: an image → its pixels `[3, S, S]`.
    codebook_size: codes are below it.
    codes_per_image, min_codes: the largest and the least number of codes of an image; by default
        equal.
    """

    fp16: bool = False  # whether codes of data sets are computed in float16 on CUDA

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        *,
        transform: ImageTransform,
        codebook_size: int,
        codes_per_image: int,
        min_codes: int | None = None,
    ) -> None:
        super().__init__(model, placement, min_side=MIN_OVERSAMPLING * transform.image_size)
        self.transform = transform
        self.codebook_size = codebook_size
        self.codes_per_image = codes_per_image
        self.min_codes = codes_per_image if min_codes is None else min_codes

    @property
    def network(self) -> nn.Module:
        """The module with `encode`, for the images of whole data sets; it moves with `model`."""
        return self.model

    def encode(self, images: Sequence[ImageSource], *, seed: Seed = 0) -> Sequence[Tensor]:
        """Images → their codes, on the CPU: [B, n], or a list where their numbers differ.

        `seed` has no effect.
        """
        codes: list[Tensor] = [image.value for image in self.read(images, seed=seed)]
        has_fixed_number = self.min_codes == self.codes_per_image
        return torch.stack(codes) if codes and has_fixed_number else codes

    def read(self, images: Sequence[ImageSource], *, seed: Seed = 0) -> list[Encoded]:
        """As `encode`, with the images' distances."""
        opened = [open_image(image, at_least=self.min_side).image for image in images]
        return self._encode_batcher(None, [*map(self.transform, opened)])

    def preprocess(self, image: ImageSource) -> ImageSource:
        return self.transform.uncropped(self.transform.resize(self.open(image)))

    @torch.inference_mode()
    def encode_batch(self, key: object, rows: Sequence[Tensor]) -> Sequence[Encoded]:
        """Pixels `[3, S, S]` of each image → its codes."""
        pixels = torch.stack([*rows])
        with self.encoding():
            codes = self.model.encode(pixels.to(self.device)).cpu()
            values = [row[row >= 0] for row in codes]
            return self.measured(values, pixels, lambda: self.embed(values))

    def embed(self, codes: Sequence[Tensor]) -> Tensor:
        """What the conditioner of the de-tokenizer reads, for `familiarity`."""
        raise NotImplementedError

    def decoder_inputs(self, codes: Sequence[Tensor]) -> Any:
        """What the de-tokenizer reads of the codes of each image, without those of -1."""
        raise NotImplementedError

    def check_codes(
        self, codes: Iterable[Codes], min_lengths: Sequence[int] | None = None
    ) -> Sequence[Tensor]:
        """Codes of images → `[n]` int64 each.

        min_lengths: the least number of codes of each image; None: `min_codes`.

        Raises:
            CodesError: too few or too many codes, or one outside the codebook.
        """
        most = self.codes_per_image
        rows: list[Tensor] = []
        for index, image_codes in enumerate(codes):
            # 1. A row of integers, of a sufficient length.
            row = code_row(image_codes)
            least = self.min_codes if min_lengths is None else min_lengths[index]
            if row is None or not least <= len(row) <= most:
                allowed = str(most) if least == most else f"{least} to {most}"
                got = type(image_codes).__name__ if row is None else len(row)
                raise CodesError(
                    f"Image {index} must be a row of {allowed} codes (whole numbers), got {got}; "
                    "of arrays [H, W] only uint8 is a picture."
                )
            # 2. All in the codebook.
            if not 0 <= min(row) <= max(row) < self.codebook_size:
                last = self.codebook_size - 1
                raise CodesError(f"Image {index} holds a code outside 0 to {last}.")
            rows.append(torch.tensor(row, dtype=torch.int64, device="cpu"))
        return rows

    def draw(
        self, image_codes: Sequence[Codes], *, seeds: Sequence[int], **settings: Any
    ) -> list[Image.Image]:
        """Codes → images."""
        self.check_drawing(**settings)
        return self.draw_batched(settings, self.check_codes(image_codes), seeds)


def seed_per_image(seed: Seed, count: int) -> list[int]:
    """The seeds of `count` images. Raises CodesError: another number of seeds."""
    per_image = seed if isinstance(seed, (list, tuple, range)) else [seed] * count
    seeds: list[int] = []
    for image_seed in per_image:
        if image_seed is None:
            seeds.append(random_seed())
        else:
            seeds.append(check_value(int, image_seed, "A drawing's seed", **SEEDS))
    if len(seeds) != count:
        raise CodesError(f"{count} images were given with {len(seeds)} seeds.")
    return seeds
