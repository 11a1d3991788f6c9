"""Table of the benchmarks whose drawings another model judges: a benchmark is its class and a row.

Classes and readers are named, not imported, so that the help of `seed eval` needs no torch.
"""

from __future__ import annotations

from typing import NamedTuple

DETECTOR = "folder of a detector of transformers (OWLv2, Mask2Former, DETR …), or nano"
QUESTION_JUDGE = "folder of an image-text model of transformers, or a system (nano, seed-x-i …)"


class JudgedBenchmark(NamedTuple):
    """A benchmark of drawings.

    title: help of its command.
    judge: what judges, `DETECTOR` or `QUESTION_JUDGE`.
    file: name of its published file of prompts.
    num_images: drawings of a prompt in the paper.
    reader: function that reads the file, as `package.module:function`.
    evaluation: class of `judged.JudgedDrawings`.
    """

    title: str
    judge: str
    file: str
    num_images: int
    reader: str
    evaluation: str


JUDGED = {
    "geneval": JudgedBenchmark(
        "objects of prompts in drawings, by a detector",
        DETECTOR,
        "evaluation_metadata.jsonl",
        4,
        "seed_multimodal.evaluation.geneval:read_object_prompts",
        "seed_multimodal.evaluation.geneval:GenEval",
    ),
    "geneval2": JudgedBenchmark(
        "questions about drawings: Soft-TIFA",
        QUESTION_JUDGE,
        "geneval2_data.jsonl",
        1,
        "seed_multimodal.evaluation.tifa:read_geneval2",
        "seed_multimodal.evaluation.tifa:GenEval2",
    ),
    "dpg": JudgedBenchmark(
        "questions about drawings of long prompts: DPG-Bench",
        QUESTION_JUDGE,
        "dpg_bench.csv",
        4,
        "seed_multimodal.evaluation.tifa:read_dpg",
        "seed_multimodal.evaluation.tifa:DpgBench",
    ),
}
