"""`demo_recon.py`: SEED-1 turns an image into 32 codes, and the codes into images.

Flags, file names and defaults are the original demo's. Unlike there, several images are possible,
sample k has the seed `--seed` + k whatever the device, and nothing is downloaded.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from seed_multimodal.cli import common
from seed_multimodal.disk import writable_folder
from seed_multimodal.entry import add_device, log_line, run_program
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import save_image

if TYPE_CHECKING:
    from torch import Tensor

    from seed_multimodal.compat.seed_llama import Seed1


def recon_script(description: str | None, argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = common.program_parser("demo_recon.py", str(description))
    common.add_flags(parser, "demo_recon.py")
    add_device(parser, None, "by --precision")
    return run_program(parser, _recon, argv)


def _recon(args: Namespace) -> int:
    # 1. The model.
    writable_folder(args.out, ConfigError)
    with common.loading(args):
        import diffusers

        from seed_multimodal.compat.seed_llama import Seed1

        dtype = args.dtype or ("float32" if args.precision == "full" else "auto")
        model = Seed1.from_pretrained(
            args.model,
            diffusion=args.ckpt,
            diffusion_config=args.config,
            device=args.device,
            dtype=dtype,
            log=log_line,
        )
        decoder = model.images.decoder

    # 2. Settings of drawing; the default size is the one that the U-Net was trained on.
    trained_size = decoder.unet.config.sample_size * decoder.factor
    settings = {
        "num_inference_steps": args.ddim_steps,
        "guidance_scale": args.scale,
        "height": args.height or trained_size,
        "width": args.width or trained_size,
    }
    sampler = diffusers.DPMSolverMultistepScheduler if args.dpm_solver else diffusers.PNDMScheduler
    decoder.scheduler = sampler.from_config(decoder.scheduler.config)
    decoder.check_settings(**settings)

    # 3. The codes of each image, and images of them.
    def rebuild(name: str, image: Image.Image) -> None:
        codes = model.tokenize([image])[0]
        print(" ".join(map(str, codes.tolist())))
        for path in _draw_samples(model, codes, args, settings):
            print(path)

    return common.run_each(
        args, args.image or [str(common.cat_image())], rebuild, model.images.open
    )


def _draw_samples(
    model: Seed1, codes: Tensor, args: Namespace, settings: common.Options
) -> list[Path]:
    """All samples of one image; returns the files written."""
    # 1. Images; with --fixed_code every iteration has the seeds of the first one.
    images: list[Image.Image] = []
    for iteration in range(args.n_iter):
        first_seed = args.seed
        if not args.fixed_code:
            first_seed += iteration * args.n_samples
        images += model.draw(
            [codes] * args.n_samples,
            seed=range(first_seed, first_seed + args.n_samples),
            batch_size=args.n_samples,
            **settings,
        )

    # 2. Files: single images, and a grid of all.
    out = Path(args.out)
    paths = []
    if not args.skip_save:
        for image in images:
            path = common.next_free_path(out / "samples", "{:04d}.png")
            paths.append(save_image(image, path))
    if not args.skip_grid:
        grid = make_grid(images, args.n_rows if args.n_rows > 0 else args.n_samples)
        path = common.next_free_path(out, "grid-{:03d}.png")
        paths.append(save_image(grid, path))
    return paths


def make_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size in rows of `columns`, with black lines of 2 pixels around each; a single
    one stays bare."""
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image
    from torchvision.utils import make_grid as tile

    tensors = [pil_to_tensor(image) for image in images]
    return to_pil_image(tile(tensors, nrow=columns))
