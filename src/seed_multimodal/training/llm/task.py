"""The language model as a task of the loop: its data, model and loss, and the files of a run.

With packed data each learned token of a step weighs the same wherever it lies: the processes add up their counts before
the first backward pass. Else the micro-batches' means are averaged, as released.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seed_multimodal.data.stream.config import read_data_settings, with_template
from seed_multimodal.data.stream.llm_batches import LlmBatch, LlmBatches
from seed_multimodal.device import DTYPES, known_peak
from seed_multimodal.errors import ConfigError, counted
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.settings import read_settings
from seed_multimodal.training.distributed import ProcessGroup, translate_errors
from seed_multimodal.training.engine import fill_config
from seed_multimodal.training.llm.config import KINDS, RunSettings, for_run, read_run, template_of, with_prompts
from seed_multimodal.training.llm.lora import is_lora
from seed_multimodal.training.llm.loss import IGNORED, LossModule, LossWeights, find_llama, round_residual
from seed_multimodal.training.llm.metrics import TokenMeter, join_reports, save_config, summary_lines, token_flops
from seed_multimodal.training.llm.model import build_llm, load_trained, save_trained, trained_state
from seed_multimodal.training.optimizers import OptimSettings, build_optimizer, schedule
from seed_multimodal.training.task import Task, other_numbers, refuse_other
from seed_multimodal.training.trainer import Trainer, run_task

_LEAST = 1e-8  # of a step with nothing to learn
# Settings that change no number of the training, or are reported elsewhere (`LlmTask.check_resume`).
_QUIET = ("output_dir", "deepspeed", "eval_data", "trainer.resume", "trainer.max_steps", "trainer.logging_steps",
          "trainer.save_steps", "trainer.save_total_limit", "trainer.async_save", "trainer.eval_steps",
          "trainer.eval_batches", "trainer.report_to", "trainer.dataloader_num_workers", "trainer.device",
          "trainer.timeout_minutes", "trainer.gradient_accumulation_steps", "trainer.gradient_checkpointing",
          "trainer.compile", "model.compile", "model.gradient_checkpointing")


class LlmTask(Task):
    """One run of the language model in one process."""

    name, record_file, checkpoint_folder, averages = "train", "summary.json", "", False
    meter: TokenMeter
    module: Any
    quiet_keys = _QUIET
    start_hint = "model.adapter, or model.path"
    read = staticmethod(read_run)
    tokenizer_kind: type[MultimodalTokenizer] = MultimodalTokenizer
    kinds: ClassVar[Mapping[str, type]] = KINDS

    def __init__(self, run: RunSettings, group: ProcessGroup, device: torch.device) -> None:
        """Open data and tokenizer. Raises as `train_llm`."""
        self.run, self.settings, self.group, self.device = run, run.trainer, group, device
        self.config = run.plain
        if self.settings.precision == "fp16" and device.type == "cpu":
            raise ConfigError("trainer: fp16 needs a GPU; use bf16 or fp32 on a CPU.")
        self.optim = read_settings(OptimSettings, run.optim, "optim")
        self.zero_stage = int(((run.deepspeed or {}).get("zero_optimization") or {}).get("stage", 0))
        self.model_settings = for_run(run.model, self.settings, run.deepspeed is not None)
        self.tokenizer = self.tokenizer_kind.from_pretrained(run.tokenizer)
        data, remarks = with_prompts(read_data_settings(run.data), self.model_settings, run.tokenizer)
        self._log(*remarks)
        self.by_tokens = (self.settings.loss_average or ("tokens" if data.packing else "batch")) == "tokens"
        self.loss_weights = LossWeights(self.tokenizer.vocabulary.n_text, self.settings.text_weight,
                                        self.settings.image_weight)
        self.data = LlmBatches(data, self.tokenizer, rank=group.rank, world=group.world,
                               workers=self.settings.dataloader_num_workers, log=self._log)
        self.rows = data.rows
        self.evaluation = self._held_out()
        self.meter = TokenMeter()
        self.loop: Trainer
        self.llm: Any
        self.batches: list[LlmBatch] = []
        self.share = self.each = 1.0

    def prepare(self) -> None:
        """Write the configuration into the output folder, build the model and its optimiser."""
        if self.group.first:
            save_config(self.run.output_dir, self.run.plain)
        self.llm = build_llm(self.model_settings, self.tokenizer, self.device)
        self.module = self.make_module()
        self.optimizer = build_optimizer(self.module, self.optim)
        self.meter.flops = token_flops(self.llm, 1.0)  # now: ZeRO-3 takes the weights apart
        self.meter.peak = self.settings.peak_tflops or known_peak(self.device, DTYPES[self.settings.precision])
        if self.run.deepspeed is None:
            round_residual(self.module, self.settings.precision)

    def make_module(self) -> nn.Module:
        """What is trained, around `llm`."""
        return LossModule(self.llm, kind=self.settings.loss_kernel, weights=self.loss_weights)

    def deepspeed_config(self, world: int) -> Mapping[str, Any] | None:
        """The configuration's DeepSpeed block, filled."""
        if self.run.deepspeed is None:
            return None
        config, remarks = fill_config(self.run.deepspeed, self.settings, world=world, rows=self.rows,
                                      hidden_size=int(find_llama(self.llm).config.hidden_size))
        self._log(*remarks)
        return config

    def prepared(self, run: Trainer) -> None:
        """Log what is trained."""
        self.loop = run
        # The last evaluation may be younger than the checkpoint of its step.
        run.evaluation = run.log.last_line_with("eval_") or run.evaluation
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in run.engine.module.parameters()]
        total, trained = sum(size for size, _ in sizes), sum(size for size, used in sizes if used)
        data, steps = self.data.settings, self.settings.gradient_accumulation_steps
        shared = f"{counted(steps, 'micro-step')} x {self.group.world} process{'es' if self.group.world > 1 else ''}"
        rows, positions = self.rows, self.rows * data.length * steps * self.group.world
        self._log(f"{trained:,} of {total:,} parameters are trained in {self.settings.precision} on "
                  f"{self.device.type}, {run.engine.kind}; the loss is a mean over "
                  f"{'tokens' if self.by_tokens else 'micro-batches'}; output in {self.run.output_dir}.",
                  f"a step: {counted(rows, 'packed row')} of {data.length:,} x {shared} = {positions:,} positions."
                  if data.packing else f"a step: padded micro-batches x {shared}.")

    def learning_rate(self, step: int) -> float:
        """By `OptimSettings`."""
        return schedule(step, self.optim, self.settings.max_steps, self.run.trainer.gradient_accumulation_steps)

    def begin_step(self, step: int) -> bool:
        """Load the step's micro-batches (fewer where this process's data end) and count their learned tokens."""
        count = self.settings.gradient_accumulation_steps
        self.batches = [self.ready(batch) for batch in itertools.islice(self.data, count)]
        learned = sum(self.loss_weights.count(one.labels, one.position_ids if one.attention_mask is None else None)
                      for one in self.batches)
        total, left = self.group.sum([learned, float(len(self.batches))])
        world = self.group.world
        self.each = left / world  # micro-batches that a process has, on average
        self.share = world / max(total, _LEAST) if self.by_tokens else 1.0 / max(self.each, _LEAST)
        self.meter.divisor = total if self.by_tokens else world
        return left > 0

    def micro_step(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """This micro-batch's share of the loss; a blank one's where this process has fewer than the others."""
        place = micro_step % self.settings.gradient_accumulation_steps
        real = self.batches[place] if place < len(self.batches) else None
        parts = self.losses(model, real or self.ready(blank_batch()))
        value = parts.sum if self.by_tokens else parts.mean
        sums = {key: getattr(parts, key) for key in ("text_sum", "text_count", "image_sum", "image_count")}
        return value * self.share, {"loss": value.detach() if self.by_tokens else value.detach() / self.each, **sums,
                                    "tokens": real.tokens if real else 0, "squares": real.squares if real else 0,
                                    "positions": real.input_ids.numel() if real else 0}

    def ready(self, batch: LlmBatch) -> LlmBatch:
        """A batch of the data as `losses` takes it."""
        return batch

    def losses(self, model: nn.Module, batch: LlmBatch) -> Any:
        """`loss.LossParts` of a `ready` batch by `wrapped_part`."""
        batch = batch.to(self.device)
        return model(batch.input_ids, batch.labels, batch.position_ids, batch.attention_mask)

    def after_step(self, step: int) -> Mapping[str, float] | None:
        """Evaluate when it is due."""
        return self._evaluate() if self.acts_after(step) else None

    def acts_after(self, step: int) -> bool:
        """At evaluations."""
        return bool(self.evaluation) and step % self.settings.eval_steps == 0

    def after_last_step(self, step: int) -> Mapping[str, float] | None:
        """Evaluate if that was not done after this step."""
        return self._evaluate() if self.evaluation and self.loop.evaluation.get("step") != step else None

    def status(self) -> Mapping[str, float]:
        """Seconds spent waiting for data."""
        return {"wait_seconds": self.data.wait_seconds}

    def close(self) -> None:
        """End what reads data."""
        self.data.close()

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        """For summary.json: the data of all processes, and measures."""
        last = self.meter.history[-1:]
        return {"data": join_reports(group.gather(self.data.report())), "processes": group.world,
                "rows": self.rows, "micro_steps": self.settings.gradient_accumulation_steps, **self.meter.total,
                "loss": last[0]["loss"] if last else None, "evaluation": self.loop.evaluation,
                "checkpoint": str(self.loop.store.place)}

    def summary(self, record: Mapping[str, Any]) -> list[str]:
        """Steps, tokens, sources, skipped records."""
        return summary_lines(record)

    def _held_out(self) -> list[LlmBatch]:
        """Evaluation batches, read before the first step so that mistakes in them show at once; none: no evaluation.

        Every process has as many, under DDP and ZeRO-3 each forward pass is a collective operation.
        """
        if self.run.eval_data is None or not self.settings.eval_steps:
            return []
        settings = with_template(read_data_settings(self.run.eval_data, "eval_data"), template_of(self.model_settings))
        with LlmBatches(settings, self.tokenizer, rank=self.group.rank, world=self.group.world) as data:
            found = list(itertools.islice(data, self.settings.eval_batches))
        most = max(other["batches"] for other in self.group.gather({"batches": len(found)}))
        return found + [blank_batch()] * (most - len(found))

    def _evaluate(self) -> dict[str, float]:
        """Mean losses of the evaluation data of all processes; empty if there is nothing to learn in them."""
        model, sums = self.loop.engine.model, torch.zeros(6, dtype=torch.float64)
        with translate_errors(f"the evaluation after step {self.loop.step}", self.loop.store.description()):
            model.eval()
            with torch.no_grad():
                for batch in self.evaluation:
                    sums += self.evaluation_sums(model, batch).cpu().double()  # Apple GPUs have no fp64
            model.train()
            return self.evaluation_line(*self.group.sum(sums.tolist()))

    def evaluation_sums(self, model: nn.Module, batch: LlmBatch) -> Tensor:
        """Six sums of a batch: the weighted loss and count, those of text and of image tokens."""
        batch = self.ready(batch)
        with self.loop.engine.autocast():
            return torch.stack([part.float() for part in self.losses(model, batch)])

    def evaluation_line(self, total: float, count: float, text: float, text_count: float, image: float,
                        image_count: float) -> dict[str, float]:
        """Numbers of the log out of the sums over all batches; empty if nothing is learned in them."""
        parts = {"eval_text_loss": text / max(text_count, 1), "eval_image_loss": image / max(image_count, 1)}
        line = {"eval_loss": total / max(count, _LEAST), **(parts if image_count else {})}
        return line if text_count + image_count else {}

    def identity(self, world: int) -> dict[str, Any]:
        """Engine, model, optimiser and sizes."""
        model = {key: getattr(self.model_settings, key) for key in ("path", "sizes", "lora")}
        return {"engine": "plain" if self.run.deepspeed is None else "deepspeed", "zero_stage": self.zero_stage,
                "model": {**model, "words": self.tokenizer.vocabulary.size}, "optimizer": self.optim.name,
                "world_size": world, "max_steps": self.settings.max_steps,
                "rows_per_step": world * self.settings.gradient_accumulation_steps * self.rows}

    def check_resume(self, folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        """Refuse another engine, model or optimiser, and with ZeRO another number of processes."""
        refuse_other(folder, saved, now, {"engine": "engine", "zero_stage": "ZeRO stage", "model": "model",
                                               "optimizer": "optimiser"}, self.start_hint)
        if now["engine"] == "deepspeed" and saved["world_size"] != now["world_size"]:
            raise ConfigError(f"{folder}: its ZeRO shards belong to {saved['world_size']} processes, this run has "
                              f"{now['world_size']}; or start from its weights ({self.start_hint}) in a new folder.")
        return other_numbers(saved, now, {"world_size": "processes", "rows_per_step": "rows a step",
                                          "max_steps": "steps in all (the schedule follows)"})

    def state_dict(self, step: int) -> dict[str, Any]:
        """The position in the data."""
        return dict(self.data.state())

    def load_state_dict(self, states: list[dict[str, Any]], rank: int) -> None:
        """Restore the position in the data; the number of processes may have changed."""
        self.data.restore(states)

    def weights(self, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The adapter, or all weights."""
        if gathered is None:
            return trained_state(self.llm)
        found = {name.removeprefix("llm."): value for name, value in gathered.items()}
        if not is_lora(self.llm):
            return found
        short = {name.replace(".default", "").replace(".modules_to_save", ""): value for name, value in found.items()}
        return {name: short[name] for name in trained_state(self.llm)}

    def save_files(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """An adapter's or a plain LLaMA folder, with the tokenizer's files."""
        save_trained(self.llm, folder, weights)
        self.tokenizer.save_pretrained(folder)

    def load_weights(self, folder: Path, allow_missing: Sequence[str] = ()) -> None:
        """Inverse of `save_files`."""
        load_trained(self.llm, folder)

    def _log(self, *texts: str) -> None:
        for text in filter(None, texts if self.group.first else ()):
            print(f"[{self.name}] {text}", flush=True)


def train_llm(config: Mapping[str, Any], kind: type[LlmTask] = LlmTask) -> dict[str, Any]:
    """Train by a resolved configuration; returns the run's record, as `run_task`."""
    return run_task(read_run(config), kind)


def blank_batch() -> LlmBatch:
    """A batch with nothing to learn, for a process whose data have ended before the others'. It is padded: the
    attention of packed rows may be compiled for each length."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    return LlmBatch(ids, torch.full_like(ids, IGNORED), torch.arange(2)[None], torch.ones_like(ids), tokens=0,
                    learned=0, sequences=0, squares=0)
