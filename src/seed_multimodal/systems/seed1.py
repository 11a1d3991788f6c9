"""`Seed1`: the first SEED tokenizer and Stable Diffusion as one object: pictures ⇄ 32 codes.

    model = Seed1.from_pretrained("pretrained", device="auto")
    codes = model.tokenize(["images/cat.jpg"])        # [1, 32]
    pictures = model.reconstruct(["images/cat.jpg"])  # or model.draw(codes)

Pictures are squashed to the tower's size (bicubic), as the original did. The de-tokenizer is loaded when the first
picture is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seed_multimodal.device import RELEASED_FP16, choose_device
from seed_multimodal.errors import CheckpointError
from seed_multimodal.hub import locate
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.seed.checkpoints import SEED1
from seed_multimodal.seed.modeling import Seed1Tokenizer
from seed_multimodal.systems.picture_half import Picture
from seed_multimodal.systems.pictures import Codes, PictureCodec

if TYPE_CHECKING:
    from PIL.Image import Image

    from seed_multimodal.seed.configuration import Seed1Config

DEFAULT_FOLDER = "pretrained"
# Where a tokenizer folder's own diffusion model may lie; the last is the original's single file.
DIFFUSION_NAMES = ("diffusion_model", "stable-diffusion-v1-4", "sd-v1-4.ckpt")


class Seed1:
    """Tokenizer and de-tokenizer; `codec` holds both."""

    def __init__(self, tokenizer: Seed1Tokenizer, *, load_decoder: Callable[[], Any] | None = None,
                 device: torch.device | None = None) -> None:
        self.tokenizer = tokenizer
        self.codec = PictureCodec(tokenizer, seed_image_processor(tokenizer.config.vit.image_size),
                                  load_decoder=load_decoder, device=device or tokenizer.device)

    @classmethod
    def from_pretrained(cls, folder: str | Path = DEFAULT_FOLDER, *, diffusion: str | Path | None = None,
                        vision: str | Path | None = None, config: Seed1Config | None = None,
                        device: str | torch.device = "auto", dtype: str | torch.dtype = "auto",
                        load_decoder: bool = True, safety_checker: bool = True,
                        log: Callable[[str], None] | None = print) -> Seed1:
        """Load the tokenizer now and the de-tokenizer when the first picture is drawn.

        Args:
            folder: tokenizer folder or file, see `seed.checkpoints`.
            diffusion: diffusers folder of Stable Diffusion 1; default: `diffusion_model` or `stable-diffusion-v1-4`
                in `folder`, else `pretrained/stable-diffusion-v1-4`.
            vision: file of the vision tower, if it is not in or beside `folder`.
            config: sizes of weights that are not of released width and have no config.json.
            load_decoder: False never draws, and needs no diffusion model.
            safety_checker: use the diffusion folder's checker if it holds one.

        Raises:
            CheckpointError: weights that are missing (what to download and where to put it), damaged or another's.
        """
        place = locate(folder)
        if place is None:
            raise CheckpointError(f"{folder}: there is no such SEED-1 tokenizer; {SEED1.advice(folder)}.")
        runtime = choose_device(device, dtype, log, fp16=RELEASED_FP16)
        tokenizer = Seed1Tokenizer.from_pretrained(place, vision=vision, config=config, device=runtime.device,
                                                   dtype=runtime.dtype, log=log)
        load = partial(_open_decoder, find_diffusion(place, diffusion), runtime.device, runtime.dtype,
                       safety_checker) if load_decoder else None
        return cls(tokenizer, load_decoder=load, device=runtime.device)

    def tokenize(self, pictures: Picture | Sequence[Picture]) -> Tensor:
        """One picture or several (files, bytes, PIL) → codes `[B, 32]` int64 on the CPU; `ImageError` names a bad one.
        """
        return self.codec.tokenize(pictures)

    def embeds(self, codes: Codes | Sequence[Sequence[int]]) -> Tensor:
        """Codes `[B, 32]` (or one row) → embeddings that condition the diffusion model, `[B, 77, 768]`."""
        return self.tokenizer.decode(self.codec.check_codes(codes))

    def draw(self, codes: Codes | Sequence[Sequence[int]], *, seed: int | Sequence[int] = 42, batch_size: int = 6,
             **decode: Any) -> list[Image]:
        """Codes `[B, 32]` (or one row) → B pictures.

        Args:
            seed: one for all pictures, or one each.
            batch_size: pictures per pass through the U-Net.
            decode: passed to the de-tokenizer (`num_inference_steps`, `guidance_scale`, `scheduler`, `height`, …).
        """
        return self.codec.draw(codes, seed=seed, batch_size=batch_size, **decode)

    def reconstruct(self, pictures: Picture | Sequence[Picture], *, seed: int | Sequence[int] = 42,
                    batch_size: int = 6, **decode: Any) -> list[Image]:
        """Pictures → the pictures that their codes stand for, one each."""
        return self.draw(self.tokenize(pictures), seed=seed, batch_size=batch_size, **decode)


def find_diffusion(folder: Path, diffusion: str | Path | None = None) -> Path:
    """The diffusion model that belongs to a tokenizer folder (or file); not checked to be there."""
    from seed_multimodal.seed.diffusion import SD_FOLDER

    if diffusion is not None:
        return locate(diffusion) or Path(diffusion)
    home = folder if folder.is_dir() else folder.parent
    beside = next((home / name for name in DIFFUSION_NAMES if (home / name).exists()), None)
    return beside or locate(SD_FOLDER) or Path(SD_FOLDER)


def _open_decoder(place: Path, device: torch.device, dtype: torch.dtype, safety_checker: bool) -> Any:
    from seed_multimodal.seed.diffusion import StableDiffusionDetokenizer

    return StableDiffusionDetokenizer.from_pretrained(place, device=device, dtype=dtype, safety_checker=safety_checker)
