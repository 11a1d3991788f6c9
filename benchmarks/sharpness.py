"""How sharp are nano's drawings, and where is sharpness lost?

    python benchmarks/sharpness.py --model pretrained/nano --scenes 60

missing: squared error of a thing's pixels (the best of nine shifts by up to a pixel), as a share of
what the empty background would have; the median over the things of scenes of `val`.
sharpness: mean absolute difference of neighbours, enlarged to 128 pixels (bicubic).

Of the drawings, of images that are rebuilt from their codes or features, and of what no decoder can
pass: the scenes with their things at the places that the layout names, since small shifts and sizes
are not in the codes; these through the autoencoder; and through its decoder alone, from the latents
that suit it best.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seed_multimodal import MultimodalSystem
from seed_multimodal.diffusion.networks import encode_moments
from seed_nano.train.task import to_signed
from seed_nano.world.scene import SIZE, Scene, Slot, render_slots, scene_image
from seed_nano.world.splits import scenes
from seed_nano.world.words import describe

LARGE = 128
REACH = 0.55  # half the side of a thing's square, in its own sides
SHIFTS = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]
STEPS, LEARNING_RATE = 150, 0.05  # of the search for the best latents

Images = Sequence[Image.Image]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pretrained/nano")
    parser.add_argument("--scenes", type=int, default=60)
    args = parser.parse_args()
    system = MultimodalSystem.from_pretrained(args.model, device="cpu", log=None)
    vae = system.images.decoder.vae
    chosen = scenes("val")[: args.scenes]
    truth = [scene_image(scene, SIZE) for scene in chosen]
    placed = [in_place(scene) for scene in chosen]
    with torch.no_grad():
        latents = encode_moments(vae, to_pixels(placed)).chunk(2, dim=1)[0]
    rows = {
        "scenes": truth,
        "rebuilt": system.reconstruct(truth),
        "drawn": system.draw([describe(scene) for scene in chosen], seed=0),
        "at the layout's places": placed,
        "these through the autoencoder": decoded(vae, latents),
        "these from the best latents": decoded(vae, best_latents(vae, latents, placed)),
    }
    print(f"| {args.model}, n {len(chosen)} | missing | sharpness |\n| --- | ---: | ---: |")
    large = [scene_image(scene, LARGE) for scene in chosen]
    print(f"| scenes at {LARGE} pixels | – | {sharpness(large):.2f} |")
    for name, images in rows.items():
        print(f"| {name} | {missing(chosen, images):.3f} | {sharpness(images):.2f} |")


def in_place(scene: Scene) -> Image.Image:
    """A scene without small shifts."""
    slots = scene.slots(shifted=False)
    return Image.fromarray(render_slots(scene.style, scene.background, slots, SIZE))


# ---- measures


def missing(chosen: Sequence[Scene], images: Images) -> float:
    """Median over all things of the scenes."""
    shares = []
    for scene, image in zip(chosen, images, strict=True):
        seen = np.asarray(image.convert("RGB").resize((SIZE, SIZE)), np.float32)
        empty = np.asarray(render_slots(scene.style, scene.background, [], SIZE), np.float32)
        for slot in scene.slots():
            alone = render_slots(scene.style, scene.background, [slot], SIZE).astype(np.float32)
            square = square_of(slot)
            energy = np.mean((empty[square] - alone[square]) ** 2)
            errors = [error(seen, alone, square, shift) for shift in SHIFTS]
            shares.append(min(errors) / max(energy, 1))
    return float(np.median(shares))


def square_of(slot: Slot) -> tuple[slice, slice]:
    """Rows and columns of a thing."""
    half = slot.side * REACH
    low = [max(0, round((middle - half) * SIZE)) for middle in (slot.y, slot.x)]
    high = [min(SIZE, round((middle + half) * SIZE)) for middle in (slot.y, slot.x)]
    return slice(low[0], high[0]), slice(low[1], high[1])


def error(
    seen: np.ndarray, alone: np.ndarray, square: tuple[slice, slice], shift: tuple[int, int]
) -> float:
    """Mean squared error in the square of a thing, of an image that is shifted."""
    y, x = 1 + shift[0], 1 + shift[1]
    moved = np.pad(seen, ((1, 1), (1, 1), (0, 0)), "edge")[y : y + SIZE, x : x + SIZE]
    return float(np.mean((moved[square] - alone[square]) ** 2))


def sharpness(images: Images) -> float:
    """Mean over images."""
    values = []
    for image in images:
        large = image.convert("RGB").resize((LARGE, LARGE), Image.Resampling.BICUBIC)
        pixels = np.asarray(large, np.float32)
        values += [np.abs(np.diff(pixels, axis=axis)).mean() for axis in (0, 1)]
    return float(np.mean(values))


# ---- the autoencoder


def to_pixels(images: Images) -> Tensor:
    """In -1..1, [B, 3, S, S]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return to_signed(pixels.permute(0, 3, 1, 2))


@torch.no_grad()
def decoded(vae: torch.nn.Module, latents: Tensor) -> Images:
    """Images of latents."""
    pixels = vae.decode(latents).sample.clamp(-1, 1)
    rows = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(row) for row in rows]


def best_latents(vae: torch.nn.Module, start: Tensor, images: Images) -> Tensor:
    """Latents whose decoded images are nearest to some images, in pixels and in edges."""
    target = to_pixels(images)
    latents = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([latents], LEARNING_RATE)
    for _ in range(STEPS):
        difference = vae.decode(latents).sample - target
        edges = [difference.diff(dim=axis).abs().mean() for axis in (2, 3)]
        loss = difference.abs().mean() + difference.square().mean() + sum(edges)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return latents.detach()


if __name__ == "__main__":
    main()
