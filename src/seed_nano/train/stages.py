"""The pipelines of nano, nano-x and nano-lavit: a table of stages for each."""

from __future__ import annotations

from collections.abc import Callable

from seed_nano.train import assemble as parts
from seed_nano.train import study
from seed_nano.train.diffusion import LavitLayoutTask, UnetOfCodesTask, UnetTask, XLayoutTask
from seed_nano.train.known import KnownTask
from seed_nano.train.lavit import NarrowTask, ReaderTask, TokenizerTask
from seed_nano.train.own import (
    OwnImagesTask,
    OwnWorkspace,
    encode_chats,
    install_own_llm,
    write_data,
)
from seed_nano.train.pipeline import Application, Stage
from seed_nano.train.sharp import SharpTask
from seed_nano.train.tokenizer import join_stages, records
from seed_nano.train.vae import VaeTask
from seed_nano.train.vision import ClipTask, XVisionTask
from seed_nano.train.workspace import (
    LavitWorkspace,
    Settings,
    SuccessorWorkspace,
    Workspace,
    XWorkspace,
)

STUDY_RECORDS = ("records", "things", "pool", "held_out_scenes")
# Left out with 0 steps. Without `tiny` the system has the autoencoder that the others learn from,
# without `known` it does not note unlike images.
OPTIONAL = ("tiny", "sharp", "known")


def lavis(name: str, needs: str) -> Stage:
    """A training of nano's image tokenizer by the LAVIS application."""
    arguments = ("{root}/SEED_Tokenizer/train.py", "--cfg-path", "{file}")
    run = Application(arguments, f"train_{name}")
    return Stage(name, run, tuple(needs.split()), ("tokenizer", "quantizer"))


def hydra(name: str, program: str, settings: str, needs: str, *reads: str) -> Stage:
    """A training by a program of the Hydra application, with the settings `train_SETTINGS`."""
    script = f"{{root}}/MultiModalLLM/src/train/{program}.py"
    arguments = (script, "--config-path", "{folder}", "--config-name", "{stage}")
    return Stage(name, Application(arguments, f"train_{settings}"), (needs,), reads)


def ends(
    assemble: Callable[..., object], *needs: str, sharpen: tuple[Stage, ...] = ()
) -> tuple[Stage, ...]:
    """The last stages of every pipeline; sharpen: between the assembly and what learns from its
    images."""
    flags = "--model {out} --judge {judge} --out {out}/report --limit {report_scenes}"
    report = Application(("-m", "seed_nano.report", *flags.split()))
    return (
        Stage("assemble", assemble, needs),
        *sharpen,
        Stage(
            "known", KnownTask, tuple(stage.name for stage in sharpen) or ("assemble",), ("known",)
        ),
        Stage("report", report, ("known",), ("report_scenes", "judge")),
    )


OWN_REPORT = (
    "{root}/MultiModalLLM/src/tools/report_system.py",
    *("--model", "{out}", "--save_dir", "{out}/report"),
    *("--held_out", "{work}/data/held_out.json", "--learned", "{work}/data/learned.json"),
)

# LaVIT's tokenizer and language model.
LAVIT_LANGUAGE = (
    Stage("start", parts.start_lavit, (), ("llm", "tokenizer", "unet")),
    Stage("reader", ReaderTask, ("start",), ("pool",)),
    Stage("tokenizer", TokenizerTask, ("reader",), ("pool", "tokenizer")),
    Stage("narrow", NarrowTask, ("tokenizer",), ("pool", "tokenizer")),
    hydra("language", "train_lavit", "llm", "narrow", "llm", "records", "things"),
)

PIPELINES: dict[str, tuple[type[Workspace], tuple[Stage, ...]]] = {
    "nano": (
        Workspace,
        (
            Stage("start", parts.start_nano, (), ("llm", "tokenizer", "quantizer")),
            Stage("vae", VaeTask, (), ("vae",)),
            hydra("tiny", "train_autoencoder", "tiny", "vae", "pool"),
            Stage("clip", ClipTask, (), ("clip",)),
            lavis("stage1", "start clip"),
            Stage("unet", UnetTask, ("vae", "clip"), ("pool", "unet")),
            lavis("stage2", "stage1"),
            Stage("tokenizer", join_stages, ("stage2",)),
            Stage("records", records, ("tokenizer",), ("records", "pool", "held_out_scenes")),
            hydra("llm_pretrain", "train", "pretrain", "records", "llm"),
            Stage("unet2", UnetOfCodesTask, ("unet", "tokenizer"), ("pool", "unet")),
            hydra("llm_sft", "train", "sft", "llm_pretrain", "llm"),
            Stage("llm", parts.install_llm, ("llm_sft",)),
            *ends(
                parts.assemble_nano,
                *("tiny", "clip", "tokenizer", "unet2", "llm"),
                sharpen=(Stage("sharp", SharpTask, ("assemble",), ("pool", "sharp")),),
            ),
        ),
    ),
    "study": (
        SuccessorWorkspace,
        (
            Stage("start", study.start_study, (), ("llm", "tokenizer", "quantizer")),
            Stage("readers", study.fit_readers, ("start",), ("pool",)),
            lavis("stage2", "readers"),
            Stage("tokenizer", join_stages, ("stage2",)),
            Stage("records", records, ("tokenizer",), STUDY_RECORDS),
            hydra("llm_study", "train", "sft", "records", "llm"),
            Stage("assemble", study.assemble_study, ("llm_study",)),
            Stage("measures", study.measure, ("assemble",), ("things", "scenes", "judge")),
        ),
    ),
    "study_grid": (
        SuccessorWorkspace,
        (
            Stage("start", study.start_grid, (), ("llm", "grid", "pool")),
            Stage("records", study.grid_records, ("start",), STUDY_RECORDS),
            hydra("llm_study", "train", "sft", "records", "llm"),
            Stage("assemble", study.assemble_study, ("llm_study",)),
            Stage("measures", study.measure_grid, ("assemble",), ("things", "scenes", "judge")),
        ),
    ),
    "study_lavit": (
        LavitWorkspace,
        (
            *LAVIT_LANGUAGE,
            Stage("llm", parts.install_lavit_llm, ("language",)),
            Stage("measures", study.measure_lavit, ("llm",), ("things", "scenes", "judge")),
        ),
    ),
    "nano_x": (
        XWorkspace,
        (
            Stage("start", parts.start_x, (), ("llm", "vision", "unet")),
            Stage("vision", XVisionTask, ("start",), ("vision",)),
            hydra("first", "train_seed_x_detokenizer", "first", "vision", "unet", "records"),
            hydra("sft", "train_seed_x_sft", "sft", "vision", "llm", "records"),
            hydra("second", "train_seed_x_detokenizer", "second", "first", "unet", "records"),
            Stage("layout", XLayoutTask, ("vision",), ("pool", "layout")),
            Stage("agent", parts.install_agent, ("sft",)),
            *ends(parts.assemble_x, "layout", "second", "agent"),
        ),
    ),
    "nano_lavit": (
        LavitWorkspace,
        (
            *LAVIT_LANGUAGE,
            Stage("layout", LavitLayoutTask, ("narrow",), ("pool", "drawn", "layout")),
            hydra("pixels", "train_lavit_detokenizer", "pixels", "layout", "unet", "records"),
            Stage("llm", parts.install_lavit_llm, ("language",)),
            *ends(parts.assemble_lavit, "narrow", "pixels", "llm"),
        ),
    ),
    "own": (
        OwnWorkspace,
        (
            Stage("data", write_data, (), ("data", "data_state", "chats", "held_out")),
            Stage("images", OwnImagesTask, ("data",)),
            Stage("codes", encode_chats, ("data", "images"), ("views",)),
            hydra("sft", "train", "sft", "codes"),
            Stage("llm", install_own_llm, ("sft",)),
            Stage("report", Application(OWN_REPORT), ("llm",)),
        ),
    ),
}


def used_stages(system: str, config: Settings) -> dict[str, Stage]:
    """The stages of a run by their names, without those that its settings leave out."""
    stages = {}
    for stage in PIPELINES[system][1]:
        if stage.name not in OPTIONAL or getattr(config, f"train_{stage.name}").max_steps:
            stages[stage.name] = stage
    return stages
