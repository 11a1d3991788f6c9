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

from seed_multimodal.cli.common import Outcomes, cat_image, loading, require_room, save_image
from seed_multimodal.entry import add_device, log_line, run_program
from seed_multimodal.errors import ConfigError

GRID_BORDER = 2
NO_EFFECT = {"prompt": "the codes take the text's place", "from_file": "the codes take the text's place",
             "config": "the diffusion folder holds its own configuration"}


def recon_script(argv: Sequence[str] | None = None) -> int:
    """`demo_recon.py`: returns the exit code (0; 1 when an image failed; 2 when nothing could run)."""
    return run_program(_parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="demo_recon.py", description="An image becomes SEED-1's 32 codes, and the codes become images again.")
    ours = parser.add_argument_group("images, model and machine")
    ours.add_argument("--image", nargs="+", action="extend", metavar="IMAGE", help="default: images/cat.jpg")
    ours.add_argument("--model", default="pretrained", metavar="FOLDER", help="folder with causal_qformer.pth, "
                      "seed_tokenizer.pth and eva_vit_g.pth, or one that we saved (default: %(default)s)")
    ours.add_argument("--out", "--outdir", dest="out", default="outputs/txt2img-samples", metavar="FOLDER",
                      help="for samples/0000.png … and grid-000.png (default: %(default)s)")
    add_device(ours, None, "by --precision")
    drawing = parser.add_argument_group("drawing, as the original's")
    drawing.add_argument("--ckpt", metavar="FOLDER", help="diffusers folder of Stable Diffusion 1.4 (default: beside "
                         "the tokenizer, or pretrained/stable-diffusion-v1-4)")
    drawing.add_argument("--ddim_steps", type=int, default=50, metavar="N", help="denoising steps (default: 50)")
    drawing.add_argument("--scale", type=float, default=7.5, metavar="G", help="guidance (default: 7.5)")
    drawing.add_argument("--n_samples", type=int, default=6, metavar="N", help="images in a batch (default: 6)")
    drawing.add_argument("--n_iter", type=int, default=1, metavar="N", help="batches for each image (default: 1)")
    drawing.add_argument("--n_rows", type=int, default=0, metavar="N", help="images in a row of the grid (default: "
                         "n_samples)")
    drawing.add_argument("--seed", type=int, default=42, help="of the starting noise (default: 42)")
    drawing.add_argument("--fixed_code", action="store_true", help="the same noise in each iteration")
    drawing.add_argument("--H", type=int, metavar="PIXELS", help="height (default: what the model was trained on)")
    drawing.add_argument("--W", type=int, metavar="PIXELS", help="width")
    drawing.add_argument("--C", type=int, metavar="N", help="latent channels: must be the model's (4)")
    drawing.add_argument("--f", type=int, metavar="N", help="pixels along a latent: must be the model's (8)")
    drawing.add_argument("--plms", action="store_true", help="the sampler; on anyway, unless --dpm_solver")
    drawing.add_argument("--dpm_solver", action="store_true", help="sample with the DPM solver")
    drawing.add_argument("--ddim_eta", type=float, default=0.0, help="must be 0, as in the original")
    drawing.add_argument("--precision", choices=("full", "autocast"), default="autocast",
                         help="full: float32; autocast: what the device does best (default)")
    drawing.add_argument("--skip_grid", action="store_true", help="write no grid")
    drawing.add_argument("--skip_save", action="store_true", help="write no single images")
    drawing.add_argument("--laion400m", action="store_true", help="not supported: another model's")
    for flag in ("--prompt", "--from-file", "--config"):
        drawing.add_argument(flag, metavar="TEXT", help="accepted without effect")
    return parser


def _run(args: argparse.Namespace) -> int:
    _check(args)
    out = Path(args.out)
    for folder in [*([] if args.skip_grid else [out]), *([] if args.skip_save else [out / "samples"])]:
        require_room(folder)
    with loading(args):
        from seed_multimodal.seed.original import Seed1

        dtype = args.dtype or ("float32" if args.precision == "full" else "auto")
        model = Seed1.from_pretrained(args.model, diffusion=args.ckpt, device=args.device, dtype=dtype, log=log_line)
        decoder = model.images.decoder
    for flag, value in (("C", decoder.unet.config.in_channels), ("f", decoder.factor)):
        if getattr(args, flag) not in (None, value):
            raise ConfigError(f"--{flag} {getattr(args, flag)}: this diffusion model has {value}.")
    usual = decoder.unet.config.sample_size * decoder.factor
    settings = {"num_inference_steps": args.ddim_steps, "guidance_scale": args.scale, "height": args.H or usual,
                "width": args.W or usual,
                "scheduler": "DPMSolverMultistepScheduler" if args.dpm_solver else "PNDMScheduler"}
    decoder.check_settings(**settings)
    files = args.image or [str(cat_image())]
    outcomes = Outcomes(len(files), args.debug)
    for name, image in outcomes.opened(files, model.images.open):
        codes = model.tokenize([image])[0]
        print(" ".join(map(str, codes.tolist())), flush=True)
        with outcomes.one(name):
            for path in _draw(model, codes, args, settings):
                print(path, flush=True)
    return outcomes.finish()


def _check(args: argparse.Namespace) -> None:
    for name, reason in NO_EFFECT.items():
        if getattr(args, name) is not None:
            log_line(f"demo_recon.py: --{name.replace('_', '-')} has no effect: {reason}.")
    if args.laion400m:
        raise ConfigError("--laion400m: that model is conditioned on text features of another width than SEED-1's.")
    if args.ddim_eta != 0:
        raise ConfigError(f"--ddim_eta must be 0 (PLMS and the DPM solver add no noise), got {args.ddim_eta}.")
    for name in ("n_samples", "n_iter"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}.")


def _draw(model: Any, codes: Any, args: argparse.Namespace, settings: dict[str, Any]) -> list[Path]:
    """All samples of one image; returns the files written."""
    images = []
    for iteration in range(args.n_iter):
        first = args.seed + (0 if args.fixed_code else iteration * args.n_samples)
        images += model.draw([codes] * args.n_samples, seed=range(first, first + args.n_samples),
                             batch_size=args.n_samples, **settings)
    written, out = [], Path(args.out)
    if not args.skip_save:
        written += [save_image(image, next_name(out / "samples", "{:04d}.png")) for image in images]
    if not args.skip_grid:
        grid = make_grid(images, args.n_rows if args.n_rows > 0 else args.n_samples)
        written.append(save_image(grid, next_name(out, "grid-{:03d}.png")))
    return written


def next_name(folder: Path, pattern: str) -> Path:
    """A free file in `folder`, numbered from how many of its kind are there."""
    number = len(list(folder.glob(pattern.partition("{")[0] + "*.png")))
    while (folder / pattern.format(number)).exists():
        number += 1
    return folder / pattern.format(number)


def make_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size in rows of `columns`, with black lines of 2 pixels around each; a single one stays bare."""
    if len(images) == 1:
        return images[0]
    columns = min(columns, len(images))
    width, height = (side + GRID_BORDER for side in images[0].size)
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width + GRID_BORDER, rows * height + GRID_BORDER))
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        grid.paste(image, (column * width + GRID_BORDER, row * height + GRID_BORDER))
    return grid
