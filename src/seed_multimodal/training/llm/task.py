"""The language model's trainer task: data, model, loss, and the files of a run.

With packed data all learned tokens of a step have equal weight: processes sum their counts before the first backward
pass. Otherwise the micro-batches' means are averaged, as in the original.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seed_multimodal.data.decoders import FEATURE_DECODERS
from seed_multimodal.data.stream.config import (
    LlmDataSettings,
    read_data_settings,
    read_once,
    with_template,
)
from seed_multimodal.data.stream.llm_batches import LlmBatch, LlmBatches
from seed_multimodal.device import DTYPES, peak_tflops
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.system.config import record_base
from seed_multimodal.training.config import OptimSettings
from seed_multimodal.training.distributed import ProcessGroup, translate_errors
from seed_multimodal.training.llm.config import (
    LlmModelSettings,
    LlmTrainerSettings,
    TokenizerSettings,
    adapt_to_run,
    project_path,
    read_model_settings,
    read_tokenizer,
    template_of,
)
from seed_multimodal.training.llm.lora import is_lora
from seed_multimodal.training.llm.loss import LossModule, LossWeights, find_llama, round_residual
from seed_multimodal.training.llm.metrics import (
    TokenMeter,
    join_reports,
    summary_lines,
    token_flops,
)
from seed_multimodal.training.llm.model import build_llm, load_trained, save_trained, trained_state
from seed_multimodal.training.llm.samples import record_embeds, write_samples
from seed_multimodal.training.optimizers import build_optimizer
from seed_multimodal.training.run import RunSettings, RunTask
from seed_multimodal.training.trainer import Trainer

_LEAST = 1e-8  # divisor of a step without targets


class LlmTask(RunTask):
    """One run of the language model in one process."""

    averages = False
    meter: TokenMeter
    module: Any
    start_hint = "model.adapter, or model.path"
    tokenizer_kind: type[MultimodalTokenizer] = MultimodalTokenizer
    group_types: ClassVar[Mapping[str, Any]] = {
        "model": LlmModelSettings,
        "data": LlmDataSettings,
        "optim": OptimSettings,
        "tokenizer": TokenizerSettings,
        "trainer": LlmTrainerSettings,
    }
    optional_groups = ("deepspeed", "eval_data")
    group_readers: ClassVar[Mapping[str, Callable[..., Any]]] = {
        "model": read_model_settings,
        "data": read_data_settings,
        "eval_data": read_data_settings,
        "tokenizer": read_tokenizer,
    }

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> RunSettings:
        run = super().read(config)
        run.model = adapt_to_run(run.model, run.trainer, run.deepspeed is not None)
        template = template_of(run.model)
        run.data, run.eval_data = (
            data and with_template(data, template) for data in (run.data, run.eval_data)
        )
        return run

    def __init__(self, run: RunSettings, group: ProcessGroup, device: torch.device) -> None:
        """Open data and tokenizer. Raises as `RunTask.train`."""
        super().__init__(run, group, device)
        if self.settings.precision == "fp16" and device.type == "cpu":
            raise ConfigError("trainer: fp16 needs a GPU; use bf16 or fp32 on a CPU.")
        self.tokenizer = self.tokenizer_kind.from_pretrained(run.tokenizer)
        data = run.data
        self.averages_tokens = (
            self.settings.loss_average or ("tokens" if data.packing else "batch")
        ) == "tokens"
        self.loss_weights = LossWeights(
            self.tokenizer.vocabulary.n_text, self.settings.text_weight, self.settings.image_weight
        )
        self.data = LlmBatches(
            data,
            self.tokenizer,
            rank=group.rank,
            world=group.world,
            workers=self.settings.dataloader_num_workers,
            log=self._log,
        )
        self.rows = data.rows
        self.evaluation = self._held_out()
        self.meter = TokenMeter()
        self.trainer: Trainer
        self.llm: Any
        self.batches: list[LlmBatch] = []
        self.share = self.each = 1.0
        self.sampled: LlmBatch | None = None

    def prepare(self) -> None:
        """Build the model and its optimizer."""
        super().prepare()
        self.llm = build_llm(
            self.run.model,
            self.tokenizer,
            self.device,
            self.settings.precision,
            sharded=self.zero_stage == 3,
        )
        self.width = int(find_llama(self.llm).config.hidden_size)
        self.module = self.make_module()
        self.optimizer = build_optimizer(self.module, self.run.optim, self.device)
        self.meter.flops = token_flops(self.llm, 1.0)  # before ZeRO-3 shards the weights
        self.meter.peak = self.settings.peak_tflops or peak_tflops(
            self.device, DTYPES[self.settings.precision]
        )
        if self.run.deepspeed is None:
            round_residual(self.module, self.settings.precision)

    def check_views(self, side: int, default: int) -> None:
        """Raise ConfigError if views of a source (default: `default` pixels) do not fit the vision encoder."""
        for source in (
            source
            for data in (self.run.data, self.run.eval_data)
            if data
            for source in data.sources
        ):
            found = source.options.get("base_resolution", default)
            if source.decoder in FEATURE_DECODERS and found != side:
                raise ConfigError(
                    f"data: base_resolution of source {source.name} is {found}, but the vision "
                    f"encoder's input is {side} pixels a side."
                )

    def make_module(self) -> nn.Module:
        """The trained module, around `llm`."""
        return LossModule(self.llm, self.loss_weights)

    def before_training(self, run: Trainer) -> None:
        """Log the trained parameters."""
        self.trainer = run
        # The last evaluation may be newer than the checkpoint of its step.
        run.evaluation = run.log.last_line_with("eval_") or run.evaluation
        what = (
            f"{self.rows} packed rows of {self.run.data.length:,}"
            if self.run.data.packing
            else "padded rows"
        )
        self.log_sizes(
            f"{run.engine.kind}, micro-steps of {what}, the loss a mean over "
            f"{'tokens' if self.averages_tokens else 'micro-batches'}; "
        )

    def begin_step(self, step: int) -> bool:
        """Load the step's micro-batches (fewer at the end of the data) and count their learned tokens."""
        count = self.settings.gradient_accumulation_steps
        self.batches = [self.prepare_batch(batch) for batch in itertools.islice(self.data, count)]
        learned = sum(
            self.loss_weights.count(
                one.labels, one.position_ids if one.attention_mask is None else None
            )
            for one in self.batches
        )
        total, left = self.group.sum([learned, float(len(self.batches))])
        world = self.group.world
        self.each = left / world  # mean micro-batches per process
        self.share = (
            world / max(total, _LEAST) if self.averages_tokens else 1.0 / max(self.each, _LEAST)
        )
        self.meter.divisor = total if self.averages_tokens else world
        return left > 0

    def micro_step(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """This micro-batch's share of the loss; of a blank batch if this process has fewer than others."""
        place = micro_step % self.settings.gradient_accumulation_steps
        real = self.batches[place] if place < len(self.batches) else None
        parts = self.loss_parts(model, real or self.prepare_batch(blank_batch()))
        value = parts.sum if self.averages_tokens else parts.mean
        sums = {
            key: getattr(parts, key)
            for key in ("text_sum", "text_count", "image_sum", "image_count")
        }
        return value * self.share, {
            "loss": value.detach() if self.averages_tokens else value.detach() / self.each,
            **sums,
            "tokens": real.tokens if real else 0,
            "squares": real.squares if real else 0,
            "positions": real.input_ids.numel() if real else 0,
        }

    def prepare_batch(self, batch: LlmBatch) -> LlmBatch:
        """A batch prepared for `loss_parts`."""
        return batch

    def loss_parts(self, model: nn.Module, batch: LlmBatch) -> Any:
        """`loss.LossParts` of a prepared batch."""
        batch = batch.to(self.device)
        return model(batch.input_ids, batch.labels, batch.position_ids, batch.attention_mask)

    def after_step(self, step: int) -> Mapping[str, float] | None:
        """Write samples and evaluate when due."""
        if self.zero_stage < 3 and self.should_write_samples(step):
            self._write_samples(step)
        return (
            self._evaluate() if self.evaluation and step % self.settings.eval_steps == 0 else None
        )

    def after_last_step(self, step: int) -> Mapping[str, float] | None:
        """Evaluate, unless done after this step."""
        return (
            self._evaluate()
            if self.evaluation and self.trainer.evaluation.get("step") != step
            else None
        )

    def status(self) -> Mapping[str, float]:
        return {"wait_seconds": self.data.wait_seconds}

    def close(self) -> None:
        self.data.close()

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        """For summary.json: data of all processes, and metrics."""
        return {
            "data": join_reports(group.gather(self.data.report())),
            "processes": group.world,
            "rows": self.rows,
            "micro_steps": self.settings.gradient_accumulation_steps,
            **self.meter.total,
            "loss": self.meter.last.get("loss"),
            "evaluation": self.trainer.evaluation,
            "checkpoint": str(self.trainer.store.last_folder),
        }

    def summary(self, record: Mapping[str, Any]) -> list[str]:
        return summary_lines(record)

    def _held_out(self) -> list[LlmBatch]:
        """Evaluation batches, read before the first step so that errors show early; none: no evaluation.

        A set that fits into the batches of all processes is used once, so that its loss is independent of their number.
        All processes have the same number of batches, since forward passes are collective under DDP and ZeRO-3.
        """
        if self.run.eval_data is None or not self.settings.eval_steps:
            return []
        settings = read_once(self.run.eval_data)
        with LlmBatches(
            settings, self.tokenizer, rank=self.group.rank, world=self.group.world
        ) as data:
            found = list(itertools.islice(data, self.settings.eval_batches))
        most = max(other["batches"] for other in self.group.gather({"batches": len(found)}))
        return found + [blank_batch()] * (most - len(found))

    def _evaluate(self) -> dict[str, float]:
        """Mean losses of the evaluation data of all processes; empty without targets or after SIGTERM."""
        model, sums = self.trainer.engine.model, torch.zeros(6, dtype=torch.float64)
        with translate_errors(
            f"the evaluation after step {self.trainer.step}", self.trainer.store.description()
        ):
            model.eval()
            with torch.no_grad():
                for batch in self.evaluation:
                    if self.trainer.stop_requested():
                        self._log("the evaluation is skipped because of SIGTERM.")
                        model.train()
                        return {}
                    with self.trainer.engine.autocast():
                        parts = self.loss_parts(model, self.prepare_batch(batch))
                    sums += (
                        torch.stack([part.float() for part in parts]).cpu().double()
                    )  # Apple GPUs have no fp64
            model.train()
            return self.evaluation_line(*self.group.sum(sums.tolist()))

    @torch.no_grad()
    def _write_samples(self, step: int) -> None:
        """Write answers to the same prompts every time, to `samples/` and TensorBoard."""
        if self.sampled is None:
            self.sampled = (
                self.prepare_batch(self.evaluation[0]) if self.evaluation else self.batches[0]
            )
        llama, file = find_llama(self.llm), self.run.output_dir / "samples" / f"step-{step}.txt"
        self.module.eval()
        with self.trainer.engine.autocast():
            with record_embeds(llama) as embeds:
                self.loss_parts(self.module, self.sampled)
            text = write_samples(file, llama, self.tokenizer, self.sampled, embeds[0])
        self.module.train()
        if self.trainer.log.board is not None:
            self.trainer.log.board.add_text("samples", text, step)

    def evaluation_line(
        self,
        total: float,
        count: float,
        text: float,
        text_count: float,
        image: float,
        image_count: float,
    ) -> dict[str, float]:
        """Log numbers from the sums over all batches; empty without targets."""
        parts = {
            "eval_text_loss": text / max(text_count, 1),
            "eval_image_loss": image / max(image_count, 1),
        }
        line = {"eval_loss": total / max(count, _LEAST), **(parts if image_count else {})}
        return line if text_count + image_count else {}

    def identity(self, world: int) -> dict[str, Any]:
        model = {key: getattr(self.run.model, key) for key in ("path", "sizes", "lora")}
        return {
            **super().identity(world),
            "model": {**model, "words": self.tokenizer.vocabulary.size},
            "rows_per_step": world * self.settings.gradient_accumulation_steps * self.rows,
        }

    def state_dict(self, step: int) -> dict[str, Any]:
        return dict(self.data.state())

    def load_state_dict(self, states: list[dict[str, Any]], rank: int) -> None:
        self.data.restore(states)

    def weights(self, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        if gathered is None:
            return trained_state(self.llm)
        found = {name.removeprefix("llm."): value for name, value in gathered.items()}
        if not is_lora(self.llm):
            return found
        short = {
            name.replace(".default", "").replace(".modules_to_save", ""): value
            for name, value in found.items()
        }
        return {name: short[name] for name in trained_state(self.llm)}

    @property
    def saves_frozen(self) -> bool:
        """A plain LLaMA folder is complete; an adapter's is not."""
        return not is_lora(self.llm)

    def save_files(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write an adapter or a plain LLaMA folder, with the tokenizer's files."""
        save_trained(self.llm, folder, weights)
        self.tokenizer.save_pretrained(folder)
        self.record_base(folder)

    def record_base(self, folder: Path) -> None:
        """Write which system the checkpoint belongs to, for `SystemConfig.find`."""
        record_base(folder, "seed_llama", llm=self.base_folder, tokenizer=self.run.tokenizer)

    @property
    def base_folder(self) -> Path | None:
        """The folder of the base model; None: random weights."""
        path = self.run.model.path
        return None if path is None else project_path(path)

    def load_weights(self, folder: Path, allow_missing: Sequence[str] = ()) -> None:
        load_trained(self.llm, folder)


def blank_batch() -> LlmBatch:
    """A batch without targets, for a process whose data ended before others'. Padded, since attention of packed rows
    may be compiled for each length."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    return LlmBatch(
        ids,
        torch.full_like(ids, IGNORE_INDEX),
        torch.arange(2)[None],
        torch.ones_like(ids),
        tokens=0,
        learned=0,
        sequences=0,
        squares=0,
    )
