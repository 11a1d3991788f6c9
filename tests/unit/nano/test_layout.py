"""The layout decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from seed_nano.layout import LayoutConfig, LayoutDecoder


@torch.no_grad()
def test_warm_latents_noise_the_mean_by_the_schedule(tmp_path):
    """At any size, from the mean of several embeddings, after saving and loading."""
    from diffusers import DDIMScheduler

    classes = {"first": 2, "second": 3, "style": 2, "background": 2, "layout": 2}
    torch.manual_seed(0)
    layout = LayoutDecoder(
        LayoutConfig(
            24,
            4,
            8,
            0,
            classes,
            [[(0, 0.5, 0.5, 0.5)]] * 2,
            width=8,
            features=4,
            side=2,
            hidden=8,
            depth=1,
            coarse=4,
            patch=1,
        )
    )
    layout.save_pretrained(tmp_path)
    layout = LayoutDecoder.from_pretrained(tmp_path)
    embeds = torch.randn(2, 8, 6)
    scheduler = DDIMScheduler()
    signal = float(scheduler.alphas_cumprod[-1])
    predicted = layout(embeds.unflatten(1, (4, 2)).mean(2).flatten(1))[0]
    for size in ((8, 8), (8, 12)):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        start = layout.warm_latents(embeds, generators, scheduler, size=size)
        mean = F.interpolate(predicted, size, mode="bilinear", antialias=True)
        assert start.shape == mean.shape
        if size == (8, 8):
            generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
            noise = torch.stack([torch.randn(4, 8, 8, generator=rng) for rng in generators])
            expected = signal**0.5 * mean + (1 - signal) ** 0.5 * noise
            torch.testing.assert_close(start, expected, rtol=1e-4, atol=1e-4)
