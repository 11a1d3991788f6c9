"""The programs in `src/lavit/` with LaVIT's original names; defaults of flags are the values in the
notebooks.

Without flags they run as the originals, with images of this repository; `--model nano-lavit`, or a
folder, selects other weights.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from PIL import Image

from seed_multimodal.cli import common
from seed_multimodal.disk import text_stem
from seed_multimodal.entry import DONE, add_language_model, bounded_int, run_program
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import open_image
from seed_multimodal.settings import check_value

if TYPE_CHECKING:
    from seed_multimodal.models.lavit.pipeline import Lavit
    from seed_multimodal.pipelines.base import MultimodalSystem

QUESTIONS = ("What is in the picture?", "What color is it?", "Where is it?")
PROMPT = "a sculpture of a duck made of wool"
INSTRUCTION = "It is running in the snow"
COCO = "data/coco/images"
# Task → data set → annotations, images and ground truth, where the original's scripts expect them.
# The authors have lemmatized the truth of VQA; None: it is in the annotations.
DATA: dict[str, dict[str, tuple[str, str, str | None]]] = {
    "vqa": {
        "vqav2": (
            "data/coco/annotations/vqa_val_eval.json",
            COCO,
            "v2_mscoco_val2014_annotations_lemm.json",
        ),
        "okvqa": (
            "data/okvqa/annotations/vqa_val_eval.json",
            COCO,
            "mscoco_val2014_annotations_lemm.json",
        ),
        "gqa": ("data/gqa/annotations/testdev_balanced_questions.json", "data/gqa/images", None),
        "vizwiz": (
            "data/vizwiz/annotations/full_set/val_answerable.json",
            "data/vizwiz/images",
            "vizwiz_val_annotations_lemm.json",
        ),
    },
    "caption": {
        "coco": (
            "data/coco/annotations/coco_karpathy_test.json",
            COCO,
            "data/coco_gt/coco_karpathy_test_gt.json",
        ),
        "nocaps": (
            "data/nocaps/annotations/nocaps_val.json",
            "data/nocaps/images",
            "data/nocaps/nocaps_val_4500_captions.json",
        ),
        "flickr": (
            "data/flickr30k/annotations/flickr30k_test.json",
            "data/flickr30k/images",
            "data/flickr30k/flickr30k_test_gt.json",
        ),
    },
    "text2image": {"coco": ("data/coco/annotations/coco_t2i_eval.json", COCO, None)},
}


@dataclass(frozen=True)
class Script:
    """One of the programs.

    add_flags: adds the flags that not all have, and the original's defaults.
    draws: it has a decoder, and `--out`.
    """

    work: Callable[[Namespace], int]
    add_flags: Callable[[ArgumentParser], None]
    draws: bool = True
    seed: int = 1234


def lavit_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """Run the program of that file name (but `evaluate.py`); returns the exit code."""
    script = SCRIPTS[Path(program).stem]
    parser = common.program_parser(program, description)

    # 1. The system.
    parser.add_argument(
        "--pixel_decoding", choices=("highres", "lowres"), help="of the original (default: highres)"
    )
    if script.draws:
        common.add_size(parser)
        parser.add_argument(
            "--check_safety",
            action="store_true",
            help="what the safety checker flags becomes black",
        )
    common.add_common(
        parser,
        model="lavit",
        seed=script.seed,
        out="output" if script.draws else "",
        language=True,
        drawing=script.draws,
    )

    # 2. The requests.
    script.add_flags(parser)
    return run_program(parser, script.work, argv)


# ---- flags


def _add_images(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--image", nargs="+", default=[str(common.cat_image())], help="default: images/cat.jpg"
    )


def _add_guidance(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--guidance_scale_for_llm", dest="guidance", type=float, help="default: 4, with an image 5"
    )
    parser.add_argument("--top_k", type=bounded_int(0), help="codes to draw from (default: 50)")


def _add_understanding(parser: ArgumentParser) -> None:
    _add_images(parser)
    parser.add_argument("--question", action="append", help=f"default: {QUESTIONS}")


def _add_drawing(parser: ArgumentParser) -> None:
    _add_guidance(parser)
    parser.add_argument("--prompt", nargs="+", default=[PROMPT], help=f"default: {PROMPT}")
    parser.add_argument(
        "--num_return_images", type=bounded_int(1), default=1, help="of each text (default: 1)"
    )
    parser.set_defaults(guidance=4.0)


def _add_composition(parser: ArgumentParser) -> None:
    _add_guidance(parser)
    parser.add_argument(
        "parts", nargs="*", metavar="IMAGE|TEXT", default=[str(common.cat_image()), INSTRUCTION]
    )
    parser.set_defaults(guidance=5.0, num_inference_steps=50)


def _add_rebuilding(parser: ArgumentParser) -> None:
    _add_images(parser)
    parser.set_defaults(num_inference_steps=50, guidance_scale=7.0)


def _add_inference(parser: ArgumentParser) -> None:
    _add_guidance(parser)
    parser.add_argument("--image", default=str(common.cat_image()), help="default: images/cat.jpg")
    parser.add_argument("--question", default=QUESTIONS[0], help="default: %(default)s")
    parser.add_argument("--prompt", default=PROMPT, help="default: %(default)s")
    parser.add_argument(
        "--words", default=INSTRUCTION, help="with the image (default: %(default)s)"
    )


def evaluate_script(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """`evaluate.py`: the published evaluations, alone or under torchrun; returns the exit code."""
    parser = common.program_parser(program, description)
    # The original's.
    parser.add_argument("--task_name", choices=DATA, default="vqa")
    parser.add_argument("--model_path", default="./", help="default: pretrained/LaVIT-7B-v2")
    parser.add_argument("--model_dtype", default="bf16", help="bf16, fp16 or fp32 (default: bf16)")
    parser.add_argument(
        "--annopath",
        help="file of questions, images to describe, or captions (default: the "
        "original's place of --dataset below data/)",
    )
    parser.add_argument("--imagepath", help="folder of the images (default: the original's place)")
    parser.add_argument(
        "--dataset", help="vqa: vqav2 (default), okvqa, gqa, vizwiz; caption: coco, nocaps, flickr"
    )
    parser.add_argument("--batch_size", type=bounded_int(1), default=2)
    parser.add_argument(
        "--resolution", type=bounded_int(1), default=224, help="of real images for FID"
    )
    parser.add_argument(
        "--truth", type=Path, help="answers or captions to compare with (default: found by name)"
    )
    # Ours.
    parser.add_argument("--out", help="folder of the results (default: tmp/TASK/DATASET)")
    parser.add_argument("--limit", type=bounded_int(1), help="the first LIMIT samples only")
    parser.add_argument(
        "--clip",
        help="CLIP ViT-L/14: a folder, or OpenAI's file (default: openai_clip_ViT-L-14.bin "
        "in --model_path, else pretrained/clip-vit-large-patch14)",
    )
    parser.add_argument("--inception", type=Path, help="weights of FID's network")
    parser.add_argument(
        "--device", help="auto, cpu, cuda, cuda:N or mps (default: that of the process)"
    )
    add_language_model(parser)
    parser.set_defaults(max_bad=20, prompts="chat")
    return run_program(parser, _evaluate, argv)


# ---- the programs


def _load(args: Namespace) -> Lavit:
    """The system; it draws if the program has `--out`."""
    from seed_multimodal.models.lavit.spec import LavitConfig

    config = LavitConfig.find(args.model, head=args.pixel_decoding)
    # The safety checker's default folder is that of the pixel decoder.
    if getattr(args, "check_safety", False):
        config.safety = config.safety or config.pixels
    else:
        config.safety = None
    return cast("Lavit", common.load_system(args, config, load_decoder=hasattr(args, "out")))


def _understand(args: Namespace) -> int:
    # A caption, then answers to the questions, for each image.
    system = _load(args)

    def answer(name: str, image: Image.Image) -> None:
        print(f"{name}: {system.describe(image, seed=args.seed)}")
        for question in args.question or QUESTIONS:
            print(f"  {question} {system.ask(image, question, seed=args.seed)}")

    return common.run_each(args, args.image, answer, system.images.open)


def _draw(args: Namespace) -> int:
    # 1. The folder is checked before the weights are loaded.
    outputs = common.Outputs(args.out, len(args.prompt) * args.num_return_images)
    system = _load(args)
    options = {"seed": args.seed, **common.chosen_settings(args)}
    # 2. Images of one text have seeds one after another.
    if args.num_return_images > 1:
        options["num_images"] = args.num_return_images

    def draw(text: str) -> list[Image.Image]:
        images: list[Image.Image] = system.draw([text], **options)
        return images

    def save(text: str, images: Sequence[Image.Image]) -> None:
        for image in images:
            print(outputs.save(image, text_stem(text)))

    return common.run_each(args, args.prompt, save, draw)


def _compose(args: Namespace) -> int:
    # Arguments with the suffix of an image are files; they are read before the weights.
    content: list[str | Image.Image] = []
    stems = []
    for part in args.parts:
        if Path(part).suffix.lower() in Image.registered_extensions():
            content.append(open_image(part).image)
            stems.append(Path(part).stem)
        else:
            content.append(part)
            stems.append(part)
    outputs = common.Outputs(args.out)
    system = _load(args)
    image = system.compose(content, seed=args.seed, **common.chosen_settings(args))
    print(outputs.save(image, text_stem("_".join(stems))))
    return DONE


def _rebuild(args: Namespace) -> int:
    outputs = common.Outputs(args.out, len(args.image))
    codec = _load(args).images

    # The selection of patches and the noise have the same seed.
    def rebuild(name: str, image: Image.Image) -> None:
        codes = codec.encode([image], seed=args.seed)
        rebuilt = codec.draw(codes, seeds=[args.seed], **common.chosen_settings(args))[0]
        path = outputs.save(rebuilt, common.source_stem(name), "_rebuilt")
        print(f"{path} ({len(codes[0])} codes)")

    return common.run_each(args, args.image, rebuild, codec.open)


def _infer(args: Namespace) -> int:
    outputs = common.Outputs(args.out, 2)
    system = _load(args)
    image = Path(args.image)
    options = {"seed": args.seed, **common.chosen_settings(args)}
    # Understanding, then generation from a text, and from an image with a text.
    print(system.describe(image, seed=args.seed))
    print(system.ask(image, args.question, seed=args.seed))
    drawing = system.draw(args.prompt, **options)
    print(outputs.save(drawing, "t2i_output", suffix=".jpg"))
    composed = system.compose([image, args.words], **options)
    print(outputs.save(composed, "it2i_output", suffix=".jpg"))
    return DONE


def _evaluate(args: Namespace) -> int:
    """One of the published evaluations; the summary goes to stdout."""
    from seed_multimodal.cli.evaluate import run_benchmark
    from seed_multimodal.compat.lavit import original_config, original_device
    from seed_multimodal.evaluation.benchmark import benchmark_class, open_benchmark
    from seed_multimodal.evaluation.clip import NAME
    from seed_multimodal.evaluation.text2image import find_clip

    # 1. The data: by the flags, else at the original's paths.
    task = args.task_name
    draws = task == "text2image"
    datasets = [*DATA[task]]
    dataset = args.dataset or datasets[0]
    check_value(str, dataset, f"--dataset of {task}", choices=datasets)
    annotations, images, truth = DATA[task][dataset]
    annotations = args.annopath or annotations
    args.images = Path(args.imagepath or images)
    args.out = args.out or f"tmp/{task}/{dataset}"

    # 2. The original's settings of the task.
    args.device = args.device or original_device(None)
    args.dtype = args.model_dtype
    config = original_config(args.model_path, head="lowres" if draws else None, check_safety=False)
    values = {
        **common.set_flags(args, benchmark_class(task)),
        "file": annotations,
        "truth": args.truth or _find_truth(truth, Path(annotations).parent),
    }
    if draws:
        # The original keeps CLIP's weights in the model's folder.
        clip = args.clip and Path(args.clip)
        for folder in (Path(args.model_path), config.tokenizer):
            if not clip and folder is not None and (folder / NAME).is_file():
                clip = folder / NAME
        clip = find_clip(clip, alternative=f"put the original's {NAME} into --model_path")
        values |= {"best_of": 4, "clip": clip, "seed": 0}
    elif task == "vqa":
        values["dataset"] = dataset

    # 3. The evaluation, which loads the system after the samples.
    def load() -> MultimodalSystem:
        if not args.images.is_dir():
            raise ConfigError(
                f"--imagepath {args.images}: no such folder; it holds {dataset}'s images."
            )
        return common.load_system(args, config, load_decoder=draws)

    return run_benchmark(open_benchmark(task, **values), load)


def _find_truth(truth: str | None, folder: Path) -> Path | None:
    """The ground-truth file of a data set: at its path, else in the folder of the annotations.

    The official file if the lemmatized one is missing. None: the annotations contain it.
    """
    if truth is None:
        return None
    for name in (truth, truth.replace("_lemm", "")):
        for file in (Path(name), folder / Path(name).name):
            if file.is_file():
                return file
    return None


SCRIPTS = {
    "understanding": Script(_understand, _add_understanding, draws=False, seed=42),
    "text2image_synthesis": Script(_draw, _add_drawing),
    "multimodal_synthesis": Script(_compose, _add_composition),
    "image_detokenize": Script(_rebuild, _add_rebuilding, seed=42),
    "inference": Script(_infer, _add_inference),
}
