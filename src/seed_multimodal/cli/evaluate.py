"""`seed eval vqa|caption|text2image` for every system, and the programs of `MultiModalLLM/eval/` for SEED-LLaMA:
questions, captions and drawings over whole sets, alone or under torchrun. Without flags two of the programs repeat the
original's probes. The same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from seed_multimodal.cli.common import add_common, cat_image, chosen_settings, load_system, program_parser
from seed_multimodal.entry import DONE, SOME_FAILED, log_line, run_program, whole_number
from seed_multimodal.errors import counted
from seed_multimodal.language.tasks import DEMO_QUESTIONS

# For `eval_caption_to_images.py` without a file.
CAPTIONS = ("A small wooden house on a snowy hill in the evening", "A lighthouse at the sea in a storm, oil painting",
            "Three sailing boats on a calm lake at sunrise", "The word HELLO written in the sand of a beach")


def eval_program(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """A program of `MultiModalLLM/eval/` by its name; returns the exit code."""
    parser, draws = program_parser(program, description), program == "eval_caption_to_images.py"
    _add_run(parser, "generated_images" if draws else f"outputs/{Path(program).stem}", "8b", False, draws)
    if draws:
        _add_captions(parser, required=False)
        parser.set_defaults(prompts="plain")
        return run_program(parser, _draw_as_original, argv)
    add, work = (_add_vqa, _ask) if program == "eval_vqa.py" else (_add_caption, _describe)
    add(parser)
    return run_program(parser, work, argv)


def add_commands(kinds: Any) -> None:
    """`vqa`, `caption` and `text2image` below `seed eval`."""
    for name, add, work, text in (
            ("vqa", _add_vqa, _ask, "questions about images: accuracy"),
            ("caption", _add_caption, _describe, "captions of images: CIDEr and others"),
            ("text2image", _add_text2image, _draw, "the best of several drawings by CLIP: FID")):
        parser = kinds.add_parser(name, help=text, description=text)
        _add_run(parser, f"outputs/eval_{name}", "nano", True, work is _draw)
        add(parser)
        parser.set_defaults(work=work)


# ---- flags


def _add_run(parser: argparse.ArgumentParser, out: str, model: str, debug: bool, drawing: bool) -> None:
    parser.add_argument("--prompts", choices=("chat", "plain"), default="chat", help="of SEED-LLaMA: the tuned models' "
                        "requests, or the pretrained model's bare ones")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images")
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="the first N samples only")
    parser.add_argument("--max_bad", type=whole_number(1), default=20, metavar="N", help="end after N bad samples in a "
                        "row (default: %(default)s)")
    add_common(parser, model, seed=42, out=out, batch_size=16, language=True, generation=True, drawing=drawing,
               debug=debug)


def _add_vqa(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", metavar="JSON", help="VQA's file of questions (or a list with image, question, "
                        "question_id); without it --question about --image is asked, as the original does")
    parser.add_argument("--annotations", type=Path, metavar="JSON", help="VQA's file of answers (default: --questions)")
    parser.add_argument("--dataset", choices=("vqav2", "okvqa", "vizwiz", "gqa"), default="vqav2", help="gqa: an "
                        "answer is right or wrong; vizwiz: the system is first asked whether there is an answer")
    parser.add_argument("--image", help="for one question (default: images/cat.jpg)")
    parser.add_argument("--question", default=DEMO_QUESTIONS[0], help="default: %(default)s")
    parser.add_argument("--keep_ratio", action="store_true", help="resize and crop, as the original's probe does")


def _add_caption(parser: argparse.ArgumentParser) -> None:
    _add_captions(parser)
    parser.add_argument("--truth", type=Path, metavar="JSON", help="the captions to compare with, where --captions is "
                        "a list of images (NoCaps, Flickr30k, LaVIT's lists)")


def _add_text2image(parser: argparse.ArgumentParser) -> None:
    _add_captions(parser)
    parser.add_argument("--best-of", type=whole_number(1), metavar="N", help="drawings of a caption, of which CLIP "
                        "keeps one (default: 4 if there is a CLIP folder, else 1)")
    parser.add_argument("--clip", metavar="DIR", help="CLIP folder of transformers")
    parser.add_argument("--resolution", type=whole_number(1), default=512, help="of real images for FID (default: 512)")
    parser.add_argument("--inception", type=Path, metavar="FILE", help="weights of FID's network")


def _add_captions(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--captions", metavar="FILE", required=required, help="COCO's captions, Karpathy's file "
                        "dataset_coco.json, or a list with image and caption; to draw also a list of texts, or a .txt")
    parser.add_argument("--split", default="test", help="of Karpathy's file (default: %(default)s)")


# ---- work


def _ask(args: argparse.Namespace) -> int:
    if args.questions is None:
        return _ask_once(args)
    return _evaluate(args, args.questions, "vqa", args.dataset, truth=args.annotations, options=_text_options(args))


def _describe(args: argparse.Namespace) -> int:
    return _evaluate(args, args.captions, "caption", truth=args.truth, split=args.split, options=_text_options(args))


def _draw(args: argparse.Namespace) -> int:
    from seed_multimodal.evaluation.drawing import CLIP_FOLDER, find_clip

    best_of = args.best_of or (4 if args.clip or CLIP_FOLDER.is_dir() else 1)
    clip = find_clip(args.clip) if best_of > 1 or args.clip else None
    return _evaluate(args, args.captions, "text2image", split=args.split, best_of=best_of, clip=clip, seed=args.seed,
                     resolution=args.resolution, inception=args.inception, options=chosen_settings(args))


def _draw_as_original(args: argparse.Namespace) -> int:
    """Drawings as the original script makes them, without scores."""
    from seed_multimodal.data.annotations import Sample, read_captions

    samples = (read_captions(args.captions, args.split) if args.captions else
               [Sample(number, f"caption {number}", references=[text]) for number, text in enumerate(CAPTIONS, 1)])
    return _evaluate(args, args.captions or "built in", "text2image", seed=args.seed, original=True,
                     options=chosen_settings(args), samples=[replace(one, image=None) for one in samples])


def _ask_once(args: argparse.Namespace) -> int:
    """One question, with the original's prompt and settings; the answer goes to stdout."""
    from seed_multimodal.evaluation.tasks import PROBE, set_prompts
    from seed_multimodal.evaluation.vqa import PLAIN_QUESTION

    system = _load(args)
    set_prompts(system, "plain")
    answer = system.ask(args.image or cat_image(), PLAIN_QUESTION.format(args.question), short=False,
                        **{**PROBE, **_text_options(args)})
    print(answer.partition("\n")[0].strip())  # models continue with a question of their own
    return DONE


def _text_options(args: argparse.Namespace) -> dict[str, Any]:
    options = {"seed": args.seed, **chosen_settings(args)}
    return {"do_sample": True, **options} if {"temperature", "top_p"} & set(options) else options


def _load(args: argparse.Namespace) -> Any:
    """The system, on this process's GPU."""
    if "LOCAL_RANK" in os.environ and args.device in ("auto", "cuda"):
        import torch

        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else args.device
    system = load_system(args)
    if getattr(args, "keep_ratio", False):
        system.images.transform = replace(system.images.transform, keep_ratio=True)
    return system


def _evaluate(args: argparse.Namespace, file: str, task: str, dataset: str = "coco", *, samples: Any = None,
              **settings: Any) -> int:
    from seed_multimodal.evaluation.answers import Run
    from seed_multimodal.evaluation.tasks import evaluate, find_task, read_samples

    run = Run(find_task(task, dataset), Path(file), Path(args.out), images=args.images, limit=args.limit,
              batch=args.batch_size, max_bad=args.max_bad, prompts=args.prompts, **settings)
    samples = read_samples(run) if samples is None else samples[:args.limit]  # before the weights, which take minutes
    return report(evaluate(_load(args), run, samples), run.out)


def report(summary: dict[str, Any] | None, out: Path) -> int:
    """Print a summary (None: other processes still work); returns the exit code."""
    if summary is None:
        return DONE
    print(json.dumps(summary, ensure_ascii=False), flush=True)
    if summary["bad"]:
        log_line(f"{out}: {counted(summary['bad'], 'sample')} of {summary['samples']:,} could not be used; the same "
                 "command tries them again.")
    return SOME_FAILED if summary["bad"] else DONE
