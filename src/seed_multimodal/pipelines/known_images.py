"""How far an image is from those that a system learned.

    image ─► codes or features ─► conditioner ─► expected latents ─► preview ─┐
      └──────────────────────────────► pixels ────────────────────────────────┴─► 1 − correlation
                                          └─► corners ─► + distance from their usual colours

The preview is a linear map of the latents, enlarged. The correlation is a mean of two, both without
the blur, so that what is where counts, not the light: of the whole images, and of the fine details
of single regions, where few strong edges do not hide the others. Grain, as of letters, which no
learned image has, is added. For the background stand the corners, where the learned images have few
colours. Nothing is denoised, and no VAE runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from seed_multimodal.diffusion.conditioner import Conditioner, load_conditioner
from seed_multimodal.errors import ConfigError
from seed_multimodal.pipelines.config import KnownImages

SIDE = 64  # pixels of the images that are compared
REGIONS = 4  # in a row
BLUR, FINE_BLUR, GRAIN_BLUR = 6 / 64, 2 / 64, 1 / 64  # standard deviations, in sides of the image
GRAIN = 0.25  # weight of the share of grain in the details
COLOUR = 2.0  # weight of colours against brightness
CORNERS = (..., [0, 0, -1, -1], [0, -1, 0, -1])  # of [B, 3, S, S]: [B, 3, 4]
PREFACE = "I do not know this kind of picture. Nearest: "  # of an answer about an unlike image
SMALLEST = 1e-2  # a norm below it has no direction, a power below it is of an empty image


class ImageFamiliarity:
    """Distances of images, on the CPU (about 1 ms an image with nano's conditioners)."""

    def __init__(self, settings: KnownImages, conditioner: Conditioner) -> None:
        self.settings = settings
        self.conditioner = conditioner

    @classmethod
    def load(cls, settings: KnownImages | None, folder: Path | None) -> Self | None:
        """By the conditioner of a de-tokenizer's folder; None: the system does not measure it.

        Raises ConfigError: the folder has no conditioner.
        """
        if settings is None or folder is None or not folder.is_dir():
            return None
        conditioner = load_conditioner(folder)
        if conditioner is None:
            raise ConfigError(f"{folder}: known_images needs a conditioner, and it has none.")
        return cls(settings, conditioner)

    @torch.inference_mode()
    def distances(self, embeds: Tensor, pixels: Tensor, whole: Tensor | None = None) -> list[float]:
        """Of each image: from 0 to 2, its share of grain, and the distance of its corners' colours
        from usual ones.

        embeds: what the conditioner reads, [B, E] or [B, N, W].
        pixels: normalised, [B, 3, S, S].
        whole: the image of which they are views, [1, 3, S, S]; its corners count.
        """
        # 1. What the conditioner expects, and the pixels.
        expected = self.conditioner.expected_latents(embeds.cpu().float())
        weights = expected.new_tensor(self.settings.preview)  # [3, C + 1]
        preview = torch.einsum("bchw,kc->bkhw", expected, weights[:, :-1])
        preview = preview + weights[:, -1, None, None]
        preview = F.interpolate(preview, (SIDE, SIDE), mode="bilinear")
        pixels = pixels.cpu().float()
        compared = F.adaptive_avg_pool2d(pixels, SIDE)

        # 2. What is where, as a whole and in regions.
        details = _details(compared, BLUR)
        whole_images = _distances(_details(preview, BLUR), details)
        fine = _details(preview, FINE_BLUR), _details(compared, FINE_BLUR)
        distances = (whole_images + _distances(*fine, in_row=REGIONS)) / 2

        # 3. Grain.
        grain_power = _details(compared, GRAIN_BLUR).pow(2).mean((1, 2, 3))
        power = details.pow(2).mean((1, 2, 3))
        distances += GRAIN * grain_power / (power + SMALLEST)

        # 4. The background.
        if self.settings.corners:
            framed = pixels if whole is None else whole.cpu().float()
            usual = framed.new_tensor(self.settings.corners)  # [K, 3]
            distances += torch.cdist(framed[CORNERS].mT, usual).amin(2).mean(1)
        return [*map(float, distances)]


def _details(images: Tensor, blur: float) -> Tensor:
    """Square images [B, 3, S, S] without the blur, in stronger colours."""
    side = images.shape[-1]
    steps = torch.arange(side, dtype=images.dtype, device=images.device) / side
    weights = torch.exp(-((steps[:, None] - steps) ** 2) / (2 * blur**2))
    weights = weights / weights.sum(1, keepdim=True)
    details = images - weights @ images @ weights.T
    grey = details.mean(1, keepdim=True)
    return grey + COLOUR * (details - grey)


def _distances(first: Tensor, second: Tensor, in_row: int = 1) -> Tensor:
    """1 − correlation of square images [B, 3, S, S] → [B]: the mean of `in_row`² regions."""
    side = first.shape[-1] // in_row
    both = torch.stack([first, second])
    regions = both.unfold(3, side, side).unfold(4, side, side)  # [2, B, 3, rows, columns, s, s]
    values = regions.movedim(2, 4).flatten(4)  # [2, B, rows, columns, 3 · s²]
    values = values - values.mean(-1, keepdim=True)
    return 1 - F.cosine_similarity(*values, dim=-1, eps=SMALLEST).mean((1, 2))


def unknown_images_note(
    distances: Sequence[float | None], settings: KnownImages | None, notice: str
) -> str:
    """A note about images unlike those that the system learned, or empty; `notice`: its own."""
    if settings is None:
        return ""
    limit = settings.threshold
    unknown = [
        index for index, value in enumerate(distances) if value is not None and value > limit
    ]
    if not unknown:
        return ""
    if len(distances) == 1:
        which = "The image is"
    elif len(unknown) == 1:
        which = f"Image {unknown[0]} is"
    else:
        which = f"Images {', '.join(map(str, unknown))} are"
    note = f"{which} unlike those that this system learned, so the answer may be wrong."
    return f"{note} {notice}".strip()
