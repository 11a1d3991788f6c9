"""The programs in `src/lavit/` with LaVIT's original names; what was written in their notebooks is each flag's default.

Without flags they repeat the originals with their weights; `--model nano-lavit`, or a folder, takes others. Images of
this repository stand in for the originals'.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from seed_multimodal.cli.common import (
    IMAGE_SUFFIXES,
    Outcomes,
    Outputs,
    add_common,
    add_drawing,
    add_out,
    cat_image,
    drawing_settings,
    load_system,
    save_image,
    slug,
)
from seed_multimodal.entry import DONE, add_offload, add_quantization, run_program, some_text, whole_number
from seed_multimodal.errors import ImageError
from seed_multimodal.lavit.ratios import RATIOS

HEADS = ("highres", "lowres")
QUESTIONS = ("What is in the picture?", "What color is it?", "Where is it?")
PROMPT = "An astronaut rides a white horse on the moon, photograph"
WORDS = "It is running in the snow."
SEEDS = {"understanding": 42, "image_detokenize": 42, "text2image_synthesis": 1234, "multimodal_synthesis": 1234,
         "inference": 1234}
DRAWN, COMPOSED = "t2i_output", "it2i_output"  # files of inference.py
EVALUATION_SEED = 42
DRAWN_BY_CLIP = 4  # drawings of a caption, of which CLIP keeps one


def understanding_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`understanding.py`: captions of images, and answers; returns the exit code."""
    parser = _parser(program, description)
    _add_images(parser)
    parser.add_argument("--question", action="append", type=some_text, metavar="TEXT", help="about each image; "
                        f"repeat for more (default: {' '.join(QUESTIONS)})")
    return run_program(parser, _understand, argv)


def text2image_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`text2image_synthesis.py`: images of texts; returns the exit code."""
    parser = _parser(program, description, "output")
    parser.add_argument("--prompt", nargs="+", type=some_text, default=[PROMPT], metavar="TEXT", help="default: "
                        f"{PROMPT}")
    parser.add_argument("--num_return_images", type=whole_number(1), default=1, metavar="N", help="images of each text "
                        "(default: 1)")
    _add_generation(parser, 4.0)
    return run_program(parser, _draw, argv)


def multimodal_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`multimodal_synthesis.py`: an image of images and words; returns the exit code."""
    parser = _parser(program, description, "output")
    parser.add_argument("parts", nargs="*", metavar="IMAGE|TEXT", help="in their order; what is no file is a text "
                        f"(default: images/cat.jpg and \"{WORDS}\")")
    _add_generation(parser, 5.0)
    parser.set_defaults(steps=50)
    return run_program(parser, _compose, argv)


def detokenize_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`image_detokenize.py`: images drawn again, and a sheet of both; returns the exit code."""
    parser = _parser(program, description, "output")
    _add_images(parser)
    _add_size(parser)
    parser.set_defaults(steps=50, guidance_scale=7.0)
    return run_program(parser, _rebuild, argv)


def inference_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`inference.py`: a caption, an answer, and two drawings; returns the exit code."""
    parser = _parser(program, description, "output")
    parser.add_argument("--image", metavar="IMAGE", default=str(cat_image()), help="default: images/cat.jpg")
    parser.add_argument("--question", type=some_text, default=QUESTIONS[0], metavar="TEXT", help="default: %(default)s")
    parser.add_argument("--prompt", type=some_text, default=PROMPT, metavar="TEXT", help="default: %(default)s")
    parser.add_argument("--words", type=some_text, default=WORDS, metavar="TEXT", help="with the image (default: "
                        "%(default)s)")
    _add_generation(parser, None)
    return run_program(parser, _infer, argv)


def evaluate_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`evaluate.py`: the published evaluations, alone or under torchrun; returns the exit code."""
    parser = argparse.ArgumentParser(prog=program, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task_name", choices=("vqa", "caption", "text2image"), default="vqa")
    parser.add_argument("--model_path", default="./", metavar="FOLDER", help="default: pretrained/LaVIT-7B-v2")
    parser.add_argument("--model_dtype", default="bf16", help="bf16, fp16 or fp32 (default: bf16)")
    parser.add_argument("--annopath", default="./", metavar="FILE", help="questions, images to describe, or captions")
    parser.add_argument("--imagepath", default="./", metavar="FOLDER", help="of the images")
    parser.add_argument("--dataset", default=None, help="vqa: vqav2, okvqa, gqa, vizwiz; caption: coco, nocaps, flickr "
                        "(default: the first of them)")
    parser.add_argument("--batch_size", type=whole_number(1), default=2, metavar="N", help="default: 2")
    parser.add_argument("--resolution", type=whole_number(1), default=224, metavar="N", help="of real images for FID "
                        "(default: 224)")
    ours = parser.add_argument_group("not in the original")
    ours.add_argument("--truth", type=Path, metavar="FILE", help="answers or captions to compare with, where not found "
                      "by name")
    ours.add_argument("--out", metavar="FOLDER", help="of the results (default: tmp/TASK/DATASET)")
    ours.add_argument("--limit", type=whole_number(1), metavar="N", help="the first N samples only")
    ours.add_argument("--clip", metavar="FOLDER", help="CLIP ViT-L/14 of transformers (default: "
                      "pretrained/clip-vit-large-patch14)")
    ours.add_argument("--inception", type=Path, metavar="FILE", help="weights of FID's network")
    ours.add_argument("--device", default=None, help="auto, cpu, cuda, cuda:N or mps (default: that of the process)")
    add_quantization(ours)
    return run_program(parser, _evaluate, argv)


# ---- flags


def _parser(program: str, description: str, out: str = "") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if out:
        add_out(parser, out)
    add_common(parser, model="lavit", debug=False)
    parser.set_defaults(seed=SEEDS[Path(program).stem])
    parser.add_argument("--pixel_decoding", choices=HEADS, help="of the original folder (default: highres)")
    add_quantization(parser)
    add_offload(parser)
    return parser


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", nargs="+", metavar="IMAGE", default=[str(cat_image())],
                        help="default: images/cat.jpg")


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ratio", choices=RATIOS, help="width to height (default: 1:1)")
    parser.add_argument("--height", type=whole_number(8), metavar="PIXELS", help="with --width, instead")
    parser.add_argument("--width", type=whole_number(8), metavar="PIXELS")
    parser.add_argument("--check_safety", action="store_true", help="what the safety checker flags becomes black")
    add_drawing(parser)


def _add_generation(parser: argparse.ArgumentParser, guidance: float | None) -> None:
    usual = "4, with a picture 5" if guidance is None else f"{guidance:g}"
    parser.add_argument("--guidance_scale_for_llm", type=float, default=guidance, metavar="G", help="of the language "
                        f"model (default: {usual})")
    parser.add_argument("--top_k", type=whole_number(0), metavar="N", help="codes to draw from (default: 50)")
    _add_size(parser)


def _drawing(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of drawing that were given."""
    names = {"guidance_scale_for_llm": "guidance", "top_k": "top_k"}
    return drawing_settings(args) | {ours: getattr(args, flag) for flag, ours in names.items()
                                     if getattr(args, flag, None) is not None}


def _load(args: argparse.Namespace) -> Any:
    """The system that the flags name."""
    from seed_multimodal.system.config import SystemConfig

    config = SystemConfig.find(args.model, system="lavit", head=args.pixel_decoding)
    config.safety = (config.safety or config.pixels) if getattr(args, "check_safety", False) else None
    return load_system(args, name=config, load_decoder=hasattr(args, "out"))


# ---- the programs


def _understand(args: argparse.Namespace) -> int:
    system = _load(args)
    outcomes = Outcomes(len(args.image), args.debug)
    for name, image in outcomes.opened(args.image, system.images.open):
        with outcomes.one(name):
            print(f"{name}: {system.describe(image, seed=args.seed)}", flush=True)
            for question in args.question or QUESTIONS:
                print(f"  {question} {system.ask(image, question, seed=args.seed)}", flush=True)
    return outcomes.finish()


def _draw(args: argparse.Namespace) -> int:
    outputs = Outputs(args.out, len(args.prompt) * args.num_return_images)
    system = _load(args)
    outcomes, options = Outcomes(len(args.prompt), args.debug), {"seed": args.seed, **_drawing(args)}
    if args.num_return_images > 1:  # greedy generation would make all the same
        options |= {"num_images": args.num_return_images, "do_sample": True}
    for text in args.prompt:
        with outcomes.one(text):
            for image in system.draw([text], **options):
                print(save_image(image, outputs.next(slug(text))), flush=True)
    return outcomes.finish()


def _compose(args: argparse.Namespace) -> int:
    parts: list[Any] = []
    for part in args.parts or [str(cat_image()), WORDS]:
        is_image = os.path.isfile(part) or Path(part).suffix.lower() in IMAGE_SUFFIXES
        if is_image and not os.path.isfile(part):  # mistyped
            raise ImageError(f"{part}: there is no such file.")
        parts.append(Path(part) if is_image else part)
    outputs = Outputs(args.out, sources=[part for part in parts if isinstance(part, Path)])
    drawn = _load(args).compose(parts, seed=args.seed, **_drawing(args))
    stem = "_".join(part.stem if isinstance(part, Path) else part for part in parts)
    print(save_image(drawn, outputs.next(slug(stem))), flush=True)
    return DONE


def _rebuild(args: argparse.Namespace) -> int:
    from seed_multimodal.images.sheet import Cell, Row, contact_sheet

    outputs = Outputs(args.out, len(args.image), args.image)
    codec = _load(args).images
    outcomes, rows = Outcomes(len(args.image), args.debug), []
    for name, image in outcomes.opened(args.image, codec.open):
        with outcomes.one(name):
            codes = codec.encode([image], seed=args.seed)
            drawn = codec.draw(codes, seeds=[args.seed], **_drawing(args))[0]
            path = save_image(drawn, outputs.next(f"{Path(name).stem}_rebuilt"))
            print(f"{path} ({len(codes[0])} codes)", flush=True)
            rows.append(Row(Path(name).name, [Cell(image, "image"), Cell(drawn, f"{len(codes[0])} codes")]))
    if rows and Path(args.out).is_dir():
        print(save_image(contact_sheet(rows), outputs.next("rebuilt_sheet")), flush=True)
    return outcomes.finish()


def _infer(args: argparse.Namespace) -> int:
    outputs = Outputs(args.out, 2)
    system = _load(args)
    image, options = Path(args.image), {"seed": args.seed, **_drawing(args)}
    print(system.describe(image, seed=args.seed), flush=True)
    print(system.ask(image, args.question, seed=args.seed), flush=True)
    print(save_image(system.draw(args.prompt, **options), outputs.next(DRAWN, ".jpg")), flush=True)
    print(save_image(system.compose([image, args.words], **options), outputs.next(COMPOSED, ".jpg")), flush=True)
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
        run = replace(run, truth=args.truth or find_truth(run.task, run.annotations), options={"seed": EVALUATION_SEED})
    config = original_config(args.model_path, head="lowres" if draws else None, check_safety=False)
    samples = read_samples(run)  # before the weights, which take minutes
    system = load_system(args, name=config, device=args.device or original_device(None),
                         dtype=args.model_dtype, load_decoder=draws)
    return report(evaluate(system, run, samples), run.out)
