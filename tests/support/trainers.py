"""The training programs at tiny size, for tests/e2e/test_trainers.py: their arguments and
outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import lavis_runs
import llm_runs
import torch
import warm_python
import yaml
from repository import ROOT

LLM = ROOT / "MultiModalLLM"
LAVIS = ROOT / "SEED_Tokenizer"
STAGE2 = ["model.load_pretrained=False", "model.restart_every=3", "run.num_workers=1"]
STEADY = ["optim.lr_scheduler_type=constant", "optim.warmup_ratio=0", "optim.min_lr_ratio=0"]
# One scene is drawn every four steps.
FEW_SAMPLES = [
    "trainer.sample_steps=4",
    "++data.held_out={name: scenes, format: nano, options: {number: 1}}",
]
TWO = "-m torch.distributed.run --standalone --nproc-per-node 2".split()


@dataclass(frozen=True)
class Trainer:
    """A program that trains.

    Attributes:
        application: its folder. program: its file below the folder.
        parts: writes tiny weights and data into a folder.
        arguments: (that folder, output folder, steps, steps between checkpoints, further overrides)
            → its arguments.
        double: overrides with which one process has the batch of two processes without them.
        log, loss: the log's file and the name of the loss in it. weights: pattern of a run's final
            files.
        zero: its ZeRO stages. close: relative tolerance between losses of one process and of two.
        variables: (that folder) → environment variables.
    """

    name: str
    application: Path
    program: str
    parts: Callable[[Path], Any]
    arguments: Callable[[Path, Path, int, int, Sequence[str]], list[str]]
    double: Sequence[str]
    weights: str
    log: str = "train.log.jsonl"
    loss: str = "loss"
    zero: Sequence[int] = ()
    close: float = 1e-4
    variables: Callable[[Path], dict[str, str]] = lambda parts_dir: {}

    def start(
        self, parts_dir: Path, arguments: Sequence[str], *before: str
    ) -> subprocess.Popen[str]:
        """Start the program as a process; `before`: arguments of Python, as `TWO`."""
        return subprocess.Popen(
            [warm_python.PYTHON, *before, self.program, *arguments],
            cwd=self.application,
            env=lavis_runs.environment(**self.variables(parts_dir)),
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, parts_dir: Path, arguments: Sequence[str], *before: str) -> str:
        """Run the program to its successful end; returns its output."""
        process = self.start(parts_dir, arguments, *before)
        output, errors = process.communicate(timeout=400)
        assert process.returncode == 0, f"{output}\n{errors}"
        return output

    def main(self, arguments: Sequence[str]) -> int:
        """Run the program in this process; returns its exit code."""
        if self.application == LAVIS:
            if str(LAVIS) not in sys.path:
                sys.path.append(str(LAVIS))
            import train

            return int(train.main(list(arguments)))
        from seed_multimodal.training.cli import main

        return main(
            "train" if self.name == "llm" else f"train_{self.name}",
            LLM / "configs",
            list(arguments),
        )

    def losses(self, output: Path) -> dict[int, float]:
        """Step → loss, in full precision."""
        return llm_runs.losses(output, self.log, self.loss)

    def result(self, output: Path) -> dict[str, torch.Tensor]:
        """The final weights of a run."""
        from seed_multimodal.weights import load_state_dict

        weights: dict[str, torch.Tensor] = {}
        for file in sorted(output.glob(self.weights)):
            state = (
                torch.load(file, weights_only=True)["model"]
                if file.suffix == ".pth"
                else load_state_dict(file)
            )
            weights |= {f"{file.stem}.{name}": value for name, value in state.items()}
        assert weights, f"{output} has no {self.weights}"
        return weights


# ---- arguments of each program


def _in_files(config: dict[str, Any], folder: Path, groups: Sequence[str]) -> list[str]:
    """Overrides that use one file per group, as a user's configuration does."""
    folder.mkdir(parents=True, exist_ok=True)
    for group in groups:
        (folder / f"{group}.yaml").write_text(yaml.safe_dump(config[group]))
    tokenizer = config["tokenizer"]["pretrained_model_name_or_path"]
    return [f"tokenizer={tokenizer}", *(f"{group}={folder / group}.yaml" for group in groups)]


def _every(output: Path, steps: int, save: int, more: Sequence[str]) -> list[str]:
    return [
        f"output_dir={output}",
        f"trainer.max_steps={steps}",
        f"trainer.save_steps={save}",
        "trainer.curves=false",
        *more,
    ]


def _llm(parts_dir: Path, output: Path, steps: int, save: int, more: Sequence[str]) -> list[str]:
    files = {
        group: parts_dir / f"{group}.yaml"
        for group in ("model", "data", "trainer", "optim", "tokenizer")
    }
    return [*llm_runs.overrides(files, output), *_every(output, steps, save, [*STEADY, *more])]


def _llm_parts(parts_dir: Path) -> None:
    llm_runs.write_files(parts_dir, model={"lora": {**llm_runs.LORA, "lora_dropout": 0.0}})


def _hub_llm_parts(parts_dir: Path, lora: dict[str, Any] | None) -> None:
    """A Qwen 3 with tied, padded tables, which get rows for image tokens, and its tokenizer."""
    from hub_tokenizers import write_hub_tokenizer
    from tiny_llms import random_llm

    from seed_multimodal.language.hub_tokenizer import HubTokenizer

    base = parts_dir / "qwen3"
    write_hub_tokenizer(base, llm_runs.WORDS)
    tokenizer = HubTokenizer.create(base, llm_runs.CODES, llm_runs.PER_IMAGE)
    tokenizer.save_pretrained(parts_dir / "tokenizer")
    fields: dict[str, Any] = {"tie_word_embeddings": True, "initializer_range": 0.1}
    fields |= tokenizer.special_ids
    random_llm("qwen3", tokenizer.vocabulary.n_text + 14, **fields).save_pretrained(base)
    llm_runs.write_files(
        parts_dir,
        model={"sizes": None, "path": str(base), "lora": lora},
        tokenizer={"pretrained_model_name_or_path": str(parts_dir / "tokenizer")},
    )


def _written_by(module: str) -> Callable[[Path], Any]:
    """`write_parts` of a module of tests/support, imported on use: these imports are slow."""
    return lambda parts_dir: import_module(module).write_parts(parts_dir)


def _seed_x_parts(parts_dir: Path) -> None:
    """The parts of `tuning_parts` and conversations without images (a third of the batches)."""
    import tuning_parts

    tuning_parts.write_parts(parts_dir)
    (parts_dir / "words.jsonl").write_text(
        "".join(
            json.dumps({"data": [f"Make it {name}.", f"It is {name}."]}) + "\n"
            for name in tuning_parts.COLOURS
        )
    )


def _seed_x(parts_dir: Path, output: Path, steps: int, save: int, more: Sequence[str]) -> list[str]:
    import tuning_parts

    data = tuning_parts.data_of(parts_dir, seed=4)
    data["sources"].append(
        {
            **data["sources"][0],
            "name": "words",
            "files": str(parts_dir / "words.jsonl"),
            "weight": 2.0,
        }
    )
    config = tuning_parts.config_of(
        parts_dir,
        output,
        data=data,
        lora=True,
        model={"lora": {**tuning_parts.LORA, "lora_dropout": 0.0}},
    )
    groups = ("model", "agent", "visual_encoder", "data", "optim", "trainer")
    return [
        *_in_files(config, parts_dir / "files", groups),
        *_every(output, steps, save, [*STEADY, *more]),
    ]


def _lavit(parts_dir: Path, output: Path, steps: int, save: int, more: Sequence[str]) -> list[str]:
    import pretrain_parts

    config = pretrain_parts.config_of(parts_dir, output)
    groups = ("model", "visual_encoder", "data", "optim", "trainer")
    return [
        *_in_files(config, parts_dir / "files", groups),
        *_every(output, steps, save, [*STEADY, *more]),
    ]


def _seed_x_pixels(
    parts_dir: Path, output: Path, steps: int, save: int, more: Sequence[str]
) -> list[str]:
    import tiny_detokenizer

    return [
        *tiny_detokenizer.arguments(parts_dir, output, 2),
        "trainer.ema=0",
        *FEW_SAMPLES,
        *_every(output, steps, save, more),
    ]


def _lavit_pixels(
    parts_dir: Path, output: Path, steps: int, save: int, more: Sequence[str]
) -> list[str]:
    return [
        "model=tiny",
        "data=tiny",
        "trainer=tiny",
        "optim=tiny",
        f"model.diffusion={parts_dir / 'highres'}",
        f"model.tokenizer={parts_dir / 'tokenizer'}",
        f"model.decoder={parts_dir / 'decoder'}",
        *FEW_SAMPLES,
        *_every(output, steps, save, more),
    ]


def _seed_decoder(
    parts_dir: Path, output: Path, steps: int, save: int, more: Sequence[str]
) -> list[str]:
    return [
        "model=tiny",
        "data=tiny",
        "trainer=tiny",
        "optim=tiny",
        f"model.diffusion={parts_dir / 'kl'}",
        f"model.tokenizer={parts_dir / 'tokenizer'}",
        "model.scheduler={_class_name: FlowMatchEulerDiscreteScheduler}",
        *FEW_SAMPLES,
        *_every(output, steps, save, more),
    ]


def _lavis(stage: str) -> Callable[[Path, Path, int, int, Sequence[str]], list[str]]:
    def arguments(
        parts_dir: Path, output: Path, steps: int, save: int, more: Sequence[str]
    ) -> list[str]:
        config = lavis_runs.write_config(stage, parts_dir, output)
        return [
            *config,
            "--options",
            f"run.iters_per_epoch={steps}",
            "run.max_epoch=1",
            f"run.save_every_steps={save}",
            *(STAGE2 if stage == "stage2" else ()),
            *more,
        ]

    return arguments


ACCUMULATE = ["trainer.gradient_accumulation_steps=2"]
TRAINERS = [
    Trainer(
        "stage1",
        LAVIS,
        "train.py",
        lavis_runs.write_images,
        _lavis("stage1"),
        ["run.batch_size_train=16"],
        "checkpoint_0.pth",
        log="stage1.log.jsonl",
        loss="last_loss",
    ),
    Trainer(
        "stage2",
        LAVIS,
        "train.py",
        lavis_runs.write_images,
        _lavis("stage2"),
        [],
        "checkpoint_0.pth",
        log="stage2.log.jsonl",
        loss="last_loss",
    ),
    Trainer(
        "lavit_tokenizer",
        LAVIS,
        "train.py",
        lavis_runs.write_images,
        _lavis("lavit"),
        [],
        "checkpoint_0.pth",
        log="lavit-stage1.log.jsonl",
        loss="last_loss",
    ),
    Trainer(
        "llm",
        LLM,
        "src/train/train.py",
        _llm_parts,
        _llm,
        ACCUMULATE,
        "checkpoint-*/adapter_model.safetensors",
        zero=(3,),
    ),
    Trainer(
        "seed_x_sft",
        LLM,
        "src/train/train_seed_x_sft.py",
        _seed_x_parts,
        _seed_x,
        ACCUMULATE,
        "checkpoint-*/model.safetensors",
        zero=(3,),
    ),
    Trainer(
        "lavit",
        LLM,
        "src/train/train_lavit.py",
        _written_by("pretrain_parts"),
        _lavit,
        ACCUMULATE,
        "checkpoint-*/[mv]*.safetensors",
        zero=(3,),
    ),
    Trainer(
        "seed_x_detokenizer",
        LLM,
        "src/train/train_seed_x_detokenizer.py",
        _written_by("tiny_detokenizer"),
        _seed_x_pixels,
        ACCUMULATE,
        "adapter/model.safetensors",
        zero=(2,),
        variables=lambda parts_dir: {"EDITS": str(parts_dir / "edits.jsonl")},
    ),
    Trainer(
        "lavit_detokenizer",
        LLM,
        "src/train/train_lavit_detokenizer.py",
        _written_by("tiny_lavit_training"),
        _lavit_pixels,
        ACCUMULATE,
        "pixels/*/*.safetensors",
    ),
    Trainer(
        "seed_decoder",
        LLM,
        "src/train/train_seed_decoder.py",
        _written_by("tiny_decoder"),
        _seed_decoder,
        ACCUMULATE,
        "decoder/*/*.safetensors",
    ),
]
# The language model's trainer with a hub model, with LoRA and with all weights.
_LLM_TRAINER = next(entry for entry in TRAINERS if entry.name == "llm")
HUB_LLMS = [
    replace(
        _LLM_TRAINER,
        name="qwen3_lora",
        parts=lambda parts_dir: _hub_llm_parts(parts_dir, {"r": 4, "lora_dropout": 0.0}),
    ),
    replace(
        _LLM_TRAINER,
        name="qwen3",
        parts=lambda parts_dir: _hub_llm_parts(parts_dir, None),
        weights="checkpoint-*/model.safetensors",
    ),
]
