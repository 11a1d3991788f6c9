"""What the picture halves of all systems share: opening pictures, a de-tokenizer that is loaded when it is first
needed, and parts that stay on the CPU while they are not in use.

A half may be used from several threads: it reads or draws for one of them at a time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.device import free_memory
from seed_multimodal.errors import CheckpointError, CodesError
from seed_multimodal.images.io import ImageLimits, ImageSource, open_image
from seed_multimodal.quiet import quiet_loading
from seed_multimodal.settings import SEEDS, check_keys, check_value
from seed_multimodal.system.domain import Domain

Picture = ImageSource
PARTS = frozenset(("llm", "encoder", "decoder"))  # of a system, that can be off-loaded


def off_loaded(parts: bool | Collection[str]) -> frozenset[str]:
    """The names of the parts that are on their device only while they work; True: all of them. `ConfigError` for
    another name."""
    named = () if isinstance(parts, bool) or parts is None else (parts,) if isinstance(parts, str) else tuple(parts)
    check_keys(named, PARTS, "offload")
    return PARTS if parts is True else frozenset(named)


class PictureHalf:
    """Reads pictures with an encoder, draws them with a de-tokenizer.

    Args:
        model: reads pictures. load_decoder: makes the de-tokenizer when the first picture is drawn; `None`: this half
            cannot draw.
        device: where pictures are read; `drawing_device`: where they are drawn, None for the same.
        at_least: a picture of more than 12.5 megapixels is reduced while it is decoded, to this side or more.

    Attributes:
        has_codes: whether a picture is a row of codes, of which the first ones can be shown.
        own_settings: of `draw`, beside the de-tokenizer's.
        domain: what the system was trained on.
    """

    has_codes = False
    own_settings: ClassVar[tuple[str, ...]] = ()
    domain: Domain | None = None

    def __init__(self, model: Any, *, load_decoder: Callable[[], Any] | None, device: torch.device,
                 drawing_device: torch.device | None = None, limits: ImageLimits | None = None,
                 at_least: int | None = None, offload_encoder: bool = False, offload_decoder: bool = False) -> None:
        self.model = model
        self.device, self.drawing_device = device, drawing_device or device
        self.limits = limits or ImageLimits()
        self.at_least = at_least
        self._load_decoder = load_decoder
        self._decoder: Any = None
        self._lock = threading.RLock()  # held while the models compute, or move between devices
        self.offload(encoder=offload_encoder, decoder=offload_decoder)

    @property
    def encoder(self) -> nn.Module:
        """The large part of `model`, which can stay on the CPU."""
        encoder: nn.Module = self.model
        return encoder

    @property
    def tower(self) -> nn.Module:
        """The vision tower."""
        return self.encoder

    def see(self, pictures: Sequence[Any]) -> None:
        """Run the tower on whole pictures, or pixels that are ready."""
        raise NotImplementedError

    @torch.inference_mode()
    def tokens_of(self, pictures: Sequence[Any], layer: str) -> Tensor:
        """What a layer of the tower makes of pictures, [B, T, W] in float32 on the CPU."""
        found: list[Tensor] = []
        with self.reading():
            hook = self.tower.get_submodule(layer).register_forward_hook(
                lambda _module, _given, made: found.append(made.float().cpu()))
            try:
                self.see(pictures)
            finally:
                hook.remove()
        return torch.cat(found)

    def note(self, pictures: Sequence[Any]) -> str:
        """One sentence where pictures are unlike those of the training, or nothing."""
        if self.domain is None or not len(pictures):
            return ""
        return self.domain.note(self.tokens_of(pictures, self.domain.layer))

    def offload(self, *, encoder: bool, decoder: bool) -> None:
        """Choose which parts stay on the CPU while they are not in use."""
        with self._lock:
            self.offload_encoder, self.offload_decoder = encoder, decoder
            if encoder:
                self.encoder.to("cpu")
            self._place_decoder()

    def to(self, device: torch.device) -> None:
        """Move everything to another device; what is offloaded stays on the CPU while it is not in use."""
        with self._lock:
            self.device = self.drawing_device = device
            self.model.to(device)
            self.offload(encoder=self.offload_encoder, decoder=self.offload_decoder)

    def _place_decoder(self) -> None:
        if self._decoder is None:
            return
        if self.offload_decoder and self.drawing_device.type != "cpu":
            self._decoder.enable_cpu_offload(self.drawing_device)
        else:
            self._decoder.to(self.drawing_device)

    @property
    def can_draw(self) -> bool:
        """Whether pictures can be drawn here."""
        return self._load_decoder is not None

    @property
    def decoder(self) -> Any:
        """The de-tokenizer, loaded now if this is its first use.

        Raises:
            CheckpointError: the system was opened without one, or its folder is not there.
        """
        with self._lock:
            if self._decoder is None:
                if self._load_decoder is None:
                    raise CheckpointError("This system has no de-tokenizer, or was opened without it (load_decoder="
                                          "False), so it cannot draw.")
                with quiet_loading("diffusers", "transformers"):
                    self._decoder = self._load_decoder()
                self._place_decoder()
            return self._decoder

    def check_keys(self, decode: Mapping[str, Any]) -> None:
        """Refuse settings that the de-tokenizer has not: `ConfigError` names the nearest."""
        check_keys(decode, [*self.decoder.setting_names, *self.own_settings], "Drawing setting")

    def check_drawing(self, **decode: Any) -> None:
        """Refuse settings of `draw` before a language model works for it.

        Raises:
            ConfigError: an unknown one, or a value that the de-tokenizer refuses. CheckpointError: there is none.
        """
        self.check_keys(decode)
        with self._lock:
            self.decoder.check_settings(**decode)

    def open(self, picture: Picture, name: str | None = None) -> Image.Image:
        """A picture from a file, bytes, PIL or an array, as RGB; raises `ImageError` naming it."""
        return open_image(picture, name=name, limits=self.limits, at_least=self.at_least)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, the encoder is on its device, and this thread alone uses it."""
        with self._lock, resident(self.encoder, self.device, self.offload_encoder):
            yield

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Inside, this thread alone uses the de-tokenizer."""
        with self._lock:
            yield


@contextlib.contextmanager
def resident(part: nn.Module | Any, device: torch.device, offload: bool = True) -> Iterator[None]:
    """`part` on the device inside; back on the CPU afterwards when it is offloaded."""
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
        CodesError: another number of seeds than pictures. ConfigError: a seed that is no whole number of 64 bits.
    """
    given: Any = seed.tolist() if isinstance(seed, (Tensor, np.ndarray)) else seed
    several: Sequence[Any] = given if isinstance(given, (list, tuple, range)) else [given] * count
    seeds = [check_value(int, one, "The seed of a drawing", **SEEDS) for one in several]
    if len(seeds) != count:
        raise CodesError(f"{count} pictures were given with {len(seeds)} seeds.")
    return seeds
