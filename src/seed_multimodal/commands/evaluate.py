"""The programs of `MultiModalLLM/eval/`: questions, captions and drawings over whole sets, alone or under torchrun.

Without flags two of them repeat the original's probes with the released weights; what the original hard-coded is the
defaults of flags here. Results and summary lie in `--out`, which the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from seed_multimodal.evaluation.answer_folder import Score, Work
    from seed_multimodal.evaluation.asking import Benchmark
    from seed_multimodal.language.generation import GenerationSettings

# For `eval_caption_to_images.py` without a file: subjects, places, styles, text in the picture, counting.
CAPTIONS = (
    "A small wooden house on a snowy hill in the evening", "Two red apples on a white plate",
    "A lighthouse at the sea in a storm, oil painting", "A fox asleep under a tree, watercolour",
    "A street market in the rain at night, photograph", "A robot that waters flowers, children's book illustration",
    "Three sailing boats on a calm lake at sunrise", "A bowl of noodle soup seen from above",
    "An owl with glasses reads a newspaper", "A bicycle made of glass in a museum",
    "A train crosses a high stone bridge in autumn", "The word HELLO written in the sand of a beach")


def vqa_program(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`eval_vqa.py`; returns the exit code."""
    parser = _parser(program, description, "outputs/eval_vqa", "chat")
    data = parser.add_argument_group("questions")
    data.add_argument("--questions", metavar="JSON", help="VQA's file of questions (or a list with image, question, "
                      "question_id); without it --question about --image is asked, as the original does")
    data.add_argument("--annotations", metavar="JSON", help="VQA's file of answers (or the same list with them): "
                      "the official accuracy is computed")
    data.add_argument("--images", metavar="DIR", help="folder of the pictures")
    data.add_argument("--image", metavar="PICTURE", help="for one question (default: images/cat.jpg)")
    data.add_argument("--question", metavar="TEXT", default=DEMO_QUESTIONS[0], help="default: %(default)s")
    data.add_argument("--keep_ratio", action="store_true", help="scale the shorter side and cut out the centre, as the "
                      "original's probe does (default: the transform of the training data)")
    return run_program(parser, _vqa, argv)


def caption_program(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`eval_caption.py`; returns the exit code."""
    parser = _parser(program, description, "outputs/eval_caption", "chat")
    data = parser.add_argument_group("captions")
    data.add_argument("--captions", metavar="JSON", required=True, help="COCO's captions, Karpathy's file "
                      "dataset_coco.json, or a list with image and caption")
    data.add_argument("--split", default="test", help="of Karpathy's file (default: %(default)s)")
    data.add_argument("--images", metavar="DIR", help="folder of the pictures")
    data.add_argument("--caption_prompt", default="", metavar="TEXT", help="first words of a plain caption")
    return run_program(parser, _caption, argv)


def drawing_program(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`eval_caption_to_images.py`; returns the exit code."""
    parser = _parser(program, description, "generated_images", "plain")
    data = parser.add_argument_group("captions")
    data.add_argument("--captions", metavar="FILE", help="a .txt with a caption a line, or a file of captions as for "
                      "eval_caption.py, of which each picture's first is drawn (default: twelve built-in captions)")
    data.add_argument("--split", default="test", help="of Karpathy's file (default: %(default)s)")
    add_drawing(parser)
    return run_program(parser, _draw, argv)


def _parser(program: str, description: str, out: str, prompts: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=out, metavar="DIR", help="results; the same command resumes (default: "
                        "%(default)s)")
    parser.add_argument("--prompts", choices=("chat", "plain"), default=prompts, help="the tuned models' requests, or "
                        "the pretrained model's bare ones (default: %(default)s)")
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="the first N samples only")
    parser.add_argument("--batch-size", type=whole_number(1), default=16, metavar="N", help="samples at a time "
                        "(default: %(default)s)")
    parser.add_argument("--max_bad", type=whole_number(1), default=20, metavar="N", help="so many samples in a row "
                        "that cannot be used end the run (default: %(default)s)")
    add_common(parser, model="8b", debug=False)
    parser.set_defaults(seed=42)  # the original's
    add_quantization(parser)
    add_generation(parser)
    return parser


def _vqa(args: argparse.Namespace) -> int:
    from seed_multimodal.data.formats.benchmark_files import Annotations, Questions
    from seed_multimodal.evaluation.asking import ANSWERING
    from seed_multimodal.evaluation.benchmark_work import question_work

    if args.questions is None:
        if args.annotations:
            raise ConfigError("--annotations belongs to --questions, which is not given.")
        return _probe(args)
    questions = Questions(args.questions)
    annotations = None if args.annotations is None else Annotations(args.annotations)
    if annotations is not None:
        annotations.require(questions, args.limit)
    benchmark = _benchmark(args, ANSWERING)
    work, score = question_work(benchmark, questions, annotations, args.limit)
    return _run(args, work, score)


def _probe(args: argparse.Namespace) -> int:
    """One question, with the original's prompt and settings; the answer goes to stdout."""
    from seed_multimodal.evaluation.asking import PLAIN_QUESTION, PROBE
    from seed_multimodal.language.answer import TextPart, split_answer

    args.prompts = "plain"
    benchmark = _benchmark(args, PROBE)
    inner = benchmark.system.inner
    codes = inner.tokenize(args.image or cat_picture())[0].tolist()
    ids = benchmark.system.generate([benchmark.prompt(codes, PLAIN_QUESTION.format(args.question))],
                                    benchmark.settings)[0]
    print(" ".join(part.text.strip() for part in split_answer(ids, inner.tokenizer) if isinstance(part, TextPart)))
    return DONE


def _caption(args: argparse.Namespace) -> int:
    from seed_multimodal.data.formats.caption_files import read_captions
    from seed_multimodal.evaluation.asking import CAPTIONING
    from seed_multimodal.evaluation.benchmark_work import caption_work

    if args.captions.endswith(".txt"):
        raise ConfigError(f"{args.captions}: holds captions without pictures; give a .json file.")
    pictures = read_captions(args.captions, args.split)
    work, score = caption_work(_benchmark(args, CAPTIONING), Path(args.captions), pictures, args.caption_prompt,
                               args.limit)
    return _run(args, work, score)


def _draw(args: argparse.Namespace) -> int:
    from seed_multimodal.data.formats.caption_files import CaptionedPicture, read_captions
    from seed_multimodal.evaluation.drawing_work import DRAWING, DRAWING_GUIDANCE, Drawing

    texts = (read_captions(args.captions, args.split) if args.captions else
             [CaptionedPicture(number, "built in", "", [text]) for number, text in enumerate(CAPTIONS, 1)])
    decode = {"guidance_scale": DRAWING_GUIDANCE, **drawing_settings(args)}
    benchmark = _benchmark(args, DRAWING)
    _ = benchmark.system.inner.pictures.decoder  # a missing de-tokenizer is reported before generation
    drawing = Drawing(benchmark, Path(args.captions) if args.captions else None, texts, Path(args.out), decode,
                      args.seed)
    return _run(args, *drawing.work(args.limit))


def _benchmark(args: argparse.Namespace, defaults: GenerationSettings) -> Benchmark:
    """The system with the settings of the script, and the flags over them."""
    from seed_multimodal.evaluation.asking import Benchmark
    from seed_multimodal.evaluation.batched import BatchedSystem

    local = os.environ.get("LOCAL_RANK")
    if local is not None and args.device in ("auto", "cuda"):
        import torch

        args.device = f"cuda:{local}" if torch.cuda.is_available() else args.device
    given = generation_settings(args)
    if "do_sample" not in given and ("temperature" in given or "top_p" in given):
        given["do_sample"] = True
    settings = replace(defaults, **{"seed": args.seed, **given})
    system = load_system(args)
    if getattr(args, "keep_ratio", False):
        system.pictures.transform = replace(system.pictures.transform, keep_ratio=True)
    images = getattr(args, "images", None)
    return Benchmark(BatchedSystem(system, args.batch_size, args.seed), args.prompts, settings,
                     None if images is None else Path(images))


def _run(args: argparse.Namespace, work: Work[Any], score: Score) -> int:
    """Work off this process's share; who ends last writes results and summary."""
    from seed_multimodal.evaluation.answer_folder import run_through

    folder = Path(args.out)
    summary = run_through(work, score, folder, batch=args.batch_size, max_bad=args.max_bad)
    if summary is None:
        return DONE
    print(json.dumps(summary, ensure_ascii=False), flush=True)
    if summary["bad"]:
        log_line(f"{folder}: {counted(summary['bad'], 'sample')} of {summary['samples']:,} could not be used; run the "
                 "command again when that is mended: it tries them only.")
    return SOME_FAILED if summary["bad"] else DONE
