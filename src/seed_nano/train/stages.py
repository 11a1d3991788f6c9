"""The pipelines of nano, nano-x and nano-lavit: a table of stages for each."""

from __future__ import annotations

from typing import Any

from seed_nano.train.assemble import (
    assemble_lavit,
    assemble_nano,
    assemble_x,
    lavit_pixels,
    start_lavit,
    start_nano,
    start_x,
)
from seed_nano.train.language import install_agent, install_lavit_llm, install_llm, records
from seed_nano.train.lavit import NarrowTask, ReaderTask, TokenizerTask
from seed_nano.train.layout import LavitLayoutTask, XLayoutTask
from seed_nano.train.pipeline import Application, Program, Stage
from seed_nano.train.tokenizer import join_stages, pool_codes
from seed_nano.train.unet import UnetOfCodesTask, UnetTask
from seed_nano.train.vae import VaeTask
from seed_nano.train.vision import ClipTask, TowerTask
from seed_nano.train.workspace import LavitWorkspace, Workspace, XWorkspace

LAVIS = "SEED_Tokenizer/train.py"
HYDRA = "MultiModalLLM/src/train/{}.py"


def _codes(space: Any) -> dict[str, Any]:
    return {"scenes": len(pool_codes(space))}


def _ends(assemble: Any, *needs: str) -> tuple[Stage, ...]:
    """The last stages of every pipeline."""
    return (
        Stage("assemble", assemble, needs, ("{out}/system.json",)),
        Stage("domain", Program("seed_nano.report.domain", ("{out}", "--number", "{domain_scenes}")), ("assemble",),
              ("{out}/domain.safetensors",), ("domain_scenes",)),
        Stage("report", Program("seed_nano.report", (
            "--model", "{out}", "--judge", "{judge}", "--out", "{out}/report", "--limit", "{report_scenes}")),
              ("domain", "judge"), ("{out}/report/report.md",), ("report_scenes",)))


PIPELINES: dict[str, tuple[type[Workspace], tuple[Stage, ...]]] = {
    "nano": (Workspace, (
        Stage("start", start_nano, (), ("{words}/tokenizer.model",), ("llm", "tokenizer")),
        Stage("vae", VaeTask, (), ("{decoder}/vae/diffusion_pytorch_model.safetensors",), ("vae",)),
        Stage("clip", ClipTask, (), ("{decoder}/image_encoder/model.safetensors", "{work}/heads.safetensors",
                                     "{work}/readout.safetensors"), ("clip",)),
        Stage("stage1", Application(LAVIS, "train_stage1"), ("start", "clip"), ("{work}/stage1/checkpoint_0.pth",),
              ("tokenizer",)),
        Stage("unet", UnetTask, ("vae", "clip"), (
            "{work}/unet/unet/diffusion_pytorch_model.safetensors", "{work}/unet/layout/model.safetensors"),
              ("pool", "unet")),
        Stage("stage2", Application(LAVIS, "train_stage2"), ("stage1",), ("{work}/stage2/checkpoint_0.pth",),
              ("tokenizer",)),
        Stage("tokenizer", join_stages, ("stage2",), ("{words}/model.safetensors",)),
        Stage("codes", _codes, ("tokenizer",), ("{work}/codes.safetensors",), ("pool",)),
        Stage("records", records, ("tokenizer",), ("{work}/records/val/captions.tar",),
              ("records", "pool", "gate_scenes")),
        Stage("llm_pretrain", Application(HYDRA.format("train"), "train_pretrain"), ("records",), (), ("llm",)),
        Stage("unet2", UnetOfCodesTask, ("unet", "codes"), (
            "{decoder}/unet/diffusion_pytorch_model.safetensors", "{decoder}/layout/model.safetensors"),
              ("pool", "unet")),
        Stage("judge", Program("seed_nano.report.judge", (
            "--out", "{judge}", "--work", "{work}/judge", "--steps", "{judge_steps}")), (), ("{judge}/config.json",)),
        Stage("llm_sft", Application(HYDRA.format("train"), "train_sft"), ("llm_pretrain",), (), ("llm",)),
        Stage("llm", install_llm, ("llm_sft",), ("{out}/seed_llama/config.json",)),
        *_ends(assemble_nano, "vae", "clip", "tokenizer", "unet2", "llm"))),
    "nano_x": (XWorkspace, (
        Stage("start", start_x, (), ("{decoder}/unet/config.json", "{words}/tokenizer.model"),
              ("llm", "tower", "unet")),
        Stage("tower", TowerTask, ("start",), ("{out}/vision/model.safetensors", "{work}/heads.safetensors"),
              ("tower",)),
        Stage("first", Application(HYDRA.format("train_seed_x_detokenizer"), "train_first"), ("tower",), (),
              ("unet", "records")),
        Stage("sft", Application(HYDRA.format("train_seed_x_sft"), "train_sft"), ("tower",), (), ("llm", "records")),
        Stage("second", Application(HYDRA.format("train_seed_x_detokenizer"), "train_second"), ("first",), (),
              ("unet", "records")),
        Stage("layout", XLayoutTask, ("tower",), ("{work}/layout/model.safetensors",), ("pool", "layout")),
        Stage("agent", install_agent, ("sft",), ("{out}/llm/config.json", "{out}/agent/config.json")),
        *_ends(assemble_x, "layout", "second", "agent"))),
    "nano_lavit": (LavitWorkspace, (
        Stage("start", start_lavit, (), ("{decoder}/unet/config.json", "{words}/tokenizer.model"),
              ("llm", "tokenizer", "unet")),
        Stage("reader", ReaderTask, ("start",), ("{work}/reader.safetensors",), ("pool",)),
        Stage("tokenizer", TokenizerTask, ("reader",), (), ("pool", "tokenizer")),
        Stage("narrow", NarrowTask, ("tokenizer",), ("{out}/tokenizer/model.safetensors",
                                                     "{out}/decoder/model.safetensors"), ("pool", "tokenizer")),
        Stage("language", Application(HYDRA.format("train_lavit"), "train_llm"), ("narrow",), (), ("llm", "records")),
        Stage("layout", LavitLayoutTask, ("narrow",), ("{work}/layout/model.safetensors",),
              ("pool", "drawn", "layout")),
        Stage("decoder", lavit_pixels, ("layout",), ("{decoder}/layout/model.safetensors",)),
        Stage("pixels", Application(HYDRA.format("train_lavit_detokenizer"), "train_pixels"), ("decoder",), (),
              ("unet", "records")),
        Stage("llm", install_lavit_llm, ("language",), ("{out}/llm/config.json",)),
        *_ends(assemble_lavit, "narrow", "pixels", "llm"))),
}
