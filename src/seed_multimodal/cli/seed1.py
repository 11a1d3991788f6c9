"""`demo_recon.py`: an image becomes SEED-1's 32 codes, and the codes become images by Stable Diffusion.

Flags, file names and defaults are the original demo's, so numbering (`samples/0000.png …`, `grid-000.png`) continues
after existing files. Unlike the original, several images are possible, sample k has the seed `--seed` + k whatever the
device, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal.cli.common import cat_image, loading, next_number, run_each, save_image
from seed_multimodal.disk import writable_folder
from seed_multimodal.entry import add_device, log_line, run_program, whole_number
from seed_multimodal.errors import ConfigError


def recon_script(argv: Sequence[str] | None = None) -> int:
    """`demo_recon.py`: returns the exit code (0; 1 when an image failed; 2 when nothing could run)."""
    return run_program(_parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="demo_recon.py", description="An image becomes SEED-1's 32 codes, and the codes become images again.")
    ours = parser.add_argument_group("images, model and machine")
    ours.add_argument("--image", nargs="+", action="extend", help="default: images/cat.jpg")
    ours.add_argument("--model", default="pretrained", help="folder with causal_qformer.pth, seed_tokenizer.pth and "
                      "eva_vit_g.pth, or one that we saved (default: %(default)s)")
    ours.add_argument("--out", "--outdir", dest="out", default="outputs/txt2img-samples",
                      help="folder of samples/0000.png … and grid-000.png (default: %(default)s)")
    add_device(ours, None, "by --precision")
    drawing = parser.add_argument_group("drawing, as the original's")
    drawing.add_argument("--ckpt", help="diffusers folder of Stable Diffusion 1.4 (default: beside the tokenizer, or "
                         "pretrained/stable-diffusion-v1-4)")
    drawing.add_argument("--ddim_steps", type=int, default=50, help="denoising steps (default: 50)")
    drawing.add_argument("--scale", type=float, default=7.5, help="guidance (default: 7.5)")
    drawing.add_argument("--n_samples", type=whole_number(1), default=6, help="images in a batch (default: 6)")
    drawing.add_argument("--n_iter", type=whole_number(1), default=1, help="batches for each image (default: 1)")
    drawing.add_argument("--n_rows", type=int, default=0, help="images in a row of the grid (default: n_samples)")
    drawing.add_argument("--seed", type=int, default=42, help="of the starting noise (default: 42)")
    drawing.add_argument("--fixed_code", action="store_true", help="the same noise in each iteration")
    drawing.add_argument("--H", type=int, help="height in pixels (default: what the model was trained on)")
    drawing.add_argument("--W", type=int, help="width in pixels")
    drawing.add_argument("--plms", action="store_true", help="the sampler; on anyway, unless --dpm_solver")
    drawing.add_argument("--dpm_solver", action="store_true", help="sample with the DPM solver")
    drawing.add_argument("--precision", choices=("full", "autocast"), default="autocast",
                         help="full: float32; autocast: what the device does best (default)")
    drawing.add_argument("--skip_grid", action="store_true", help="write no grid")
    drawing.add_argument("--skip_save", action="store_true", help="write no single images")
    for flag in ("--prompt", "--from-file", "--config", "--C", "--f", "--ddim_eta"):
        drawing.add_argument(flag, help="accepted without effect")
    drawing.add_argument("--laion400m", action="store_true", help="accepted without effect")
    return parser


def _run(args: argparse.Namespace) -> int:
    writable_folder(args.out, ConfigError)
    with loading(args):
        from diffusers import DPMSolverMultistepScheduler, PNDMScheduler

        from seed_multimodal.seed.original import Seed1

        dtype = args.dtype or ("float32" if args.precision == "full" else "auto")
        model = Seed1.from_pretrained(args.model, diffusion=args.ckpt, device=args.device, dtype=dtype, log=log_line)
        decoder = model.images.decoder
    usual = decoder.unet.config.sample_size * decoder.factor
    settings = {"num_inference_steps": args.ddim_steps, "guidance_scale": args.scale, "height": args.H or usual,
                "width": args.W or usual}
    sampler = DPMSolverMultistepScheduler if args.dpm_solver else PNDMScheduler
    decoder.scheduler = sampler.from_config(decoder.scheduler.config)
    decoder.check_settings(**settings)

    def rebuild(name: str, image: Image.Image) -> None:
        codes = model.tokenize([image])[0]
        print(" ".join(map(str, codes.tolist())), flush=True)
        for path in _draw(model, codes, args, settings):
            print(path, flush=True)

    return run_each(args, args.image or [str(cat_image())], rebuild, model.images.open)


def _draw(model: Any, codes: Any, args: argparse.Namespace, settings: dict[str, Any]) -> list[Path]:
    """All samples of one image; returns the files written."""
    images = []
    for iteration in range(args.n_iter):
        first = args.seed + (0 if args.fixed_code else iteration * args.n_samples)
        images += model.draw([codes] * args.n_samples, seed=range(first, first + args.n_samples),
                             batch_size=args.n_samples, **settings)
    written, out = [], Path(args.out)
    if not args.skip_save:
        written += [save_image(image, next_number(out / "samples", "{:04d}.png")) for image in images]
    if not args.skip_grid:
        grid = make_grid(images, args.n_rows if args.n_rows > 0 else args.n_samples)
        written.append(save_image(grid, next_number(out, "grid-{:03d}.png")))
    return written


def make_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size in rows of `columns`, with black lines of 2 pixels around each; a single one stays bare."""
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image
    from torchvision.utils import make_grid as tile

    grid: Image.Image = to_pil_image(tile([pil_to_tensor(image) for image in images], nrow=columns))
    return grid
