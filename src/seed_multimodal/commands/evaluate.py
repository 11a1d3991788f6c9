"""`seed eval vqa|caption|text2image` for every system, and the programs of `MultiModalLLM/eval/`: questions, captions
and drawings over whole sets, alone or under torchrun.

The programs are for SEED-LLaMA. Without flags two of them repeat the original's probes; what the original hard-coded is
the default of a flag here. Results and summary lie in `--out`, which the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from seed_multimodal.commands.common import (
    add_common,
    add_drawing,
    add_generation,
    cat_picture,
    drawing_settings,
    generation_settings,
    load_system,
)
from seed_multimodal.entry import DONE, SOME_FAILED, add_quantization, log_line, run_program, whole_number
from seed_multimodal.errors import ConfigError, counted
from seed_multimodal.language.tasks import DEMO_QUESTIONS

# For `eval_caption_to_images.py` without a file: subjects, places, styles, text in the image, counting.
CAPTIONS = (
    "A small wooden house on a snowy hill in the evening", "Two red apples on a white plate",
    "A lighthouse at the sea in a storm, oil painting", "A fox asleep under a tree, watercolour",
    "A street market in the rain at night, photograph", "A robot that waters flowers, children's book illustration",
    "Three sailing boats on a calm lake at sunrise", "A bowl of noodle soup seen from above",
    "An owl with glasses reads a newspaper", "A bicycle made of glass in a museum",
    "A train crosses a high stone bridge in autumn", "The word HELLO written in the sand of a beach")


def vqa_program(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`eval_vqa.py`; returns the exit code."""
    return _program(program, description, argv, "outputs/eval_vqa", add_vqa, evaluate_vqa)


def caption_program(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`eval_caption.py`; returns the exit code."""
    return _program(program, description, argv, "outputs/eval_caption", add_caption, evaluate_caption)


def drawing_program(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`eval_caption_to_images.py`; returns the exit code."""
    return _program(program, description, argv, "generated_images", _add_drawings, _draw_captions)


def _program(program: str, description: str, argv: Sequence[str] | None, out: str,
             add: Callable[[argparse.ArgumentParser], None], work: Callable[[argparse.Namespace], int]) -> int:
    parser = argparse.ArgumentParser(prog=program, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run(parser, out, "8b", debug=False)
    add(parser)
    return run_program(parser, work, argv)


def add_commands(measured: Any) -> None:
    """`vqa`, `caption` and `text2image` below `seed eval`."""
    for name, add, work, text in (
            ("vqa", add_vqa, evaluate_vqa, "questions about images: accuracy"),
            ("caption", add_caption, evaluate_caption, "captions of images: CIDEr and others"),
            ("text2image", add_text2image, evaluate_text2image, "the best of several drawings by CLIP: FID")):
        parser = measured.add_parser(name, help=text, description=text)
        add_run(parser, f"outputs/eval_{name}", "nano", debug=True)
        add(parser)
        parser.set_defaults(work=work)


# ---- flags


def add_run(parser: argparse.ArgumentParser, out: str, model: str, debug: bool) -> None:
    """Flags of all evaluations."""
    parser.add_argument("--out", default=out, metavar="DIR", help="results; the same command resumes (default: "
                        "%(default)s)")
    parser.add_argument("--prompts", choices=("chat", "plain"), default="chat", help="of SEED-LLaMA: the tuned models' "
                        "requests, or the pretrained model's bare ones (default: %(default)s)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images")
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="the first N samples only")
    parser.add_argument("--batch-size", type=whole_number(1), default=16, metavar="N", help="samples at a time "
                        "(default: %(default)s)")
    parser.add_argument("--max_bad", type=whole_number(1), default=20, metavar="N", help="so many samples in a row "
                        "that cannot be used end the run (default: %(default)s)")
    add_common(parser, model=model, debug=debug)
    parser.set_defaults(seed=42)  # the originals'
    add_quantization(parser)
    add_generation(parser)


def add_vqa(parser: argparse.ArgumentParser) -> None:
    """Flags of questions."""
    data = parser.add_argument_group("questions")
    data.add_argument("--questions", metavar="JSON", help="VQA's file of questions (or a list with image, question, "
                      "question_id); without it --question about --image is asked, as the original does")
    data.add_argument("--annotations", type=Path, metavar="JSON", help="VQA's file of answers (default: those in "
                      "--questions, if it has them)")
    data.add_argument("--dataset", choices=("vqav2", "okvqa", "vizwiz", "gqa"), default="vqav2", help="gqa: an answer "
                      "is right or wrong; vizwiz: the system is first asked whether there is an answer (default: "
                      "%(default)s)")
    data.add_argument("--image", metavar="PICTURE", help="for one question (default: images/cat.jpg)")
    data.add_argument("--question", metavar="TEXT", default=DEMO_QUESTIONS[0], help="default: %(default)s")
    data.add_argument("--keep_ratio", action="store_true", help="scale the shorter side and cut out the centre, as the "
                      "original's probe does (default: the transform of the training data)")


def add_caption(parser: argparse.ArgumentParser) -> None:
    """Flags of captions."""
    data = parser.add_argument_group("captions")
    data.add_argument("--captions", metavar="JSON", required=True, help="COCO's captions, Karpathy's file "
                      "dataset_coco.json, or a list with image and caption")
    data.add_argument("--truth", type=Path, metavar="JSON", help="the captions to compare with, where --captions is a "
                      "list of images (NoCaps, Flickr30k, LaVIT's lists)")
    data.add_argument("--split", default="test", help="of Karpathy's file (default: %(default)s)")
    data.add_argument("--caption_prompt", default="", metavar="TEXT", help="the request; of plain prompts the "
                      "caption's first words")


def add_text2image(parser: argparse.ArgumentParser) -> None:
    """Flags of drawings."""
    data = parser.add_argument_group("captions")
    data.add_argument("--captions", metavar="FILE", required=True, help="captions with their images, as for seed eval "
                      "caption, or a list with image and text; a .txt, or texts alone, have no images for FID")
    data.add_argument("--split", default="test", help="of Karpathy's file (default: %(default)s)")
    data.add_argument("--best-of", type=whole_number(1), default=4, metavar="N", help="drawings of a caption, of which "
                      "CLIP keeps one (default: %(default)s)")
    data.add_argument("--clip", metavar="DIR", help="CLIP folder of transformers")
    data.add_argument("--resolution", type=whole_number(1), default=512, metavar="N", help="real images are resized to "
                      "this square for FID (default: %(default)s)")
    data.add_argument("--inception", type=Path, metavar="FILE", help="weights of FID's network (default: "
                      "torch-fidelity's)")
    add_drawing(parser)


def _add_drawings(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("captions")
    data.add_argument("--captions", metavar="FILE", help="a .txt with a caption a line, or a file of captions as for "
                      "eval_caption.py, of which each image's first is drawn (default: twelve built-in captions)")
    data.add_argument("--split", default="test", help="of Karpathy's file (default: %(default)s)")
    add_drawing(parser)
    parser.set_defaults(prompts="plain")


# ---- work


def evaluate_vqa(args: argparse.Namespace) -> int:
    """Questions; returns the exit code."""
    if args.questions is None:
        return _ask_once(args)
    return _evaluate(args, args.questions, "vqa", args.dataset, truth=args.annotations, options=_text_options(args))


def evaluate_caption(args: argparse.Namespace) -> int:
    """Captions; returns the exit code."""
    return _evaluate(args, args.captions, "caption", "coco", truth=args.truth, split=args.split,
                     caption_prompt=args.caption_prompt, options=_text_options(args))


def evaluate_text2image(args: argparse.Namespace) -> int:
    """Drawings; returns the exit code."""
    from seed_multimodal.evaluation.drawing import find_clip

    clip = find_clip(args.clip) if args.best_of > 1 or args.clip else None
    return _evaluate(args, args.captions, "text2image", "coco", split=args.split, best_of=args.best_of, clip=clip,
                     seed=args.seed, resolution=args.resolution, inception=args.inception,
                     options={**drawing_settings(args), **generation_settings(args)})


def _draw_captions(args: argparse.Namespace) -> int:
    """Drawings as the original script makes them, without scores."""
    from seed_multimodal.data.formats.benchmarks import Sample, read_captions

    samples = (read_captions(args.captions, args.split) if args.captions else
               [Sample(number, f"caption {number}", references=[text]) for number, text in enumerate(CAPTIONS, 1)])
    return _evaluate(args, args.captions or "built in", "text2image", "coco", seed=args.seed, kind="jpg",
                     unconditional=True, options={**drawing_settings(args), **generation_settings(args)},
                     samples=[replace(one, image=None) for one in samples])


def _ask_once(args: argparse.Namespace) -> int:
    """One question, with the original's prompt and settings; the answer goes to stdout."""
    from seed_multimodal.evaluation.benchmark import set_prompts
    from seed_multimodal.evaluation.task_table import PROBE
    from seed_multimodal.evaluation.vqa import PLAIN_QUESTION

    if args.annotations:
        raise ConfigError("--annotations belongs to --questions, which is not given.")
    system = _load(args)
    set_prompts(system, "plain")
    print(system.ask(args.image or cat_picture(), PLAIN_QUESTION.format(args.question), short=False,
                     **{**PROBE, **_text_options(args)}))
    return DONE


def _text_options(args: argparse.Namespace) -> dict[str, Any]:
    options = {"seed": args.seed, **generation_settings(args)}
    return {"do_sample": True, **options} if "temperature" in options or "top_p" in options else options


def _load(args: argparse.Namespace) -> Any:
    """The system, on this process's GPU."""
    local = os.environ.get("LOCAL_RANK")
    if local is not None and args.device in ("auto", "cuda"):
        import torch

        args.device = f"cuda:{local}" if torch.cuda.is_available() else args.device
    system = load_system(args)
    if getattr(args, "keep_ratio", False):
        system.pictures.transform = replace(system.pictures.transform, keep_ratio=True)
    return system


def _evaluate(args: argparse.Namespace, file: str, task: str, dataset: str, *, samples: Any = None, **settings: Any
              ) -> int:
    from seed_multimodal.evaluation.benchmark import evaluate, read_samples
    from seed_multimodal.evaluation.task_table import Run

    run = Run(task, dataset, Path(file), Path(args.out), images=args.images, limit=args.limit, batch=args.batch_size,
              max_bad=args.max_bad, prompts=args.prompts, **settings)
    samples = read_samples(run) if samples is None else samples  # before the weights, which take minutes
    return report(evaluate(_load(args), run, samples), run.out)


def report(summary: dict[str, Any] | None, out: Path) -> int:
    """Print a summary; returns the exit code."""
    if summary is None:
        return DONE
    print(json.dumps(summary, ensure_ascii=False), flush=True)
    if summary["bad"]:
        log_line(f"{out}: {counted(summary['bad'], 'sample')} of {summary['samples']:,} could not be used; the same "
                 "command tries them again.")
    return SOME_FAILED if summary["bad"] else DONE
