"""The image side of a system: a vision encoder, and a de-tokenizer that is loaded when the first image is drawn.

A codec may be used from several threads: it encodes or draws for one of them at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.device import free_memory
from seed_multimodal.errors import CheckpointError, CodesError
from seed_multimodal.images.io import ImageLimits, open_image
from seed_multimodal.quiet import quiet_loading
from seed_multimodal.settings import SEEDS, check_keys, check_value
from seed_multimodal.system.domain import Domain

OFFLOADED = frozenset(("llm", "encoder", "decoder"))  # parts that can stay on the CPU while they are not in use


def offloaded(parts: bool | Collection[str]) -> frozenset[str]:
    """The names of the parts that are on their device only while they work; True: all of them.

    Raises:
        ConfigError: another name.
    """
    names = () if isinstance(parts, bool) else (parts,) if isinstance(parts, str) else tuple(parts)
    check_keys(names, OFFLOADED, "offload")
    return OFFLOADED if parts is True else frozenset(names)


class ImageCodec:
    """Images ⇄ codes or features; a family defines `encode` and `draw`.

    Args:
        model: encodes images. load_decoder: makes the de-tokenizer; None: this system cannot draw.
        at_least: a larger image is reduced while it is opened, to this side or more.
        drawing_device: None: `device`. offload: of "encoder" and "decoder".

    Attributes:
        progressive: whether the first codes of an image can be drawn.
        drawing_settings: what `draw` accepts; `own_settings`: those that the de-tokenizer does not know.
        domain: what the system was trained on.
    """

    progressive: ClassVar[bool] = False
    drawing_settings: ClassVar[tuple[str, ...]] = ()
    own_settings: ClassVar[tuple[str, ...]] = ()
    domain: Domain | None = None
    name, advice = "This system", ""  # in the sentence about a missing de-tokenizer

    def __init__(self, model: nn.Module, *, load_decoder: Callable[[], Any] | None, device: torch.device,
                 drawing_device: torch.device | None = None, at_least: int | None = None,
                 offload: bool | Collection[str] = False) -> None:
        self.model, self.device, self.drawing_device = model, device, drawing_device or device
        self.limits, self.at_least = ImageLimits(), at_least
        self._load_decoder = load_decoder
        self._decoder: Any = None
        self._lock = threading.RLock()  # held while the models compute
        self.offload(offload)

    # ---- a family defines

    def encode(self, images: Sequence[Any]) -> Any:
        """Images → codes or features."""
        raise NotImplementedError

    def draw(self, values: Sequence[Any], *, seeds: Sequence[int], batch_size: int = 8,
             **settings: Any) -> list[Image.Image]:
        """Codes or features of images → images; `settings` of the de-tokenizer and `drawing_settings`."""
        raise NotImplementedError

    @property
    def encoder(self) -> nn.Module:
        """The vision encoder, whose tokens the domain looks at."""
        return self.model

    def run_encoder(self, images: Sequence[Any]) -> None:
        """Run the vision encoder on whole images."""
        self.encode(images)

    # ---- shared

    @property
    def can_draw(self) -> bool:
        return self._load_decoder is not None

    @property
    def decoder(self) -> Any:
        """The de-tokenizer, loaded now if this is its first use.

        Raises:
            CheckpointError: the system has none, or its files are not there.
        """
        with self._lock:
            if self._decoder is None:
                if self._load_decoder is None:
                    raise CheckpointError(f"{self.name} has no de-tokenizer, so it cannot draw{self.advice}.")
                with quiet_loading("diffusers", "transformers"):
                    self._decoder = self._load_decoder()
                self._place_decoder()
            return self._decoder

    def offload(self, parts: bool | Collection[str]) -> None:
        """Keep all, or these of "encoder" and "decoder", on the CPU while they do not work; and the others not."""
        self._offload = offloaded(parts)
        self.model.to("cpu" if "encoder" in self._offload else self.device)
        if self._decoder is not None:
            self._place_decoder()

    def _place_decoder(self) -> None:
        if "decoder" in self._offload:
            self._decoder.enable_cpu_offload(self.drawing_device)
        else:
            self._decoder.to(self.drawing_device)

    def check_drawing(self, **settings: Any) -> None:
        """Refuse settings of `draw`, and a missing de-tokenizer, before the language model works for it.

        Raises:
            ConfigError: an unknown setting, or a value out of range. CheckpointError: there is no de-tokenizer.
        """
        self.decoder.check_settings(**{name: value for name, value in settings.items()
                                       if name not in self.own_settings})

    def open(self, image: Any, name: str | None = None) -> Image.Image:
        """An image from a file, bytes, PIL or an array, as RGB; raises `ImageError` naming it."""
        return open_image(image, name=name, limits=self.limits, at_least=self.at_least)

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """Inside, the encoder is on its device, and this thread alone uses it."""
        with self._lock, on_device(self.model, self.device, "encoder" in self._offload):
            yield

    @contextlib.contextmanager
    def drawing(self) -> Iterator[Any]:
        """Inside, this thread alone uses the de-tokenizer, which it yields."""
        with self._lock:
            yield self.decoder

    def note(self, images: Sequence[Any]) -> str:
        """One sentence where images are unlike those of the training, or nothing."""
        if self.domain is None or not len(images):
            return ""
        return self.domain.note(self.vision_tokens(images, self.domain.layer))

    @torch.inference_mode()
    def vision_tokens(self, images: Sequence[Any], layer: str) -> Tensor:
        """Output of a layer of the vision encoder for images, `[B, N, W]` float32 on the CPU."""
        tokens: list[Tensor] = []
        with self.encoding():
            hook = self.encoder.get_submodule(layer).register_forward_hook(
                lambda module, arguments, output: tokens.append(output.float().cpu()))
            try:
                self.run_encoder(images)
            finally:
                hook.remove()
        return torch.cat(tokens)


class Remembered:
    """What was made of the last images, by the content of their pixels."""

    def __init__(self, most: int) -> None:
        self.most, self.known = most, OrderedDict[bytes, Any]()  # oldest use first

    def of(self, pixels: Sequence[Tensor], make: Callable[[list[Tensor]], Sequence[Any]]) -> list[Any]:
        """For each row of pixels what `make` makes of it; `make` gets the rows that are not known, together."""
        names = [hashlib.blake2b(row.contiguous().cpu().numpy(), digest_size=16).digest() for row in pixels]
        new = {name: row for name, row in zip(names, pixels, strict=True) if name not in self.known}
        if new:
            self.known.update(zip(new, make([*new.values()]), strict=True))
        for name in names:
            self.known.move_to_end(name)
        values = [self.known[name] for name in names]
        while len(self.known) > self.most:
            self.known.popitem(last=False)
        return values


@contextlib.contextmanager
def on_device(part: nn.Module, device: torch.device, offload: bool) -> Iterator[None]:
    """`part` on the device inside; back on the CPU afterwards when it is off-loaded."""
    if not offload or device.type == "cpu":
        yield
        return
    part.to(device)
    try:
        yield
    finally:
        part.to("cpu")
        free_memory(device)


def one_seed_each(seed: Any, count: int) -> list[int]:
    """The seeds of drawings: one for all, or one each.

    Raises:
        CodesError: another number of seeds than images. ConfigError: a seed that is no whole number of 64 bits.
    """
    given: Any = seed.tolist() if isinstance(seed, (Tensor, np.ndarray)) else seed
    several: Sequence[Any] = given if isinstance(given, (list, tuple, range)) else [given] * count
    seeds = [check_value(int, one, "The seed of a drawing", **SEEDS) for one in several]
    if len(seeds) != count:
        raise CodesError(f"{count} images were given with {len(seeds)} seeds.")
    return seeds
