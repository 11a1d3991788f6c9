"""Stage `sharp`: the autoencoder's decoder learns to draw what latents of drawings mean.

A loss on pixels rewards a mean of all images that the codes allow, which is blurred. Here the
latents are those that the finished system draws from scenes' codes, the targets are the scenes with
their things at the places that the layout names, since small shifts are not in the codes, and a
discriminator of patches (Isola et al. 2017) tells drawn images from true ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from seed_multimodal.pipelines.images import open_images
from seed_nano.train.task import Loss, NanoTask, to_signed
from seed_nano.train.vae import reconstruction_loss
from seed_nano.train.workspace import Workspace
from seed_nano.world.scene import Scene, render_slots, scene_image, thing_mask

DECEPTION = 0.1  # weight of the discriminator's opinion
WIDTHS = (32, 64, 96)
BATCH = 64


def discriminator() -> nn.Sequential:
    """Images `[B, 3, S, S]` → an opinion of each patch, `[B, 1, s, s]`; above 0 it is true."""
    layers: list[nn.Module] = []
    channels = 3
    for width in WIDTHS:
        convolution = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        layers += [nn.utils.parametrizations.spectral_norm(convolution), nn.LeakyReLU(0.2)]
        channels = width
    last = nn.Conv2d(channels, 1, 3, padding=1)
    return nn.Sequential(*layers, nn.utils.parametrizations.spectral_norm(last))


class SharpTask(NanoTask):
    """Goes to `{decoder}/vae`."""

    def __init__(self, space: Workspace) -> None:
        torch.manual_seed(space.config.seed)
        codec = open_images(space.out)
        self.vae: Any = codec.decoder.vae
        self.scenes_drawn = space.pool[: space.config.sharp]
        self.features = space.cached(
            "drawn_latents", "assemble", lambda: drawn_latents(codec, self.scenes_drawn)
        )
        self.vae.requires_grad_(False)
        self.vae.decoder.requires_grad_(True)
        self.vae.to(memory_format=torch.channels_last)
        self.judge = discriminator()
        parts = {"vae": self.vae, "judge": self.judge}
        super().__init__(space, "sharp", nn.ModuleDict(parts))

    def batch(self, micro_step: int) -> Mapping[str, Tensor]:
        """Latents, and images and masks of their scenes."""
        rows = self.indices(micro_step, len(self.features))
        size = self.space.config.image_size
        chosen = [self.scenes_drawn[row] for row in rows]
        images = np.stack([image_in_place(scene, size) for scene in chosen])
        masks = np.stack([thing_mask(scene, size, shifted=False) for scene in chosen])
        batch = {
            "latents": self.features[rows].float(),
            "image": torch.from_numpy(images).permute(0, 3, 1, 2),
            "mask": torch.from_numpy(masks)[:, None],
        }
        return {name: value.to(self.space.device) for name, value in batch.items()}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        # 1. The decoder, whose images the discriminator, as it is, is to take for true.
        target = to_signed(batch["image"])
        drawn = self.vae.decode(batch["latents"]).sample.float()
        error = reconstruction_loss(drawn, target, batch["mask"])
        fixed = {name: value.detach() for name, value in self.judge.named_parameters()}
        deception = -functional_call(self.judge, fixed, drawn).mean()

        # 2. The discriminator, by the hinge loss.
        true, false = self.judge(target), self.judge(drawn.detach())
        opinion = F.relu(1 - true).mean() + F.relu(1 + false).mean()
        metrics = {"error": error.detach(), "opinion": opinion.detach()}
        return error + DECEPTION * deception + opinion, metrics

    def save_result(self) -> None:
        self.vae.cpu().half().save_pretrained(self.space.decoder_folder / "vae")


def image_in_place(scene: Scene, size: int) -> np.ndarray:
    """A scene without small shifts, uint8 `[size, size, 3]`."""
    return render_slots(scene.style, scene.background, scene.slots(shifted=False), size)


@torch.no_grad()
def drawn_latents(codec: Any, scenes: list[Scene]) -> Tensor:
    """What the system draws from the codes of scenes, before the autoencoder; float16 `[N, C, h,
    w]`."""
    decoder = codec.decoder
    settings = decoder.check_settings()
    latents = []
    for start in range(0, len(scenes), BATCH):
        images = [scene_image(scene) for scene in scenes[start : start + BATCH]]
        embeds = codec.decoder_inputs(codec.encode(images))
        generators = [torch.Generator().manual_seed(start + row) for row in range(len(images))]
        latents.append(decoder.denoise(settings, generators, embeds).half().cpu())
    return torch.cat(latents)
