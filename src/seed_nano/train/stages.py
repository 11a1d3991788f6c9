"""The pipelines of nano, nano-x and nano-lavit: a table of stages for each."""

from __future__ import annotations

from typing import Any

from seed_nano.train import assemble as parts
from seed_nano.train.diffusion import LavitLayoutTask, UnetOfCodesTask, UnetTask, XLayoutTask
from seed_nano.train.lavit import NarrowTask, ReaderTask, TokenizerTask
from seed_nano.train.pipeline import Application, Program, Stage
from seed_nano.train.tokenizer import join_stages, records
from seed_nano.train.vae import VaeTask
from seed_nano.train.vision import ClipTask, XVisionTask
from seed_nano.train.workspace import LavitWorkspace, Workspace, XWorkspace

LAVIS = "SEED_Tokenizer/train.py"
HYDRA = "MultiModalLLM/src/train/{}.py"


def _ends(assemble: Any, *needs: str) -> tuple[Stage, ...]:
    """The last stages of every pipeline."""
    return (
        Stage("assemble", assemble, needs),
        Stage(
            "report",
            Program(
                "seed_nano.report",
                (
                    "--model",
                    "{out}",
                    "--judge",
                    "{judge}",
                    "--out",
                    "{out}/report",
                    "--limit",
                    "{report_scenes}",
                ),
            ),
            ("assemble",),
            ("report_scenes", "judge"),
        ),
    )


PIPELINES: dict[str, tuple[type[Workspace], tuple[Stage, ...]]] = {
    "nano": (
        Workspace,
        (
            Stage("start", parts.start, (), ("llm", "tokenizer")),
            Stage("vae", VaeTask, (), ("vae",)),
            Stage("clip", ClipTask, (), ("clip",)),
            Stage("stage1", Application(LAVIS, "train_stage1"), ("start", "clip"), ("tokenizer",)),
            Stage("unet", UnetTask, ("vae", "clip"), ("pool", "unet")),
            Stage("stage2", Application(LAVIS, "train_stage2"), ("stage1",), ("tokenizer",)),
            Stage("tokenizer", join_stages, ("stage2",)),
            Stage("records", records, ("tokenizer",), ("records", "pool", "held_out_scenes")),
            Stage(
                "llm_pretrain",
                Application(HYDRA.format("train"), "train_pretrain"),
                ("records",),
                ("llm",),
            ),
            Stage("unet2", UnetOfCodesTask, ("unet", "tokenizer"), ("pool", "unet")),
            Stage(
                "llm_sft",
                Application(HYDRA.format("train"), "train_sft"),
                ("llm_pretrain",),
                ("llm",),
            ),
            Stage("llm", parts.install_llm, ("llm_sft",)),
            *_ends(parts.assemble_nano, "vae", "clip", "tokenizer", "unet2", "llm"),
        ),
    ),
    "nano_x": (
        XWorkspace,
        (
            Stage("start", parts.start, (), ("llm", "vision", "unet")),
            Stage("vision", XVisionTask, ("start",), ("vision",)),
            Stage(
                "first",
                Application(HYDRA.format("train_seed_x_detokenizer"), "train_first"),
                ("vision",),
                ("unet", "records"),
            ),
            Stage(
                "sft",
                Application(HYDRA.format("train_seed_x_sft"), "train_sft"),
                ("vision",),
                ("llm", "records"),
            ),
            Stage(
                "second",
                Application(HYDRA.format("train_seed_x_detokenizer"), "train_second"),
                ("first",),
                ("unet", "records"),
            ),
            Stage("layout", XLayoutTask, ("vision",), ("pool", "layout")),
            Stage("agent", parts.install_agent, ("sft",)),
            *_ends(parts.assemble_x, "layout", "second", "agent"),
        ),
    ),
    "nano_lavit": (
        LavitWorkspace,
        (
            Stage("start", parts.start, (), ("llm", "tokenizer", "unet")),
            Stage("reader", ReaderTask, ("start",), ("pool",)),
            Stage("tokenizer", TokenizerTask, ("reader",), ("pool", "tokenizer")),
            Stage("narrow", NarrowTask, ("tokenizer",), ("pool", "tokenizer")),
            Stage(
                "language",
                Application(HYDRA.format("train_lavit"), "train_llm"),
                ("narrow",),
                ("llm", "records"),
            ),
            Stage("layout", LavitLayoutTask, ("narrow",), ("pool", "drawn", "layout")),
            Stage(
                "pixels",
                Application(HYDRA.format("train_lavit_detokenizer"), "train_pixels"),
                ("layout",),
                ("unet", "records"),
            ),
            Stage("llm", parts.install_llm, ("language",)),
            *_ends(parts.assemble_lavit, "narrow", "pixels", "llm"),
        ),
    ),
}
