"""Command lines of the Hydra trainings: `python src/train/PROGRAM.py` with overrides or the original's flags.

    python src/train/train.py model=nano_lora tokenizer=nano data=my_data.yaml trainer.max_steps=100 output_dir=log/run
    python src/train/train.py --model configs/model/vicuna_7b_lora.yaml --train_data … --deepspeed … --bf16 True

Beside overrides and flags: `--config-path DIR` (`-cp`), `--config-name NAME` (`-cn`), `--cfg` (print the resolved
configuration and stop), `--help`, `--debug` (tracebacks). Under torchrun every process runs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from seed_multimodal.entry import guarded, run_and_exit
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import describe_settings
from seed_multimodal.training.llm.compose import compose, group_folder
from seed_multimodal.training.llm.flags import translate

# Group of the configuration -> its settings, below this package ("": none of a fixed form).
_LLM = {"model": "training.llm.model_settings:LlmModelSettings", "data": "data.stream.config:LlmDataSettings",
        "optim": "training.optimizers:OptimSettings", "trainer": "training.llm.trainer_settings:TrainerSettings",
        "tokenizer": "", "deepspeed": "", "eval_data": ""}
_PIXELS = {"model": "training.seed_x.detokenizer:DetokenizerModel", "data": "training.pixel_decoder.task:ImageData",
           "optim": "training.optimizers:OptimSettings", "trainer": "training.pixel_decoder.task:PixelTrainer",
           "deepspeed": ""}


@dataclass(frozen=True)
class Application:
    """A training with a command line of this kind.

    Attributes:
        usage: for `--help`. settings: of its groups, see `_LLM`.
        task: `module:name` below this package: an `LlmTask`, or a function of the resolved configuration.
        flags: whether the original's flags have a meaning for it.
        config_name: of its configuration, unless `--config-name` names another. folder: of it, below `configs`.
    """

    usage: str
    settings: Mapping[str, str]
    task: str
    flags: bool = False
    config_name: str = "train"
    folder: str = ""

    def train(self, config: Mapping[str, Any]) -> Any:
        """Train by a resolved configuration."""
        found = _named(self.task)
        if not isinstance(found, type):
            return found(config)
        from seed_multimodal.training.llm.task import train_llm

        return train_llm(config, found)


APPLICATIONS = {
    "train": Application(
        "Train the multimodal language model.\n\n"
        "    python src/train/train.py model=nano_lora tokenizer=nano data=my_data.yaml output_dir=log/run",
        _LLM, "training.llm.task:LlmTask", flags=True),
    "train_seed_x_sft": Application(
        "Tune SEED-X on instructions. OUTPUT_DIR/checkpoint-N is SEED-X's agent (`pretrained_model_path`);\n"
        "`src/tools/merge_lora_weights.py` makes a system's `llm` and `agent` of it.\n\n"
        "    python src/train/train_seed_x_sft.py output_dir=log/run deepspeed=stage3_offload_bf16",
        {**_LLM, "visual_encoder": "training.seed_x.tuning_settings:TowerModel",
         "agent": "training.seed_x.tuning_settings:AgentModel"},
        "training.seed_x.tuning_task:TuningTask", flags=True, config_name="train_seed_x_sft"),
    "train_lavit": Application(
        "Pre-train LaVIT on images and text (stage 2). OUTPUT_DIR/checkpoint-N is the `language_model` of a LaVIT:\n"
        "put it (or a link to it) beside `visual_tokenizer`.\n\n"
        "    python src/train/train_lavit.py output_dir=log/lavit deepspeed=configs/deepspeed/stage2_bf16.json",
        {**_LLM, "visual_encoder": "training.lavit.pretrain_settings:VisualModel"},
        "training.lavit.pretrain_task:PretrainTask", config_name="train_lavit"),
    "train_seed_x_detokenizer": Application(
        "Train SEED-X's de-tokenizer; OUTPUT_DIR/adapter is the result.\n\n"
        "    python src/train/train_seed_x_detokenizer.py model=stage2 data=stage2 trainer=stage2 output_dir=log/run",
        _PIXELS, "training.seed_x.detokenizer:train_detokenizer", folder="seed_x_detokenizer"),
    "train_lavit_detokenizer": Application(
        "Train LaVIT's pixel decoders; OUTPUT_DIR/pixels is the result.\n\n"
        "    python src/train/train_lavit_detokenizer.py model=lowres data=lowres trainer=lowres output_dir=log/run",
        {**_PIXELS, "model": "training.lavit.detokenizer:LavitPixelModel",
         "data": "training.lavit.detokenizer:LavitImages"},
        "training.lavit.detokenizer:train_lavit_detokenizer", folder="lavit_detokenizer")}


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(f"seed_multimodal.{module}"), attribute)


def main_process(program: str | Path) -> NoReturn:
    """The training at `MultiModalLLM/src/train/PROGRAM.py` as a program."""
    file = Path(program).resolve()
    run_and_exit(lambda: main(file.stem, file.parents[2] / "configs"))


def main(program: str, configs: str | Path, argv: Sequence[str] | None = None) -> int:
    """Compose and train; returns the exit code (2: refused or failed, with one sentence on stderr; 143: SIGTERM)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    rank = os.environ.get("RANK", "0")
    name = f"{program}.py" if rank == "0" else f"{program}.py (rank {rank})"
    return guarded(name, "--debug" in arguments, lambda: run(program, Path(configs), arguments))


def run(program: str, configs: Path, arguments: Sequence[str]) -> int:
    """As `main`, with refusals raised."""
    application, given = APPLICATIONS[program], translate(arguments)
    own = given.options
    folder = Path(own.config_path) if own.config_path else configs / application.folder
    if own.help:
        print(help_text(folder, application))
        return 0
    if given.original and not application.flags:
        raise ConfigError("This training takes overrides (trainer.max_steps=10), not the flags of the "
                          "language model's training; see --help.")
    composed = compose(arguments, folder, own.config_name or application.config_name, whole=not own.cfg)
    if own.cfg:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(composed.config)), end="")
        return 0
    if os.environ.get("RANK", "0") == "0":
        for remark in composed.remarks:
            print(f"[train] {remark}", flush=True)
    application.train(composed.config)
    return 0


def help_text(configs: Path, application: Application) -> str:
    """Usage, the groups' configurations, and the keys with their defaults."""
    lines = [application.usage, "", *str(__doc__).strip().splitlines()[-2:], "", f"Configurations in {configs}:"]
    for group in application.settings:
        files = group_folder(configs, group).glob("*")
        names = sorted(path.stem for path in files if path.suffix in (".yaml", ".json"))
        lines.append(f"  {group}: {', '.join(names) or '-'}")
    lines += ["", "Keys and their defaults (a group's file sets others; ???: needed):", "  output_dir=???"]
    for group, name in application.settings.items():
        lines += [f"  {line}" for line in (describe_settings(_named(name), group) if name else ())]
    return "\n".join(lines)
