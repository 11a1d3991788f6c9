"""The programs in `src/lavit/` with LaVIT's original names; what was written in their notebooks is each flag's default.

Without flags they repeat the originals with their weights; `--model nano-lavit`, or a folder, takes others. Images of
this repository stand in for the originals'.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from seed_multimodal.cli.common import (
    IMAGE_SUFFIXES,
    Outputs,
    add_common,
    add_size,
    cat_image,
    chosen_settings,
    load_system,
    program_parser,
    run_each,
    save_image,
    slug,
)
from seed_multimodal.entry import DONE, add_quantization, run_program, some_text, whole_number
from seed_multimodal.images.io import open_image

QUESTIONS = ("What is in the picture?", "What color is it?", "Where is it?")
PROMPT = "An astronaut rides a white horse on the moon, photograph"
WORDS = "It is running in the snow."
DRAWN_BY_CLIP = 4  # drawings of a caption, of which CLIP keeps one


def understanding_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`understanding.py`: captions of images, and answers; returns the exit code."""
    parser = _parser(program, description, seed=42, draws=False)
    _add_images(parser)
    parser.add_argument("--question", action="append", type=some_text, help=f"repeat for more (default: {QUESTIONS})")
    return run_program(parser, _understand, argv)


def text2image_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`text2image_synthesis.py`: images of texts; returns the exit code."""
    parser = _parser(program, description)
    parser.add_argument("--prompt", nargs="+", type=some_text, default=[PROMPT], help=f"default: {PROMPT}")
    parser.add_argument("--num_return_images", type=whole_number(1), default=1, help="images of each text (default: 1)")
    _add_generation(parser, 4.0)
    return run_program(parser, _draw, argv)


def multimodal_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`multimodal_synthesis.py`: an image of images and words; returns the exit code."""
    parser = _parser(program, description)
    parser.add_argument("parts", nargs="*", metavar="IMAGE|TEXT", default=[str(cat_image()), WORDS],
                        help=f"in their order; names of image files are images (default: images/cat.jpg \"{WORDS}\")")
    _add_generation(parser, 5.0)
    parser.set_defaults(steps=50)
    return run_program(parser, _compose, argv)


def detokenize_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`image_detokenize.py`: images drawn again, and a sheet of both; returns the exit code."""
    parser = _parser(program, description, seed=42)
    _add_images(parser)
    parser.set_defaults(steps=50, guidance_scale=7.0)
    return run_program(parser, _rebuild, argv)


def inference_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`inference.py`: a caption, an answer, and two drawings; returns the exit code."""
    parser = _parser(program, description)
    parser.add_argument("--image", default=str(cat_image()), help="default: images/cat.jpg")
    parser.add_argument("--question", type=some_text, default=QUESTIONS[0], help="default: %(default)s")
    parser.add_argument("--prompt", type=some_text, default=PROMPT, help="default: %(default)s")
    parser.add_argument("--words", type=some_text, default=WORDS, help="with the image (default: %(default)s)")
    _add_generation(parser, None)
    return run_program(parser, _infer, argv)


def evaluate_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`evaluate.py`: the published evaluations, alone or under torchrun; returns the exit code."""
    parser = program_parser(program, description)
    parser.add_argument("--task_name", choices=("vqa", "caption", "text2image"), default="vqa")
    parser.add_argument("--model_path", default="./", help="default: pretrained/LaVIT-7B-v2")
    parser.add_argument("--model_dtype", default="bf16", help="bf16, fp16 or fp32 (default: bf16)")
    parser.add_argument("--annopath", default="./", help="file of questions, images to describe, or captions")
    parser.add_argument("--imagepath", default="./", help="folder of the images")
    parser.add_argument("--dataset", help="vqa: vqav2 (default), okvqa, gqa, vizwiz; caption: coco, nocaps, flickr")
    parser.add_argument("--batch_size", type=whole_number(1), default=2)
    parser.add_argument("--resolution", type=whole_number(1), default=224, help="of real images for FID")
    ours = parser.add_argument_group("not in the original")
    ours.add_argument("--truth", type=Path, help="answers or captions to compare with (default: found by name)")
    ours.add_argument("--out", help="folder of the results (default: tmp/TASK/DATASET)")
    ours.add_argument("--limit", type=whole_number(1), help="the first LIMIT samples only")
    ours.add_argument("--clip", help="folder of CLIP ViT-L/14 (default: pretrained/clip-vit-large-patch14)")
    ours.add_argument("--inception", type=Path, help="weights of FID's network")
    ours.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: that of the process)")
    add_quantization(ours)
    return run_program(parser, _evaluate, argv)


# ---- flags


def _parser(program: str, description: str, *, seed: int = 1234, draws: bool = True) -> argparse.ArgumentParser:
    parser = program_parser(program, description)
    add_common(parser, model="lavit", seed=seed, out="output" * draws, language=True, drawing=draws, debug=False)
    parser.add_argument("--pixel_decoding", choices=("highres", "lowres"), help="of the original (default: highres)")
    if draws:
        add_size(parser)
        parser.add_argument("--check_safety", action="store_true", help="what the safety checker flags becomes black")
    return parser


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", nargs="+", default=[str(cat_image())], help="default: images/cat.jpg")


def _add_generation(parser: argparse.ArgumentParser, guidance: float | None) -> None:
    parser.add_argument("--guidance_scale_for_llm", type=float, default=guidance, help="of the language model "
                        "(default: 4, with an image 5)")
    parser.add_argument("--top_k", type=whole_number(0), help="codes to draw from (default: 50)")


# ---- the programs


def _load(args: argparse.Namespace) -> Any:
    from seed_multimodal.system.config import SystemConfig

    config = SystemConfig.find(args.model, system="lavit", head=args.pixel_decoding)
    config.safety = (config.safety or config.pixels) if getattr(args, "check_safety", False) else None
    return load_system(args, name=config, load_decoder=hasattr(args, "out"))


def _understand(args: argparse.Namespace) -> int:
    system = _load(args)

    def answer(name: str, image: Any) -> None:
        print(f"{name}: {system.describe(image, seed=args.seed)}", flush=True)
        for question in args.question or QUESTIONS:
            print(f"  {question} {system.ask(image, question, seed=args.seed)}", flush=True)

    return run_each(args, args.image, answer, system.images.open)


def _draw(args: argparse.Namespace) -> int:
    outputs = Outputs(args.out, len(args.prompt) * args.num_return_images)
    system = _load(args)
    options = {"seed": args.seed, **chosen_settings(args)}
    if args.num_return_images > 1:  # greedy generation would make all the same
        options |= {"num_images": args.num_return_images, "do_sample": True}

    def save(text: str, images: Sequence[Any]) -> None:
        for image in images:
            print(save_image(image, outputs.next(slug(text))), flush=True)

    return run_each(args, args.prompt, save, lambda text: system.draw([text], **options))


def _compose(args: argparse.Namespace) -> int:
    parts = [Path(part) if Path(part).suffix.lower() in IMAGE_SUFFIXES else part for part in args.parts]
    content = [open_image(part) if isinstance(part, Path) else part for part in parts]  # before the weights
    outputs = Outputs(args.out)
    drawn = _load(args).compose(content, seed=args.seed, **chosen_settings(args))
    stem = "_".join(part.stem if isinstance(part, Path) else part for part in parts)
    print(save_image(drawn, outputs.next(slug(stem))), flush=True)
    return DONE


def _rebuild(args: argparse.Namespace) -> int:
    from seed_multimodal.images.sheet import Cell, Row, contact_sheet

    outputs = Outputs(args.out, len(args.image))
    codec, rows = _load(args).images, []

    def rebuild(name: str, image: Any) -> None:
        codes = codec.encode([image], seed=args.seed)
        drawn = codec.draw(codes, seeds=[args.seed], **chosen_settings(args))[0]
        print(f"{save_image(drawn, outputs.next(f'{Path(name).stem}_rebuilt'))} ({len(codes[0])} codes)", flush=True)
        rows.append(Row(Path(name).name, [Cell(image, "image"), Cell(drawn, f"{len(codes[0])} codes")]))

    code = run_each(args, args.image, rebuild, codec.open)
    if rows and not outputs.is_file:
        print(save_image(contact_sheet(rows), outputs.next("rebuilt_sheet")), flush=True)
    return code


def _infer(args: argparse.Namespace) -> int:
    outputs = Outputs(args.out, 2)
    system = _load(args)
    image, options = Path(args.image), {"seed": args.seed, **chosen_settings(args)}
    print(system.describe(image, seed=args.seed), flush=True)
    print(system.ask(image, args.question, seed=args.seed), flush=True)
    print(save_image(system.draw(args.prompt, **options), outputs.next("t2i_output", ".jpg")), flush=True)
    print(save_image(system.compose([image, args.words], **options), outputs.next("it2i_output", ".jpg")), flush=True)
    return DONE


def _evaluate(args: argparse.Namespace) -> int:
    """One of the published evaluations; the summary goes to stdout."""
    from seed_multimodal.cli.evaluate import report
    from seed_multimodal.evaluation.answers import Run
    from seed_multimodal.evaluation.drawing import find_clip
    from seed_multimodal.evaluation.tasks import TASKS, evaluate, find_task, find_truth, read_samples
    from seed_multimodal.lavit.original import original_config, original_device

    draws, dataset = args.task_name == "text2image", args.dataset or next(iter(TASKS[args.task_name]))
    out = Path(args.out or f"tmp/{args.task_name}/{dataset}")
    run = Run(find_task(args.task_name, dataset), Path(args.annopath), out, images=Path(args.imagepath),
              limit=args.limit, batch=args.batch_size)
    if draws:
        run = replace(run, best_of=DRAWN_BY_CLIP, clip=find_clip(args.clip), resolution=args.resolution,
                      inception=args.inception)
    else:
        run = replace(run, truth=args.truth or find_truth(run.task, run.annotations), options={"seed": 42})
    config = original_config(args.model_path, head="lowres" if draws else None, check_safety=False)
    samples = read_samples(run)  # before the weights, which take minutes
    system = load_system(args, name=config, device=args.device or original_device(None),
                         dtype=args.model_dtype, load_decoder=draws)
    return report(evaluate(system, run, samples), run.out)
