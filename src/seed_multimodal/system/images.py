"""The image side of a system: a vision encoder, and a de-tokenizer that is loaded when the first image is drawn; and
where the parts of a system compute."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from seed_multimodal.device import RELEASED_FP16, Runtime, choose_device
from seed_multimodal.errors import CheckpointError, CodesError
from seed_multimodal.images.io import open_image
from seed_multimodal.language.generator import on_device
from seed_multimodal.progress import quiet_loading
from seed_multimodal.settings import SEEDS, check_value
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.weights import load_state_dict

Log = Callable[[str], None] | None
FAMILIES = {"seed_llama": "seed.pipeline:SeedLlama", "seed_x": "seed_x.pipeline:SeedX", "lavit": "lavit.pipeline:Lavit"}
OFFLOADED = frozenset(("llm", "encoder", "decoder"))


@dataclass(frozen=True)
class Runtimes:
    """Where the parts of a system compute; `offload`: those of "llm", "encoder" and "decoder" that are on the CPU while
    they do not work."""

    llm: Runtime
    images: Runtime
    drawing: Runtime
    quantization: str | None = None
    offload: Collection[str] = ()
    load_decoder: bool = True

    @property
    def llm_home(self) -> torch.device:
        """Where the language model is loaded."""
        return torch.device("cpu") if "llm" in self.offload else self.llm.device


def family(name: str) -> Any:
    """The class of a family: "seed_llama", "seed_x" or "lavit"."""
    module, _, kind = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(f"seed_multimodal.{module}"), kind)


def open_images(name: str | Path | SystemConfig, *, device: str = "auto", dtype: Any = "auto", offload: bool = False,
                log: Log = None) -> Any:
    """The `ImageCodec` of a system without its language model, or of an image tokenizer alone."""
    config = name if isinstance(name, SystemConfig) else SystemConfig.find(name)
    config.require("vision" if config.system == "seed_x" else "tokenizer")
    runtime = choose_device(device, dtype, log, fp16=RELEASED_FP16)
    pipeline = importlib.import_module(family(config.system).__module__)
    return pipeline.load_images(config, Runtimes(runtime, runtime, runtime, offload=OFFLOADED if offload else ()))


class ImageCodec:
    """Images ⇄ codes or features; threads use it one at a time. A family defines `encode(images)`, which gives codes or
    features, and `draw(values, *, seeds, batch_size, **settings)`, which makes PIL images of them. `load_decoder` makes
    the de-tokenizer; larger images are reduced to `at_least` or more on a side while they are opened."""

    progressive: ClassVar[bool] = False  # whether the first codes of an image can be drawn
    drawing_settings: ClassVar[tuple[str, ...]] = ()  # what `draw` accepts
    own_settings: ClassVar[tuple[str, ...]] = ()  # of these, what the de-tokenizer does not know
    domain: Domain | None = None
    name, advice = "This system", ""  # in the sentence about a missing de-tokenizer
    encode: Callable[..., Any]
    draw: Callable[..., list[Image.Image]]

    def __init__(self, model: nn.Module, *, load_decoder: Callable[[], Any] | None, device: torch.device,
                 drawing_device: torch.device | None = None, at_least: int | None = None,
                 offload: Collection[str] = ()) -> None:
        self.model, self.device, self.drawing_device = model, device, drawing_device or device
        self.at_least, self._load_decoder, self._decoder = at_least, load_decoder, None
        self._lock = threading.RLock()  # held while the models compute
        self.offload(offload)

    @property
    def encoder(self) -> nn.Module:
        """The vision encoder, whose tokens the domain reads."""
        return self.model

    def run_encoder(self, images: Sequence[Any]) -> None:
        """Run the vision encoder on whole images."""
        self.encode(images)

    @property
    def can_draw(self) -> bool:
        return self._load_decoder is not None

    @property
    def decoder(self) -> Any:
        """The de-tokenizer, loaded at its first use; raises `CheckpointError` if there is none."""
        with self._lock:
            if self._decoder is None:
                if self._load_decoder is None:
                    raise CheckpointError(f"{self.name} has no de-tokenizer, so it cannot draw{self.advice}.")
                with quiet_loading("diffusers", "transformers"):
                    self._decoder = self._load_decoder()
                self.offload(self._offload)
            return self._decoder

    def offload(self, parts: Collection[str]) -> None:
        """Keep these of "encoder" and "decoder" on the CPU while they do not work, and the others not."""
        self._offload = parts
        self.model.to("cpu" if "encoder" in parts else self.device)
        if self._decoder is not None:
            place = self._decoder.enable_cpu_offload if "decoder" in parts else self._decoder.to
            place(self.drawing_device)

    def check_drawing(self, **settings: Any) -> None:
        """Raise for unknown settings of `draw` and a missing de-tokenizer before the language model works for it."""
        self.decoder.check_settings(**{name: value for name, value in settings.items()
                                       if name not in self.own_settings})

    def open(self, image: Any, name: str | None = None) -> Image.Image:
        """An image from a file, bytes, PIL or an array, as RGB; raises `ImageError` naming it."""
        return open_image(image, name=name, at_least=self.at_least)

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """Inside, the encoder is on its device, and this thread alone uses it."""
        with self._lock, on_device(self.model, self.device if "encoder" in self._offload else None):
            yield

    @contextlib.contextmanager
    def drawing(self) -> Iterator[Any]:
        """Inside, this thread alone uses the de-tokenizer, which it yields."""
        with self._lock:
            yield self.decoder

    def note(self, images: Sequence[Any]) -> str:
        """One sentence where images are unlike those of the training, or nothing."""
        known = self.domain if len(images) else None
        return known.note(self.vision_tokens(images, known.layer)) if known else ""

    @torch.inference_mode()
    def vision_tokens(self, images: Sequence[Any], layer: str) -> Tensor:
        """Output of a layer of the vision encoder for images, `[B, N, W]` float32 on the CPU."""
        tokens: list[Tensor] = []
        with self.encoding():
            with self.encoder.get_submodule(layer).register_forward_hook(
                    lambda module, arguments, output: tokens.append(output.float().cpu())):
                self.run_encoder(images)
        return torch.cat(tokens)


class Remembered:
    """What was made of the last images, by the content of their pixels."""

    def __init__(self, most: int) -> None:
        self.most, self.known = most, dict[bytes, Any]()  # oldest use first

    def of(self, pixels: Sequence[Tensor], make: Callable[[list[Tensor]], Sequence[Any]]) -> list[Any]:
        """For each row of pixels what `make` makes of it; `make` gets the rows that are not known, together."""
        names = [hashlib.blake2b(row.contiguous().cpu().numpy(), digest_size=16).digest() for row in pixels]
        new = {name: row for name, row in zip(names, pixels, strict=True) if name not in self.known}
        self.known |= zip(new, make([*new.values()]) if new else (), strict=True)
        used = {name: self.known.pop(name) for name in dict.fromkeys(names)}
        self.known |= used
        for name in [*self.known][:-self.most]:
            del self.known[name]
        return [used[name] for name in names]


class Domain(nn.Module):
    """What a system was trained on: a small head on one layer of its vision encoder (`domain` of `system.json`).

    Tokens of the layer [B, T, W] → scores [B]; above `threshold` an image is unlike those of the training.
    """

    name, layer, threshold = "", "", 0.0  # `name` of what was learned, the vision encoder's `layer`

    def __init__(self, tokens: int, width: int, projected: int = 8, hidden: int = 32) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.project = nn.Linear(width, projected)
        self.hidden = nn.Linear(tokens * projected, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, tokens_BTW: Tensor) -> Tensor:
        projected = F.gelu(self.project((tokens_BTW - self.mean) / self.scale))
        return torch.as_tensor(self.score(F.gelu(self.hidden(projected.flatten(1))))[:, 0])

    @torch.inference_mode()
    def note(self, tokens_BTW: Tensor) -> str:
        """One sentence where images are unlike those of the training, or nothing."""
        unlike = (self(tokens_BTW) > self.threshold).nonzero()[:, 0].tolist()
        which = "This" if len(tokens_BTW) == 1 else f"Image {', '.join(str(index + 1) for index in unlike)}"
        return f"{which} does not look like {self.name}; for photographs use the original weights." if unlike else ""


def load_domain(file: Path | None, threshold: float) -> Domain | None:
    """The domain in a file, if one is named; `CheckpointError` for a missing or another file."""
    if file is None:
        return None
    state = {name: value.float() for name, value in load_state_dict(file).items()}
    try:
        (projected, width), (hidden, tokens) = state["project.weight"].shape, state["hidden.weight"].shape
        domain = Domain(tokens // projected, width, projected, hidden).requires_grad_(False)
        domain.load_state_dict(state)
        with safe_open(file, framework="pt") as handle:
            about = handle.metadata()
        domain.name, domain.layer, domain.threshold = about["name"], about["layer"], threshold
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{file}: holds no domain of a system; `domain` of system.json may be null.") from error
    return domain


def one_seed_each(seed: Any, count: int) -> list[int]:
    """The seeds of drawings: one for all, or one each; raises `CodesError` for another number of them."""
    several = seed if isinstance(seed, (list, tuple, range)) else [seed] * count
    seeds = [check_value(int, one, "The seed of a drawing", **SEEDS) for one in several]
    if len(seeds) != count:
        raise CodesError(f"{count} images were given with {len(seeds)} seeds.")
    return seeds
