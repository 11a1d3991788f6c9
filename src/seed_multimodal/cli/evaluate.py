"""`seed eval` for every system, and the programs of `MultiModalLLM/eval/`: questions, captions and
drawings over data sets, alone or under torchrun.

Without flags two of the programs repeat the original's probes; a run resumes.
"""

from __future__ import annotations

import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seed_multimodal.cli.common import (
    add_common,
    cat_image,
    chosen_settings,
    load_system,
    loading,
    print_json,
    program_parser,
)
from seed_multimodal.config import load_yaml
from seed_multimodal.disk import JsonObject
from seed_multimodal.entry import (
    DONE,
    SOME_FAILED,
    add_debug,
    add_device,
    bounded_int,
    log_line,
    run_program,
)
from seed_multimodal.errors import ConfigError, pluralize
from seed_multimodal.evaluation.benchmarks import DETECTOR, JUDGED
from seed_multimodal.language.prompts import DEMO_QUESTIONS
from seed_multimodal.settings import check_value

if TYPE_CHECKING:
    from seed_multimodal.cli.common import Commands, Options
    from seed_multimodal.evaluation.annotations import Sample
    from seed_multimodal.evaluation.answers import Run
    from seed_multimodal.pipelines.base import MultimodalSystem

# For `eval_caption_to_images.py` without a file.
CAPTIONS = (
    "A small wooden house on a snowy hill in the evening",
    "A lighthouse at the sea in a storm, oil painting",
    "Three sailing boats on a calm lake at sunrise",
    "The word HELLO written in the sand of a beach",
)


def eval_program(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """A program of `MultiModalLLM/eval/` by its name; returns the exit code."""
    parser = program_parser(program, description)
    # Drawing, with the prompts of the pretrained model.
    if program == "eval_caption_to_images.py":
        _add_run(parser, out="generated_images", model="8b", drawing=True)
        _add_captions(parser, required=False)
        parser.set_defaults(prompts="plain")
        return run_program(parser, _draw_as_original, argv)
    # Understanding.
    _add_run(parser, out=f"outputs/{Path(program).stem}", model="8b", drawing=False)
    if program == "eval_vqa.py":
        _add_vqa(parser)
        return run_program(parser, _ask, argv)
    _add_caption(parser)
    return run_program(parser, _describe, argv)


def add_commands(kinds: Commands) -> None:
    """The commands below `seed eval`."""
    _add_tokenizer(kinds.add_parser("tokenizer", help="retrieval, reconstruction, codebook"))
    _add_suite(kinds.add_parser("suite", help="the papers' tables, next to published figures"))
    # Name, function that adds its flags, function that runs it, help.
    tasks = [
        ("vqa", _add_vqa, _ask, "questions about images: accuracy"),
        ("caption", _add_caption, _describe, "captions of images: CIDEr and others"),
        ("seedbench", _add_seedbench, _choose, "multiple choice by likelihood: SEED-Bench"),
        ("text2image", _add_text2image, _draw, "the best of several drawings by CLIP: FID"),
    ]
    for name, benchmark in JUDGED.items():
        tasks.append((name, partial(_add_judged, name=name), _judge, benchmark.title))
    drawing = ("text2image", *JUDGED)
    for name, add_flags, work, text in tasks:
        parser = kinds.add_parser(name, help=text, description=text)
        _add_run(parser, out=f"outputs/eval_{name}", model="nano", drawing=name in drawing)
        add_debug(parser)
        add_flags(parser)
        parser.set_defaults(work=work)


# ---- flags


def _add_run(parser: ArgumentParser, out: str, model: str, drawing: bool) -> None:
    """Flags of every evaluation of a system."""
    parser.add_argument(
        "--prompts",
        choices=("chat", "plain"),
        default="chat",
        help="plain: of pretrained SEED-LLaMA",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images")
    parser.add_argument(
        "--limit", type=bounded_int(1), metavar="N", help="the first N samples only"
    )
    parser.add_argument(
        "--max_bad", type=bounded_int(1), default=20, help="end after so many bad samples in a row"
    )
    add_common(
        parser,
        model,
        seed=42,
        out=out,
        batch_size=16,
        language=True,
        generation=True,
        drawing=drawing,
    )


def _add_vqa(parser: ArgumentParser) -> None:
    # A data set.
    parser.add_argument(
        "--questions",
        metavar="JSON",
        help="VQA's file of questions (or a list with image, question, "
        "question_id); without it --question about --image is asked, as the original does",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="JSON",
        help="VQA's file of answers (default: --questions)",
    )
    parser.add_argument(
        "--dataset",
        choices=("vqav2", "okvqa", "vizwiz", "gqa"),
        default="vqav2",
        help="gqa: an "
        "answer is right or wrong; vizwiz: the system is first asked whether there is an answer",
    )
    # Or one question.
    parser.add_argument("--image", help="for one question (default: images/cat.jpg)")
    parser.add_argument("--question", default=DEMO_QUESTIONS[0])
    parser.add_argument(
        "--keep_ratio", action="store_true", help="resize and crop, as the original's probe does"
    )


def _add_caption(parser: ArgumentParser) -> None:
    _add_captions(parser)
    parser.add_argument(
        "--truth", type=Path, metavar="JSON", help="captions to compare with (NoCaps, Flickr30k)"
    )


def _add_seedbench(parser: ArgumentParser) -> None:
    parser.add_argument("--questions", required=True, metavar="JSON", help="SEED-Bench.json")


def _add_text2image(parser: ArgumentParser) -> None:
    _add_captions(parser)
    parser.add_argument(
        "--best-of",
        type=bounded_int(1),
        help="drawings, of which CLIP keeps one (default: 4 or 1)",
    )
    parser.add_argument("--clip", metavar="DIR", help="CLIP folder of transformers")
    parser.add_argument(
        "--resolution",
        type=bounded_int(1),
        default=512,
        help="of real images for FID (default: 512)",
    )
    parser.add_argument("--inception", type=Path, metavar="FILE", help="weights of FID's network")


def _add_judged(parser: ArgumentParser, name: str) -> None:
    """Flags of a benchmark whose drawings are judged."""
    benchmark = JUDGED[name]
    parser.add_argument("--judge", required=True, metavar="MODEL", help=benchmark.judge)
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="the benchmark's file of prompts or its folder",
    )
    parser.add_argument(
        "--image-folder", type=Path, metavar="DIR", help="judge these drawings; no model is loaded"
    )
    parser.add_argument(
        "--num-images",
        type=bounded_int(1),
        metavar="N",
        help="drawings of a prompt (default: the paper's)",
    )
    parser.set_defaults(task=name)
    if benchmark.judge != DETECTOR:
        return
    parser.add_argument(
        "--clip", type=Path, metavar="DIR", help="CLIP that names the colours of objects"
    )
    parser.add_argument("--threshold", type=float, help="score of detections that count")
    parser.add_argument("--counting-threshold", type=float, help="of prompts that count objects")
    parser.add_argument("--max-overlap", type=float, help="of detections of a class (1: any)")


def _add_captions(parser: ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--captions",
        metavar="FILE",
        required=required,
        help="COCO's captions, Karpathy's file dataset_coco.json, or a list with image and "
        "caption; to draw also a list of texts, or a .txt",
    )
    parser.add_argument("--split", default="test", help="of Karpathy's file (default: %(default)s)")


# ---- work


def _ask(args: Namespace) -> int:
    if args.questions is None:
        return _ask_once(args)
    run = new_run(args, args.questions, "vqa", args.dataset)
    return run_task(args, replace(run, truth=args.annotations, options=_text_options(args)))


def _describe(args: Namespace) -> int:
    run = new_run(args, args.captions, "caption")
    run = replace(run, truth=args.truth, split=args.split, options=_text_options(args))
    return run_task(args, run)


def _choose(args: Namespace) -> int:
    return run_task(args, new_run(args, args.questions, "choices", "seedbench"))


def _draw(args: Namespace) -> int:
    from seed_multimodal.evaluation.drawing import CLIP_FOLDER, find_clip

    # Several drawings need CLIP, which selects the best one.
    best_of = args.best_of
    if best_of is None:
        best_of = 4 if args.clip or CLIP_FOLDER.is_dir() else 1
    run = replace(
        new_run(args, args.captions, "text2image"),
        split=args.split,
        best_of=best_of,
        clip=find_clip(args.clip) if best_of > 1 or args.clip else None,
        seed=args.seed,
        resolution=args.resolution,
        inception=args.inception,
        options=chosen_settings(args),
    )
    return run_task(args, run)


def _judge(args: Namespace) -> int:
    """Drawings of a system or a folder, judged by another model."""
    from seed_multimodal.evaluation.answers import Judging

    # 1. The file of prompts.
    benchmark = JUDGED[args.task]
    file = Path(args.data)
    if file.is_dir():
        file = file / benchmark.file
    if args.image_folder is not None and not args.image_folder.exists():
        raise ConfigError(f"{args.image_folder}: no such folder.")

    # 2. The run; the judge is on the process's device, too.
    _use_local_gpu(args)
    limits = ("threshold", "counting_threshold", "max_overlap")
    judging = Judging(
        args.judge,
        args.image_folder,
        device=args.device,
        **{name: getattr(args, name, None) for name in limits},
    )
    run = replace(
        new_run(args, str(file), args.task, args.task),
        best_of=args.num_images or benchmark.num_images,
        clip=getattr(args, "clip", None),
        seed=args.seed,
        options=chosen_settings(args),
        judging=judging,
    )
    if args.image_folder is not None:
        return run_task(args, run, load=lambda: None)
    return run_task(args, run)


def _draw_as_original(args: Namespace) -> int:
    """Drawings as the original script makes them, without scores."""
    from seed_multimodal.evaluation.annotations import Sample, read_captions

    # 1. The captions of a file or of this program; images are not compared.
    samples: list[Sample] = []
    if args.captions:
        for sample in read_captions(args.captions, args.split):
            samples.append(replace(sample, image=None))
    else:
        for index, text in enumerate(CAPTIONS, 1):
            samples.append(Sample(index, f"caption {index}", references=[text]))

    # 2. Their drawings.
    run = new_run(args, args.captions or "built in", "text2image")
    run = replace(run, seed=args.seed, original=True, options=chosen_settings(args))
    return run_task(args, run, samples=samples[: args.limit])


def _ask_once(args: Namespace) -> int:
    """One question, with the original's prompt and settings; the answer goes to stdout."""
    # Modules that load torch are imported when they are used, so that --help is fast.
    from seed_multimodal.evaluation.tasks import PROBE
    from seed_multimodal.evaluation.vqa import PLAIN_QUESTION

    if args.images is not None:
        raise ConfigError(
            f"{args.images}: --images is the folder of the images that --questions names; ask "
            f"about one image with --image."
        )
    # The flags override the settings of the original's probe.
    system = _load(args)
    system.use_plain_prompts()
    answer = system.ask(
        args.image or cat_image(),
        PLAIN_QUESTION.format(args.question),
        short=False,
        **{**PROBE, **_text_options(args)},
    )
    print(answer.partition("\n")[0].strip())  # models continue with a question of their own
    return DONE


def _text_options(args: Namespace) -> Options:
    """Settings of generation; a temperature or `top_p` switches sampling on."""
    options = {"seed": args.seed, **chosen_settings(args)}
    if "temperature" in options or "top_p" in options:
        options = {"do_sample": True, **options}
    return options


def _use_local_gpu(args: Namespace) -> None:
    """Set `args.device` to this process's GPU, if there are several."""
    if "LOCAL_RANK" in os.environ and args.device in ("auto", "cuda"):
        import torch

        if torch.cuda.is_available():
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"


def _load(args: Namespace) -> MultimodalSystem:
    """The system, on this process's GPU."""
    _use_local_gpu(args)
    system = load_system(args, load_decoder=hasattr(args, "num_inference_steps"))
    if getattr(args, "keep_ratio", False):
        codec: Any = system.images  # SEED's
        codec.transform = replace(codec.transform, keep_ratio=True)
    return system


def new_run(args: Namespace, file: str, task: str, dataset: str = "coco") -> Run:
    """An evaluation on a file of samples, with the settings that every program has."""
    from seed_multimodal.evaluation.answers import Run
    from seed_multimodal.evaluation.tasks import find_task

    return Run(
        find_task(task, dataset),
        Path(file),
        Path(args.out),
        images=args.images,
        limit=args.limit,
        batch=args.batch_size,
        max_bad=args.max_bad,
        prompts=args.prompts,
    )


def run_task(
    args: Namespace,
    run: Run,
    *,
    samples: Sequence[Sample] | None = None,
    load: Callable[[], MultimodalSystem | None] | None = None,
) -> int:
    """Evaluate a system and print the summary; returns the exit code.

    samples: instead of those of the file.
    load: default: the system of the flags.
    """
    from seed_multimodal.evaluation.tasks import evaluate, read_samples

    # The samples are read before the weights, which take minutes.
    if samples is None:
        samples = read_samples(run)
    if load is None:
        load = partial(_load, args)
    summary = evaluate(load(), run, samples)
    if summary is None:  # other processes still work
        return DONE
    # Unusable samples are no error, but the exit code tells.
    print_json(summary)
    if not summary["bad"]:
        return DONE
    log_line(
        f"{run.out}: {pluralize(summary['bad'], 'sample')} of {summary['samples']:,} could not be "
        "used; the same command tries them again."
    )
    return SOME_FAILED


# ---- seed eval tokenizer

# Flags that are keyword arguments of `TokenizerOptions`, and of `evaluate_tokenizer`.
TOKENIZER_PARTS = ("decoder", "clip", "stage1", "clip_text", "text_tokenizer")
AMOUNTS = ("limit", "rebuild", "batch", "seed")


def measure_tokenizer(args: Namespace) -> int:
    """`seed eval tokenizer`: measure, write the report and print it as one JSON line."""
    parts = {name: getattr(args, name) for name in TOKENIZER_PARTS}
    amounts = {name: getattr(args, name) for name in AMOUNTS}
    with loading(args):
        report = tokenizer_report(args, data_spec(args), args.out, parts, amounts)
    print_json(report)
    return DONE


def tokenizer_report(
    args: Namespace, spec: JsonObject, out: str | Path, parts: Options, amounts: Options
) -> JsonObject:
    """The report of a tokenizer on a set of images, which is also written to `out`.

    spec: what `open_pairs` reads. parts: of `TokenizerOptions`. amounts: of `evaluate_tokenizer`.
    """
    from seed_multimodal.data.formats.pairs import open_pairs
    from seed_multimodal.device import FP16_AS_ORIGINAL, choose_device
    from seed_multimodal.evaluation.machine import circumstances
    from seed_multimodal.evaluation.tokenizer import (
        TokenizerOptions,
        evaluate_tokenizer,
        open_tokenizer,
    )

    # 1. The data and the model.
    source = open_pairs(spec)
    runtime = choose_device(args.device, args.dtype, log=log_line, fp16=FP16_AS_ORIGINAL)
    tokenizer = open_tokenizer(args.model, runtime, TokenizerOptions(**parts))

    # 2. What the report records about the run.
    command = shlex.join(["seed", *sys.argv[1:]])
    facts = {
        "model": args.model,
        "data": spec,
        "settings": parts | amounts,
        "runtime": str(runtime),
        **circumstances(runtime.device, command),
    }

    # 3. The measures.
    return evaluate_tokenizer(source, tokenizer, out, facts, **amounts, log=log_line)


def data_spec(args: Namespace) -> JsonObject:
    """`--data` and its flags as the mapping that `data.formats.pairs.open_pairs` reads."""
    from seed_multimodal.data.formats.sources import registered_formats

    # 1. A configuration, a registered format, or files.
    spec: JsonObject
    if Path(args.data).suffix in (".yaml", ".yml"):
        spec = {str(key): value for key, value in load_yaml(args.data).items()}
    elif args.data in registered_formats():
        spec = {"format": args.data, "split": args.split or "val"}
    else:
        spec = {"format": "auto", "files": args.data, "split": args.split}

    # 2. The keys of a record that the flags name.
    for name in ("image_root", "image_key", "caption_key", "captioned"):
        spec[name] = getattr(args, name)
    return {key: value for key, value in spec.items() if value is not None}


def _add_tokenizer(parser: ArgumentParser) -> None:
    # The model and the data.
    parser.add_argument(
        "--model",
        default="pretrained/nano",
        help="system or tokenizer folder (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        required=True,
        help="a folder of images (captions in .txt), a list (.json, .jsonl, "
        ".parquet), a pattern of .tar shards, a registered format (nano), or a .yaml file",
    )
    parser.add_argument(
        "--out", required=True, help="folder of report.json, evaluate.txt and the sheet"
    )
    parser.add_argument("--stage1", help="stage-1 checkpoint: its text path for retrieval")
    parser.add_argument(
        "--limit", type=bounded_int(1), help="look at LIMIT images, drawn by --seed"
    )
    parser.add_argument("--split", help="of a registered format (default: val)")
    parser.add_argument("--image-root", help="folder of the images that a list names")
    parser.add_argument("--image-key")
    parser.add_argument("--caption-key")
    parser.add_argument(
        "--no-captions", dest="captioned", action="store_const", const=False, help="images alone"
    )
    # Parts of the measures, and how much is measured.
    parser.add_argument(
        "--clip", help="CLIP vision encoder of the target embedding (none: without)"
    )
    parser.add_argument("--clip-text", help="CLIP text encoder of the same space")
    parser.add_argument("--text-tokenizer", help="word pieces of stage 1")
    parser.add_argument("--decoder", help="diffusers folder that rebuilds images (none: without)")
    parser.add_argument(
        "--rebuild", type=bounded_int(0), default=128, help="rebuild so many images (default: 128)"
    )
    parser.add_argument("--batch-size", dest="batch", type=bounded_int(1), default=64)
    parser.add_argument("--seed", type=bounded_int(0), default=0)
    add_device(parser)
    add_debug(parser)
    parser.set_defaults(work=measure_tokenizer)


# ---- seed eval suite


def run_tables(args: Namespace) -> int:
    """`seed eval suite`: every benchmark whose files are there; prints and writes the table."""
    with loading(args):
        from seed_multimodal.evaluation.answers import Judging
        from seed_multimodal.evaluation.suite import (
            Suite,
            SuiteRow,
            read_suite,
            run_suite,
            suite_table,
            write_suite,
        )

    # 1. The rows.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("seed eval suite runs in one process; the single commands share work.")
    if not Path(args.data).is_dir():
        raise ConfigError(f"{args.data}: no such folder.")
    rows = read_suite()
    if args.only:
        kinds = sorted({row.kind for row in rows})
        check_value(list[str], args.only, "--only", choices=kinds)
    data = Path(args.data)

    # 2. What runs them.
    def measure(row: SuiteRow, folder: Path) -> JsonObject:
        spec = {"files": str(data / row.file), "image_root": str(data / row.images)}
        parts = {"clip_text": args.clip_text}
        return tokenizer_report(args, spec, folder, parts, {"limit": args.limit})

    judging = None if args.judge is None else Judging(args.judge, device=args.device)
    run = replace(
        new_run(args, args.data, "vqa", "vqav2"),
        seed=args.seed,
        best_of=args.best_of,
        clip=args.clip,
        judging=judging,
    )
    suite = Suite(args.model, data, partial(_load, args), measure, run)

    # 3. The table.
    results = run_suite(suite, rows, args.only)
    compared = args.compare or args.model
    write_suite(suite, results, compared)
    print(suite_table(results, compared), end="")
    return SOME_FAILED if any(result.bad for result in results) else DONE


def _add_suite(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="folder of the benchmarks (see the docs)"
    )
    parser.add_argument("--compare", metavar="MODEL", help="published figures (default: --model's)")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="caption, vqa, choices, …")
    parser.add_argument(
        "--clip", type=Path, metavar="DIR", help="CLIP that compares and ranks drawings"
    )
    parser.add_argument(
        "--clip-text", metavar="DIR", help="CLIP whose embeddings the tokenizer decodes to"
    )
    parser.add_argument(
        "--best-of", type=bounded_int(1), default=1, help="drawings, of which CLIP keeps one"
    )
    parser.add_argument("--judge", metavar="MODEL", help="detector of GenEval")
    parser.add_argument(
        "--limit", type=bounded_int(1), metavar="N", help="the first N samples of each"
    )
    parser.add_argument("--max_bad", type=bounded_int(1), default=20)
    add_common(
        parser, "nano", seed=42, out="outputs/suite", batch_size=16, language=True, drawing=True
    )
    add_debug(parser)
    parser.set_defaults(work=run_tables, images=None, prompts="chat")
