"""Flags of the evaluations, see `evaluate`."""

from __future__ import annotations

import argparse

from seed_multimodal.commands.common import add_common, add_drawing, add_generation
from seed_multimodal.entry import add_quantization, whole_number
from seed_multimodal.language.tasks import DEMO_QUESTIONS


def add_run(parser: argparse.ArgumentParser, out: str, prompts: str, model: str, debug: bool) -> None:
    """What all evaluations have."""
    parser.add_argument("--out", default=out, metavar="DIR", help="results; the same command resumes (default: "
                        "%(default)s)")
    parser.add_argument("--prompts", choices=("chat", "plain"), default=prompts, help="the tuned models' requests, or "
                        "the pretrained model's bare ones (default: %(default)s)")
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
    """What is asked."""
    data = parser.add_argument_group("questions")
    data.add_argument("--questions", metavar="JSON", help="VQA's file of questions (or a list with image, question, "
                      "question_id); without it --question about --image is asked, as the original does")
    data.add_argument("--annotations", metavar="JSON", help="VQA's file of answers (or the same list with them): "
                      "the official accuracy is computed")
    data.add_argument("--images", metavar="DIR", help="folder of the pictures")
    data.add_argument("--dataset", choices=("vqav2", "okvqa", "vizwiz", "gqa"), default="vqav2", help="gqa: an answer "
                      "is right or wrong; vizwiz: the system is first asked whether there is an answer (default: "
                      "%(default)s)")
    data.add_argument("--legacy", action="store_true", help="LaVIT's: scored with the faults of the original")
    data.add_argument("--image", metavar="PICTURE", help="for one question (default: images/cat.jpg)")
    data.add_argument("--question", metavar="TEXT", default=DEMO_QUESTIONS[0], help="default: %(default)s")
    data.add_argument("--keep_ratio", action="store_true", help="scale the shorter side and cut out the centre, as the "
                      "original's probe does (default: the transform of the training data)")


def add_caption(parser: argparse.ArgumentParser) -> None:
    """What is described."""
    data = parser.add_argument_group("captions")
    data.add_argument("--captions", metavar="JSON", required=True, help="COCO's captions, Karpathy's file "
                      "dataset_coco.json, or a list with image and caption")
    data.add_argument("--truth", metavar="JSON", help="the captions to compare with, where --captions is a list of "
                      "pictures (NoCaps, Flickr30k, LaVIT's lists)")
    data.add_argument("--split", default="test", help="of Karpathy's file (default: %(default)s)")
    data.add_argument("--images", metavar="DIR", help="folder of the pictures")
    data.add_argument("--caption_prompt", default="", metavar="TEXT", help="first words of a plain caption")


def add_text2image(parser: argparse.ArgumentParser) -> None:
    """What is drawn."""
    data = parser.add_argument_group("captions")
    data.add_argument("--captions", metavar="JSON", required=True, help="captions with their pictures, as for seed "
                      "eval caption (each picture's first is drawn), or a list with image and text (each is drawn); a "
                      ".txt, or texts alone, have no pictures for FID")
    data.add_argument("--split", default="test", help="of Karpathy's file (default: %(default)s)")
    data.add_argument("--images", metavar="DIR", help="folder of the pictures")
    data.add_argument("--best-of", type=whole_number(1), default=4, metavar="N", help="drawings of a caption, of which "
                      "CLIP keeps one (default: %(default)s)")
    data.add_argument("--clip", metavar="PATH", help="CLIP folder of transformers, or OpenAI's file")
    data.add_argument("--clip-words", metavar="DIR", help="folder of CLIP's tokenizer, which OpenAI's file lacks")
    data.add_argument("--resolution", type=whole_number(1), default=512, metavar="N", help="real pictures are squashed "
                      "to this square for FID (default: %(default)s)")
    data.add_argument("--inception", metavar="FILE", help="weights of FID's network (default: torch-fidelity's)")
    add_drawing(parser)
