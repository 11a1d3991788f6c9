"""CPU seconds and peak memory of a training step: ours, transformers' Trainer, TRL's SFTTrainer.

All train the same LLaMA (35 million weights, LoRA and five whole modules, fp32, one thread) on the
same packed rows with the same dropout masks. Loss and gradient norm of the first step must be
equal. Each runs its own loop; the Trainer's AdamW is its default one, which is fused.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece as spm
import torch
from torch import nn

from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.device import peak_memory_mib
from seed_multimodal.errors import ConfigError, SeedError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.training.llm.model import build_llm
from seed_multimodal.training.llm.task import LlmRunSettings, LlmTask
from seed_multimodal.training.trainer import micro_step_seed
from seed_nano.train.words import write_files

WORDS, CODES = 8_000, 8_192  # with `<img>` and `</img>` 16,194 tokens
LENGTH, ROW = 128, 512  # tokens of a sequence, and of a packed row
QUESTION = 78  # words of a question, if a third of the tokens is learned
SEED = 0
TOLERANCE = 1e-5
LEARNED = ("all", "third")
TRL_ADVICE = (
    "TRL is not installed: make another environment (python -m venv DIR) with a .pth file that "
    "names this one's site-packages, run `DIR/bin/pip install --no-deps trl` and `DIR/bin/pip "
    "install datasets`, and start this program with DIR/bin/python."
)


@dataclass
class Clock:
    """CPU seconds at the end of each step."""

    ends: list[float] = field(default_factory=list)

    def tick(self) -> None:
        self.ends.append(time.process_time())

    def seconds_per_step(self) -> float:
        """Without the first step, which allocates the optimizer's state."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


@dataclass
class Run:
    """One run: CPU seconds of a step, loss and gradient norm of the first one, peak memory."""

    seconds: float
    loss: float
    norm: float
    peak_mib: float = 0.0


def write_run(folder: Path, learned: str, steps: int) -> dict[str, Any]:
    """Write tokenizer and data; returns the run's configuration."""
    words = [f"w{index}" for index in range(WORDS - 3)]
    rng = random.Random(SEED)
    with open(folder / "words.txt", "w", encoding="utf-8") as file:
        for first in range(0, len(words), 100):
            file.write(" ".join(words[first : first + 100]) + "\n")
    prefix = folder / "words"
    spm.SentencePieceTrainer.Train(
        input=str(folder / "words.txt"),
        model_prefix=str(prefix),
        model_type="word",
        vocab_size=WORDS,
        minloglevel=2,
    )
    model = prefix.with_suffix(".model").read_bytes()
    write_files(folder / "tokenizer", model, CODES, 32)

    # Sequences of 128 tokens: `<s>`, the words, `</s>`, and two marks of a conversation.
    with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        for _ in range(steps * ROW // LENGTH):
            texts = rng.choices(words, k=LENGTH - 2)
            record: dict[str, Any] = {"text": " ".join(texts)}
            if learned == "third":
                answer = texts[QUESTION:-2]
                record = {"data": [" ".join(texts[:QUESTION]), " ".join(answer)]}
            file.write(json.dumps(record) + "\n")
    decoder = "pretrain.text" if learned == "all" else "sft.text_conversation"
    source = {"name": "texts", "files": str(folder / "data.jsonl"), "decoder": decoder}
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "max_position_embeddings": ROW,
        "tie_word_embeddings": False,
    }
    lora = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": "q_proj v_proj k_proj o_proj gate_proj down_proj up_proj".split(),
        "modules_to_save": (
            "embed_tokens lm_head input_layernorm post_attention_layernorm norm".split()
        ),
    }
    return {
        "model": {"sizes": sizes, "lora": lora},
        "data": {"sources": [source], "length": ROW, "rows": 1, "concat_type": "concat"},
        "optim": {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "min_lr_ratio": 0.0},
        "trainer": {
            "max_steps": steps,
            "precision": "fp32",
            "seed": SEED,
            "device": "cpu",
            "dataloader_num_workers": 0,
            "report_to": [],
            "curves": False,
            "save_steps": 0,
            "sample_steps": 0,
        },
        "tokenizer": {"pretrained_model_name_or_path": str(folder / "tokenizer")},
    }


def sequences(run: LlmRunSettings, steps: int) -> list[dict[str, list[int]]]:
    """The ids and labels that `LlmTask` trains on, in their order."""
    tokenizer = MultimodalTokenizer.from_pretrained(run.tokenizer.folder)
    rows: list[dict[str, list[int]]] = []
    with LlmBatches(run.data, tokenizer) as data:
        for _ in range(steps):
            batch = next(data)
            starts = (batch.position_ids[0] == 0).nonzero().flatten().tolist()
            if starts != list(range(0, ROW, LENGTH)):
                raise ConfigError(f"the sequences of a row start at {starts}, not every {LENGTH}.")
            ids, labels = batch.input_ids[0].split(LENGTH), batch.labels[0].split(LENGTH)
            rows += [
                {"input_ids": ids_of_one.tolist(), "labels": labels_of_one.tolist()}
                for ids_of_one, labels_of_one in zip(ids, labels, strict=True)
            ]
    return rows


def run_ours(config: dict[str, Any]) -> Run:
    """The training application in this process, without Hydra."""
    clock = Clock()

    class TimedTask(LlmTask):
        def after_step(self, step: int) -> None:
            clock.tick()

    TimedTask.train(config)
    log = Path(config["output_dir"]) / "train.log.jsonl"
    first = json.loads(log.read_text(encoding="utf-8").splitlines()[0])
    return Run(clock.seconds_per_step(), first["loss"], first["grad_norm"])


def run_peer(make: Callable[..., Any], config: dict[str, Any]) -> Run:
    """A run of a peer's trainer.

    make: (model, arguments, callbacks, rows) → the trainer.
    """
    from transformers import TrainerCallback

    run = LlmRunSettings.read(config)
    steps = run.trainer.max_steps
    clock = Clock()

    class TimedSteps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            torch.manual_seed(micro_step_seed(SEED, state.global_step, 0))

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            clock.tick()

    tokenizer = MultimodalTokenizer.from_pretrained(run.tokenizer.folder)
    model = build_llm(run.model, tokenizer, "cpu", run.trainer.precision)
    arguments = {
        "output_dir": str(run.output_dir),
        "max_steps": steps,
        "learning_rate": run.optim.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "adam_beta1": run.optim.adam_beta1,
        "adam_beta2": run.optim.adam_beta2,
        "adam_epsilon": run.optim.adam_epsilon,
        "weight_decay": run.optim.weight_decay,
        "max_grad_norm": run.trainer.max_grad_norm,
        "logging_steps": run.trainer.logging_steps,
        "logging_first_step": True,
        "train_sampling_strategy": "sequential",
        "seed": SEED,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    trainer = make(model, arguments, [TimedSteps()], sequences(run, steps))
    trainer.train()
    first = trainer.state.log_history[0]
    return Run(clock.seconds_per_step(), first["loss"], first["grad_norm"])


def make_trainer(
    model: nn.Module, arguments: Mapping[str, Any], callbacks: list[Any], rows: list[Any]
) -> Any:
    """transformers' Trainer, which joins the sequences of a batch to one row."""
    from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

    batch = TrainingArguments(**arguments, per_device_train_batch_size=ROW // LENGTH)
    return Trainer(
        model,
        batch,
        data_collator=DataCollatorWithFlattening(),
        train_dataset=rows,
        callbacks=callbacks,
    )


def make_trl(
    model: nn.Module, arguments: Mapping[str, Any], callbacks: list[Any], rows: list[Any]
) -> Any:
    """TRL's SFTTrainer, which packs the data before it trains."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    # It asks a tokenizer for the id of padding, which no row has.
    blank = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 2}, "<unk>")),
        pad_token="<unk>",
        eos_token="</s>",
    )
    return SFTTrainer(
        model,
        SFTConfig(**arguments, per_device_train_batch_size=1, packing=True, max_length=ROW),
        train_dataset=Dataset.from_list(rows),
        processing_class=blank,
        callbacks=callbacks,
    )


def run_way(options: argparse.Namespace) -> None:
    """Train in this process; prints the `Run` as the last line."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_run(folder, options.learned, options.steps)
        config["output_dir"] = str(folder / options.way)
        with redirect_stdout(sys.stderr):
            run = WAYS[options.way](config)
        run.peak_mib = peak_memory_mib(torch.device("cpu"))
    print(json.dumps(asdict(run)))


def fresh_run(way: str, learned: str, steps: int) -> Run:
    """`run_way` in a fresh process."""
    command = [sys.executable, __file__, way, learned, "--steps", str(steps)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SeedError(f"{way}: {process.stderr.strip().splitlines()[-1]}")
    return Run(**json.loads(process.stdout.splitlines()[-1]))


def check_equal(learned: str, runs: Mapping[str, Run]) -> None:
    """Raise SeedError: the first step of a peer is another computation than ours."""
    ours = runs["ours"]
    for way, run in runs.items():
        for name in ("loss", "norm"):
            value, expected = getattr(run, name), getattr(ours, name)
            if abs(value - expected) > TOLERANCE * abs(expected):
                raise SeedError(f"{way}, {learned} learned: {name} {value}, but ours {expected}.")


def compare_trainers(peers: Sequence[str], repeats: int, steps: int) -> None:
    """Print a table: ours and peers, alternating, each run in a fresh process."""
    for peer in peers:
        if peer not in WAYS:
            raise ConfigError(f"--against: {peer!r} is none of trainer and trl.")
    if "trl" in peers and importlib.util.find_spec("trl") is None:
        raise ConfigError(TRL_ADVICE)
    ways = ["ours", *peers]
    print("| learned | trainer | CPU s a step | ours / it | peak MiB |")
    print("| --- | --- | --- | --- | --- |")
    for learned in LEARNED:
        runs: dict[str, list[Run]] = {way: [] for way in ways}
        for repeat in range(repeats):
            # Each is first in turn.
            for way in ways[repeat % len(ways) :] + ways[: repeat % len(ways)]:
                runs[way].append(fresh_run(way, learned, steps))
            check_equal(learned, {way: runs[way][-1] for way in ways})
        for way in ways:
            seconds = [run.seconds for run in runs[way]]
            ratios = [a.seconds / b.seconds for a, b in zip(runs["ours"], runs[way], strict=True)]
            peaks = [run.peak_mib for run in runs[way]]
            cells = [learned, way, spread(seconds), spread(ratios), f"{max(peaks):.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def spread(values: Sequence[float]) -> str:
    """Median, and the range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


WAYS: dict[str, Callable[[dict[str, Any]], Run]] = {
    "ours": run_ours,
    "trainer": partial(run_peer, make_trainer),
    "trl": partial(run_peer, make_trl),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One run; `training.py --against` starts it.")
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("learned", choices=LEARNED)
    parser.add_argument("--steps", type=int, default=8)
    run_way(parser.parse_args())
