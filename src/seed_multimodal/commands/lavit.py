"""The programs in `src/lavit/` with LaVIT's original names; what was written in their notebooks is each flag's default.

Without flags they repeat the originals with the released weights; `--model nano-lavit`, or a folder, takes others. The
originals' pictures are not ours, so some of this repository stand in.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from seed_multimodal.commands.common import (
    PICTURE_SUFFIXES,
    Outcomes,
    OutputNames,
    add_common,
    add_drawing,
    cat_picture,
    drawing_settings,
    opened,
    save_picture,
)
from seed_multimodal.entry import (
    DONE,
    add_offload,
    add_quantization,
    log_line,
    run_program,
    some_text,
    whole_number,
)
from seed_multimodal.errors import ImageError
from seed_multimodal.lavit.ratios import RATIOS
from seed_multimodal.quiet import quiet_libraries

HEADS = ("highres", "lowres")
QUESTIONS = ("What is in the picture?", "What color is it?", "Where is it?")
PROMPT = "An astronaut rides a white horse on the moon, photograph"
WORDS = "It is running in the snow."
SEEDS = {"understanding": 42, "image_detokenize": 42, "text2image_synthesis": 1234, "multimodal_synthesis": 1234,
         "inference": 1234}
DRAWN, COMPOSED = "t2i_output.jpg", "it2i_output.jpg"  # files of inference.py
EVALUATION_SEED = 42
DRAWN_BY_CLIP = 4  # drawings of a caption, of which CLIP keeps one


def understanding_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`understanding.py`: captions of pictures, and answers; returns the exit code."""
    parser = _parser(program, description)
    parser.add_argument("--image", nargs="+", metavar="PICTURE", help="default: images/cat.jpg")
    parser.add_argument("--question", action="append", type=some_text, metavar="TEXT", help="about each picture; "
                        f"repeat for more (default: {' '.join(QUESTIONS)})")
    return run_program(parser, _understand, argv)


def text2image_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`text2image_synthesis.py`: pictures of texts; returns the exit code."""
    parser = _parser(program, description, "output")
    parser.add_argument("--prompt", nargs="+", type=some_text, default=[PROMPT], metavar="TEXT", help="default: "
                        f"{PROMPT}")
    parser.add_argument("--num_return_images", type=whole_number(1), default=1, metavar="N", help="pictures of each "
                        "text (default: 1)")
    _add_generation(parser, 4.0)
    return run_program(parser, _draw, argv)


def multimodal_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`multimodal_synthesis.py`: a picture of pictures and words; returns the exit code."""
    parser = _parser(program, description, "output")
    parser.add_argument("parts", nargs="*", metavar="PICTURE|TEXT", help="in their order; what is no file is a text "
                        f"(default: images/cat.jpg and \"{WORDS}\")")
    _add_generation(parser, 5.0)
    parser.set_defaults(steps=50)
    return run_program(parser, _compose, argv)


def detokenize_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`image_detokenize.py`: pictures drawn again, beside themselves; returns the exit code."""
    parser = _parser(program, description, "output")
    parser.add_argument("--image", nargs="+", metavar="PICTURE", help="default: images/cat.jpg")
    _add_size(parser)
    parser.set_defaults(steps=50, guidance_scale=7.0)
    return run_program(parser, _rebuild, argv)


def inference_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`inference.py`: a caption, an answer, and two drawings; returns the exit code."""
    parser = _parser(program, description, "output")
    parser.add_argument("--image", metavar="PICTURE", default=str(cat_picture()), help="default: images/cat.jpg")
    parser.add_argument("--question", type=some_text, default=QUESTIONS[0], metavar="TEXT", help="default: %(default)s")
    parser.add_argument("--prompt", type=some_text, default=PROMPT, metavar="TEXT", help="default: %(default)s")
    parser.add_argument("--words", type=some_text, default=WORDS, metavar="TEXT", help="beside the picture (default: "
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
    parser.add_argument("--annopath", default="./", metavar="FILE", help="questions, pictures to describe, or captions")
    parser.add_argument("--imagepath", default="./", metavar="FOLDER", help="of the pictures")
    parser.add_argument("--dataset", default=None, help="vqa: vqav2, okvqa, gqa, vizwiz; caption: coco, nocaps, flickr "
                        "(default: the first of them)")
    parser.add_argument("--batch_size", type=whole_number(1), default=2, metavar="N", help="default: 2")
    parser.add_argument("--resolution", type=whole_number(1), default=224, metavar="N", help="of real pictures for FID "
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
        parser.add_argument("--out", default=out, metavar="PATH", help=f"folder, or a file for one picture (default: "
                            f"{out})")
    add_common(parser, model="lavit", debug=False)
    parser.set_defaults(seed=SEEDS[Path(program).stem])
    parser.add_argument("--pixel_decoding", choices=HEADS, help="of the released folder (default: highres)")
    add_quantization(parser)
    add_offload(parser)
    return parser


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


def _open(args: argparse.Namespace, *modes: str) -> Any:
    """The system that the flags name, for `modes` (none: all)."""
    quiet_libraries(args.debug)
    with contextlib.redirect_stdout(sys.stderr):
        from seed_multimodal.device import limit_threads
        from seed_multimodal.systems.lavit import Lavit

        more: dict[str, Any] = {"modes": modes} if modes else {}
        system = Lavit.from_pretrained(
            args.model, head=args.pixel_decoding, device=args.device, dtype=args.dtype, offload=args.offload,
            quantization=args.quantization, check_safety=getattr(args, "check_safety", False), log=log_line, **more)
    limit_threads(system.llm, system.pictures.model)
    return system


# ---- the programs


def _understand(args: argparse.Namespace) -> int:
    system = _open(args, "understanding")
    pictures = args.image or [str(cat_picture())]
    outcomes = Outcomes(len(pictures))
    for name, image in opened(pictures, outcomes, args.debug):
        with outcomes.one(name, args.debug):
            print(f"{name}: {system.describe(image, seed=args.seed)}", flush=True)
            for question in args.question or QUESTIONS:
                print(f"  {question} {system.ask(image, question, seed=args.seed)}", flush=True)
    return outcomes.finish()


def _draw(args: argparse.Namespace) -> int:
    names = OutputNames(args.out, "output", len(args.prompt) * args.num_return_images)
    system = _open(args, "generation")
    outcomes, drawing = Outcomes(len(args.prompt)), _drawing(args)
    if args.num_return_images > 1:  # a system may take the likeliest codes otherwise: all the same
        drawing["do_sample"] = True
    for text in args.prompt:
        with outcomes.one(text, args.debug):
            for picture in system.draw_all([text], seed=args.seed, number=args.num_return_images, **drawing):
                print(save_picture(picture, names.next(text)), flush=True)
    return outcomes.finish()


def _compose(args: argparse.Namespace) -> int:
    parts = args.parts or [str(cat_picture()), WORDS]
    shown = [part for part in parts if os.path.isfile(part) or Path(part).suffix.lower() in PICTURE_SUFFIXES]
    for name in shown:
        if not os.path.isfile(name):  # mistyped: never drawn as words
            raise ImageError(f"{name}: there is no such file.")
    names = OutputNames(args.out, "output", 1, shown)
    system = _open(args, "generation")
    stem = "_".join(Path(part).stem if part in shown else part for part in parts)
    drawn = system.compose([Path(part) if part in shown else part for part in parts], seed=args.seed, **_drawing(args))
    print(save_picture(drawn, names.next(stem)), flush=True)
    return DONE


def _rebuild(args: argparse.Namespace) -> int:
    from seed_multimodal.images.sheet import Cell, Row, contact_sheet

    pictures = args.image or [str(cat_picture())]
    names = OutputNames(args.out, "output", len(pictures))
    system = _open(args, "generation")
    outcomes, rows = Outcomes(len(pictures)), []
    for name, image in opened(pictures, outcomes, args.debug):
        with outcomes.one(name, args.debug):
            codes = system.pictures.tokenize(image, seed=args.seed)[0]
            rebuilt = system.reconstruct([codes.tolist()], seed=args.seed, **_drawing(args))[0]
            path = save_picture(rebuilt, names.next(Path(name).stem, "_rebuilt"))
            print(f"{path} ({len(codes)} codes)", flush=True)
            rows.append(Row(Path(name).name, [Cell(image, "picture"), Cell(rebuilt, f"{len(codes)} codes")]))
    if rows and not Path(args.out).suffix:
        print(save_picture(contact_sheet(rows), names.next("rebuilt", "_sheet")), flush=True)
    return outcomes.finish()


def _infer(args: argparse.Namespace) -> int:
    names = OutputNames(args.out, "output", 2)
    system = _open(args)
    image = Path(args.image)
    print(system.describe(image, seed=args.seed), flush=True)
    print(system.ask(image, args.question, seed=args.seed), flush=True)
    for file, draw in ((DRAWN, lambda options: system.draw(args.prompt, seed=args.seed, **options)),
                       (COMPOSED, lambda options: system.compose([image, args.words], seed=args.seed, **options))):
        print(save_picture(draw(_drawing(args)), names.named(Path(file).stem, suffix=".jpg")), flush=True)
    return DONE


def _evaluate(args: argparse.Namespace) -> int:
    """One of the published evaluations; the summary goes to stdout."""
    from seed_multimodal.commands.evaluate import report
    from seed_multimodal.evaluation.answers import Run
    from seed_multimodal.evaluation.drawing import find_clip
    from seed_multimodal.evaluation.tasks import TASKS, evaluate, find_task, find_truth, read_samples
    from seed_multimodal.systems.lavit import Lavit
    from seed_multimodal.systems.lavit_original import original_device, original_dtype, original_spec

    quiet_libraries(args.debug)
    draws, dataset = args.task_name == "text2image", args.dataset or next(iter(TASKS[args.task_name]))
    out = Path(args.out or f"tmp/{args.task_name}/{dataset}")
    run = Run(find_task(args.task_name, dataset), Path(args.annopath), out, images=Path(args.imagepath),
              limit=args.limit, batch=args.batch_size)
    if draws:
        run = replace(run, best_of=DRAWN_BY_CLIP, clip=find_clip(args.clip), resolution=args.resolution,
                      inception=args.inception)
    else:
        run = replace(run, truth=args.truth or find_truth(run.task, run.annotations), options={"seed": EVALUATION_SEED})
    spec = original_spec(args.model_path, head="lowres" if draws else None)
    samples = read_samples(run)  # before the weights, which take minutes
    system = Lavit.from_pretrained(
        spec, device=args.device or original_device(None), dtype=original_dtype(args.model_dtype),
        quantization=args.quantization, modes=("generation" if draws else "understanding",), log=log_line)
    return report(evaluate(system, run, samples), run.out)
