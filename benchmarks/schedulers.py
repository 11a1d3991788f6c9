"""Compare few steps of a scheduler with 200 steps of DDIM: mean PSNR of drawings in dB.

One JSON line for each scheduler.

    python benchmarks/schedulers.py images/*.png --guidance 10 --start noise

`PNDM`: Stable Diffusion 2.1's own; `DDIM`: the shipped folders', preset "original";
`fast`: that preset.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from seed_multimodal.diffusion.conditioner import seeded_noise
from seed_multimodal.pipelines.base import MultimodalSystem

STEPS = (4, 6, 8, 10, 12, 20)
EXACT = 200
SEEDS = 3


def main() -> None:
    """Draw each image with three seeds by each scheduler."""
    import diffusers

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+")
    parser.add_argument("--model", default="pretrained/nano")
    parser.add_argument("--guidance", type=float, help="default: the folder's")
    parser.add_argument("--start", choices=("layout", "noise"), default="layout")
    args = parser.parse_args()
    codec = MultimodalSystem.from_pretrained(args.model, log=None).images
    decoder = codec.decoder
    values = [value for value in codec.encode(args.images) for _ in range(SEEDS)]
    if args.start == "noise":
        channels = decoder.vae.config.latent_channels
        decoder.conditioner.warm_latents = lambda embeds, generators, scheduler, condition, size: (
            seeded_noise(generators, (channels, *size))
        )

    def draw(steps: int, preset: str) -> npt.NDArray[np.float32]:
        images = codec.draw(
            values,
            seeds=range(len(values)),
            num_inference_steps=steps,
            preset=preset,
            guidance_scale=args.guidance,
        )
        return np.stack([np.asarray(image, np.float32) for image in images])

    # The schedulers differ in nothing but their rule of steps.
    config = decoder.scheduler.config
    ddim: Any = diffusers.DDIMScheduler.from_config(config)
    pndm = diffusers.PNDMScheduler.from_config(
        config, skip_prk_steps=True, timestep_spacing="leading", steps_offset=1
    )
    # The reference: 200 steps of DDIM from the same noise.
    decoder.scheduler = ddim
    exact = draw(EXACT, "original")
    for name, scheduler in (("PNDM", pndm), ("DDIM", ddim), ("fast", ddim)):
        decoder.scheduler = scheduler
        errors = [
            ((draw(steps, "fast" if name == "fast" else "original") - exact) ** 2).mean((1, 2, 3))
            for steps in STEPS
        ]
        psnr = [
            round(float(np.mean(10 * np.log10(255**2 / error.clip(1e-6)))), 1) for error in errors
        ]
        print(
            json.dumps(
                {
                    "model": args.model,
                    "guidance": args.guidance,
                    "start": args.start,
                    "scheduler": name,
                    "drawings": len(values),
                    "steps": STEPS,
                    "psnr_db": psnr,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
