"""The programs of `MultiModalLLM/eval/`, and `seed eval vqa|caption|text2image`: questions, captions and drawings over
whole sets, alone or under torchrun, of any system.

Without flags two of the programs repeat the original's probes with the released weights; what the original hard-coded
is the defaults of flags here. Results and summary lie in `--out`, which the same command resumes.
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
    add_drawing,
    cat_picture,
    drawing_settings,
    generation_settings,
    load_system,
)
from seed_multimodal.commands.evaluate_flags import add_caption, add_run, add_text2image, add_vqa
from seed_multimodal.entry import DONE, SOME_FAILED, log_line, run_program
from seed_multimodal.errors import ConfigError, counted

if TYPE_CHECKING:
    from seed_multimodal.evaluation.answer_folder import Score, Work
    from seed_multimodal.evaluation.asking import AnySystem, Benchmark
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
    add_vqa(parser)
    return run_program(parser, evaluate_vqa, argv)


def caption_program(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`eval_caption.py`; returns the exit code."""
    parser = _parser(program, description, "outputs/eval_caption", "chat")
    add_caption(parser)
    return run_program(parser, evaluate_caption, argv)


def drawing_program(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`eval_caption_to_images.py`; returns the exit code."""
    parser = _parser(program, description, "generated_images", "plain")
    data = parser.add_argument_group("captions")
    data.add_argument("--captions", metavar="FILE", help="a .txt with a caption a line, or a file of captions as for "
                      "eval_caption.py, of which each picture's first is drawn (default: twelve built-in captions)")
    data.add_argument("--split", default="test", help="of Karpathy's file (default: %(default)s)")
    add_drawing(parser)
    return run_program(parser, _draw, argv)


def add_commands(measured: Any) -> None:
    """`vqa`, `caption` and `text2image` below `seed eval`."""
    for name, add, work, text in (
            ("vqa", add_vqa, evaluate_vqa, "questions about pictures: accuracy"),
            ("caption", add_caption, evaluate_caption, "captions of pictures: CIDEr and others"),
            ("text2image", add_text2image, evaluate_text2image, "the best of several drawings by CLIP: FID")):
        parser = measured.add_parser(name, help=text, description=text)
        add_run(parser, f"outputs/eval_{name}", "chat", "nano", debug=True)
        add(parser)
        parser.set_defaults(work=work)


def _parser(program: str, description: str, out: str, prompts: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run(parser, out, prompts, "8b", debug=False)
    return parser


def evaluate_vqa(args: argparse.Namespace) -> int:
    """Questions; returns the exit code."""
    from seed_multimodal.data.formats.benchmark_files import Annotations, Questions
    from seed_multimodal.evaluation.asking import ANSWERING
    from seed_multimodal.evaluation.benchmark_work import question_work
    from seed_multimodal.evaluation.lavit_tasks import question_rules

    if args.questions is None:
        if args.annotations:
            raise ConfigError("--annotations belongs to --questions, which is not given.")
        return _probe(args)
    questions = Questions(args.questions)
    annotations = None if args.annotations is None else Annotations(args.annotations)
    if annotations is not None:
        annotations.require(questions, args.limit)
    asked = _asked(args, ANSWERING)
    rules = question_rules(args.dataset, Path(args.annotations or args.questions), asked.system, legacy=args.legacy)
    work, score = question_work(asked, questions, annotations, args.limit, rules)
    return _run(args, work, score)


def _probe(args: argparse.Namespace) -> int:
    """One question, of SEED-LLaMA with the original's prompt and settings; the answer goes to stdout."""
    from seed_multimodal.evaluation.asking import PLAIN_QUESTION, PROBE, Benchmark
    from seed_multimodal.language.answer import TextPart, split_answer

    args.prompts = "plain"
    benchmark = _asked(args, PROBE)
    if not isinstance(benchmark, Benchmark):
        raise ConfigError("--questions is missing: a file of questions, with --annotations for the accuracy; for one "
                          "question: seed ask.")
    inner = benchmark.system.inner
    codes = inner.tokenize(args.image or cat_picture())[0].tolist()
    ids = benchmark.system.generate([benchmark.prompt(codes, PLAIN_QUESTION.format(args.question))],
                                    benchmark.settings)[0]
    print(" ".join(part.text.strip() for part in split_answer(ids, inner.tokenizer) if isinstance(part, TextPart)))
    return DONE


def evaluate_caption(args: argparse.Namespace) -> int:
    """Captions; returns the exit code."""
    from seed_multimodal.data.formats.caption_files import read_captions
    from seed_multimodal.evaluation.asking import CAPTIONING
    from seed_multimodal.evaluation.benchmark_work import caption_work

    if args.captions.endswith(".txt"):
        raise ConfigError(f"{args.captions}: holds captions without pictures; give a .json file.")
    pictures = read_captions(args.captions, args.split, args.truth)
    work, score = caption_work(_asked(args, CAPTIONING), Path(args.captions), pictures, args.caption_prompt, args.limit)
    return _run(args, work, score)


def evaluate_text2image(args: argparse.Namespace) -> int:
    """Drawings; returns the exit code."""
    from seed_multimodal.data.formats.caption_files import read_captions
    from seed_multimodal.evaluation.asking import AnySystem
    from seed_multimodal.evaluation.drawing_work import BestOf
    from seed_multimodal.evaluation.lavit_tasks import DRAWING
    from seed_multimodal.evaluation.picture_scores import ClipScores, Distance, find_clip
    from seed_multimodal.systems.lavit import Lavit

    texts = read_captions(args.captions, args.split, drawn=True)
    place = find_clip(args.clip, Path(args.model)) if args.best_of > 1 or args.clip else None
    system = _loaded(args)
    drawing = {**(DRAWING if isinstance(system, Lavit) else {}), **drawing_settings(args), **generation_settings(args)}
    asked = AnySystem(system, drawing=drawing, images=_images(args))
    device = system.pictures.device
    clip = None if place is None else ClipScores.load(place, device, args.clip_words)
    best = BestOf(asked, Path(args.captions), texts, Path(args.out), args.best_of, args.seed, clip,
                  Distance(args.resolution, args.inception, device=device))
    return _run(args, *best.work(args.limit))


def _draw(args: argparse.Namespace) -> int:
    from seed_multimodal.data.formats.caption_files import CaptionedPicture, read_captions
    from seed_multimodal.evaluation.asking import Benchmark
    from seed_multimodal.evaluation.drawing_work import DRAWING, DRAWING_GUIDANCE, Drawing

    texts = (read_captions(args.captions, args.split, drawn=True) if args.captions else
             [CaptionedPicture(number, "built in", "", [text]) for number, text in enumerate(CAPTIONS, 1)])
    decode = {"guidance_scale": DRAWING_GUIDANCE, **drawing_settings(args)}
    benchmark = _asked(args, DRAWING)
    if not isinstance(benchmark, Benchmark):
        raise ConfigError(f"{args.model}: is no SEED-LLaMA, whose drawings this script makes; take seed eval "
                          "text2image.")
    _ = benchmark.system.inner.pictures.decoder  # a missing de-tokenizer is reported before generation
    drawing = Drawing(benchmark, Path(args.captions) if args.captions else None, texts, Path(args.out), decode,
                      args.seed)
    return _run(args, *drawing.work(args.limit))


def _asked(args: argparse.Namespace, defaults: GenerationSettings) -> Benchmark | AnySystem:
    """The system as it is asked: SEED-LLaMA with the settings of the released script, any other with its own; and the
    flags over them."""
    from seed_multimodal.evaluation.asking import AnySystem, Benchmark
    from seed_multimodal.evaluation.batched import BatchedSystem
    from seed_multimodal.evaluation.lavit_tasks import question_words
    from seed_multimodal.systems.seed_llama import SeedLlama

    given = generation_settings(args)
    if "do_sample" not in given and ("temperature" in given or "top_p" in given):
        given["do_sample"] = True
    system = _loaded(args)
    if not isinstance(system, SeedLlama):
        return AnySystem(system, {"seed": args.seed, **given}, question=question_words(system), images=_images(args))
    settings = replace(defaults, **{"seed": args.seed, **given})
    if getattr(args, "keep_ratio", False):
        system.pictures.transform = replace(system.pictures.transform, keep_ratio=True)
    return Benchmark(BatchedSystem(system, args.batch_size, args.seed), args.prompts, settings, _images(args))


def _loaded(args: argparse.Namespace) -> Any:
    """The system, on this process's GPU."""
    local = os.environ.get("LOCAL_RANK")
    if local is not None and args.device in ("auto", "cuda"):
        import torch

        args.device = f"cuda:{local}" if torch.cuda.is_available() else args.device
    return load_system(args)


def _images(args: argparse.Namespace) -> Path | None:
    images = getattr(args, "images", None)
    return None if images is None else Path(images)


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
