"""The programs of SEED-1 and SEED-LLaMA with their original names: `demo_recon.py`, and those in
`scripts/`.

Without flags they run as the originals, whose parts the YAML files in `configs/` name. Other
language models get the same requests through their tasks (ask, draw, edit), because they are tuned
on other prompts.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from seed_multimodal.cli import common
from seed_multimodal.cli.common import cat_image
from seed_multimodal.compat.part_flags import ORIGINAL, add_part_flags, original_files
from seed_multimodal.disk import writable_folder
from seed_multimodal.entry import DONE, add_device, bounded_int, log_line, run_program
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import save_image
from seed_multimodal.language.prompts import DEMO_QUESTIONS

if TYPE_CHECKING:
    from torch import Tensor

    from seed_multimodal.compat.seed_llama import Seed1
    from seed_multimodal.pipelines.base import MultimodalSystem

Loaded = TypeVar("Loaded")  # a system, or an image codec
QUESTION, DRAWING, EDITING = DEMO_QUESTIONS
# The originals' YAML files: parts of the model that the programs load without --model.
FILES = {
    "tokenizer": "configs/tokenizer/seed_llama_tokenizer_hf.yaml",
    "image_transform": "configs/transform/clip_transform.yaml",
    "llm": "configs/llm/seed_llama_{}.yaml",
}


def tokenizer_script(argv: Sequence[str] | None = None) -> int:
    """`scripts/seed_tokenizer_inference.py`: image → 32 codes → image."""
    parser = _parser(
        "seed_tokenizer_inference.py",
        "An image becomes 32 codes and an image again.",
        "cat.jpg",
        "8b",
    )
    return run_program(parser, _round_trip, argv)


def llama_script(size: str, argv: Sequence[str] | None = None) -> int:
    """`scripts/seed_llama_inference_{8B,14B}.py`; `size`: "8b" or "14b"."""
    parser = _parser(
        f"seed_llama_inference_{size.upper()}.py",
        f"SEED-LLaMA {size.upper()} answers a question about an image, draws, and edits.",
        ".",
        size,
    )
    return run_program(parser, _demonstrate, argv)


def _parser(program: str, text: str, out: str, size: str) -> ArgumentParser:
    """The flags of SEED-LLaMA's programs; `size` names the original language model."""
    # The request.
    parser = ArgumentParser(prog=program, description=text)
    parser.add_argument("--image", metavar="IMAGE", help="default: images/cat.jpg")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="ask this instead (about --image, if one is given)"
    )
    # The model: the original's parts, or `--model`.
    common.add_common(parser, model=ORIGINAL, out=out, language=True)
    add_part_flags(parser, {part: file.format(size) for part, file in FILES.items()})
    parser.set_defaults(size=size)
    return parser


def _load(args: Namespace, load: Callable[..., Loaded], *parts: str) -> Loaded:
    """What `load` of `cli.common` makes of the original model's parts, or of `--model`."""
    files = original_files(args)
    if files is None:
        return load(args)
    if args.engine != "torch":
        raise ConfigError(
            f"--engine {args.engine} needs --model {args.size}: YAML files describe PyTorch's "
            f"model."
        )
    from seed_multimodal.compat.seed_llama_yaml import parts_of_files, use_transform
    from seed_multimodal.inference.opening import EngineOptions

    EngineOptions(args.engine, args.url, args.gguf)  # raises for flags that exclude each other

    # The parts; all missing weights are reported before any are read.
    config, options = parts_of_files(
        *(files[part] for part in parts), dtype=args.dtype, quantization=args.quantization
    )
    config.require(*(key for key in config.parts() if getattr(config, key) is not None))
    args = Namespace(**vars(args) | options)
    loaded = load(args, config)
    codec: Any = getattr(loaded, "images", loaded)
    use_transform(codec, files["image_transform"])
    return loaded


def _load_system(args: Namespace) -> MultimodalSystem:
    return _load(args, common.load_system, "tokenizer", "llm")


def _round_trip(args: Namespace) -> int:
    """Encode an image, draw it again, and ask about its codes."""
    # 1. Without a decoder nothing is encoded.
    outputs = common.Outputs(args.out)
    codec = _load(args, common.load_images, "tokenizer")
    codec.check_drawing()

    # 2. Image → codes → image.
    codes = codec.encode([Path(args.image or cat_image())])
    print(" ".join(map(str, codes[0].tolist())))
    print(outputs.save(codec.draw(codes, seeds=[args.seed])[0], "cat", suffix=".jpg"))

    # 3. The language model reads the codes.
    if args.prompt:
        system = _load_system(args)
        print(system.ask(codes[0].tolist(), args.prompt, seed=args.seed))
    return DONE


def _demonstrate(args: Namespace) -> int:
    # 1. The user's request, or the original's three as it makes them; by the names of their images.
    requests: dict[str, list[str | Path]]
    single = bool(args.prompt or args.image)
    if single:
        images = [Path(args.image)] if args.image else []
        requests = {"answer": [*images, args.prompt or QUESTION]}
    else:
        requests = {
            "answer": [cat_image(), QUESTION],
            "dog": [DRAWING],
            "cat_sunglasses": [cat_image(), EDITING],
        }
    outputs = common.Outputs(args.out, 1 if single else 2)
    system = _load_system(args)

    # 2. Another system answers the three by its tasks.
    if not (single or args.model == ORIGINAL or system.config.found.original):
        print(system.ask(cat_image(), QUESTION, seed=args.seed))
        drawing = system.draw("a dog on the green grass", seed=args.seed)
        print(outputs.save(drawing, "dog", suffix=".jpg"))
        edited = system.edit(cat_image(), EDITING, seed=args.seed)
        print(outputs.save(edited, "cat_sunglasses", suffix=".jpg"))
        return DONE

    # 3. The text and the images of each answer.
    for name, content in requests.items():
        answer = system.chat([{"role": "user", "content": content}], seed=args.seed)
        print(answer.text)
        for image in answer.images:
            print(outputs.save(image, name, suffix=".jpg"))
    return DONE


# ---- SEED-1


def recon_script(argv: Sequence[str] | None = None) -> int:
    """`demo_recon.py`: an image becomes SEED-1's 32 codes, and the codes become images by Stable
    Diffusion.

    Flags, file names and defaults are the original demo's. Unlike there, several images are
    possible, sample k has the seed `--seed` + k whatever the device, and nothing is downloaded.
    """
    return run_program(_recon_parser(), _recon, argv)


def _recon_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="demo_recon.py",
        description="An image becomes SEED-1's 32 codes, and the codes become images again.",
    )
    # Input, weights and output.
    parser.add_argument("--image", nargs="+", action="extend", help="default: images/cat.jpg")
    parser.add_argument(
        "--model", default="pretrained", help="folder of the tokenizer (default: pretrained)"
    )
    parser.add_argument(
        "--out", "--outdir", dest="out", default="outputs/txt2img-samples", help="folder"
    )
    add_device(parser, None, "by --precision")
    parser.add_argument(
        "--ckpt",
        help="Stable Diffusion 1.4: sd-v1-4.ckpt, or a diffusers folder (default: "
        "that next to the tokenizer, or in pretrained/)",
    )
    # Drawing.
    parser.add_argument("--ddim_steps", type=int, default=50, help="denoising steps (default: 50)")
    parser.add_argument("--scale", type=float, default=7.5, help="guidance (default: 7.5)")
    parser.add_argument(
        "--n_samples", type=bounded_int(1), default=6, help="images in a batch (default: 6)"
    )
    parser.add_argument(
        "--n_iter", type=bounded_int(1), default=1, help="batches for each image (default: 1)"
    )
    parser.add_argument(
        "--n_rows", type=int, default=0, help="images in a row of the grid (default: n_samples)"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the starting noise (default: 42)")
    parser.add_argument(
        "--fixed_code", action="store_true", help="the same noise in each iteration"
    )
    parser.add_argument(
        "--H", type=int, help="height in pixels (default: what the model was trained on)"
    )
    parser.add_argument("--W", type=int, help="width in pixels")
    parser.add_argument("--dpm_solver", action="store_true", help="sample with the DPM solver")
    parser.add_argument(
        "--precision", choices=("full", "autocast"), default="autocast", help="full: float32"
    )
    parser.add_argument("--skip_grid", action="store_true", help="write no grid")
    parser.add_argument("--skip_save", action="store_true", help="write no single images")
    parser.add_argument(
        "--config", help="YAML of a --ckpt file of other sizes (default: Stable Diffusion 1's)"
    )
    # Flags of the original that this program does not need.
    for flag in ("--prompt", "--from-file", "--C", "--f", "--ddim_eta"):
        parser.add_argument(flag, help="accepted without effect")
    for flag in ("--plms", "--laion400m"):
        parser.add_argument(flag, action="store_true", help="accepted without effect")
    return parser


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
        "height": args.H or trained_size,
        "width": args.W or trained_size,
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

    return common.run_each(args, args.image or [str(cat_image())], rebuild, model.images.open)


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
    grid: Image.Image = to_pil_image(tile(tensors, nrow=columns))
    return grid
