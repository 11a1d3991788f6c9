"""The language model's trainer task: data, model, loss, and the files of a run.

With packed data all learned tokens of a step have equal weight: processes sum their counts before
the first backward pass. Otherwise the micro-batches' means are averaged, as in the original.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from seed_multimodal.config import project_path
from seed_multimodal.data.decoders import opens_images
from seed_multimodal.data.stream.config import (
    LlmDataSettings,
    read_data_settings,
    read_once,
    with_option,
)
from seed_multimodal.data.stream.llm_batches import LlmBatch, LlmBatches
from seed_multimodal.device import DTYPES, peak_tflops
from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.hub_tokenizer import load_text_tokenizer
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.pipelines.config import DEFAULT_FAMILY, write_checkpoint_system
from seed_multimodal.training.config import ConfigNode
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.hydra_task import RunSettings, RunTask
from seed_multimodal.training.llm.config import (
    LlmModelSettings,
    LlmTrainerSettings,
    TokenizerSettings,
    adapt_to_run,
    read_model_settings,
    read_tokenizer,
    template_of,
)
from seed_multimodal.training.llm.lora import adapter_name, is_lora
from seed_multimodal.training.llm.loss import (
    LossModule,
    LossParts,
    LossWeights,
    find_llama,
    round_residual,
)
from seed_multimodal.training.llm.metrics import join_reports, summary_lines, token_flops
from seed_multimodal.training.llm.model import (
    build_llm,
    load_llm_weights,
    published_weights,
    save_llm_weights,
)
from seed_multimodal.training.llm.samples import record_embeds, write_samples
from seed_multimodal.training.meters import MIN_WEIGHT, Metrics, TokenMeter
from seed_multimodal.training.optimizers import build_optimizer
from seed_multimodal.training.task import Identity, RunView


@dataclass(kw_only=True)
class LlmRunSettings(RunSettings):
    """Settings of a language model's run: the model adapted to the engine, the data's prompts to
    the model."""

    readers: ClassVar[Mapping[str, Callable[[ConfigNode, str], object]]] = {
        "model": read_model_settings,
        "data": read_data_settings,
        "eval_data": read_data_settings,
        "tokenizer": read_tokenizer,
    }

    model: LlmModelSettings
    data: LlmDataSettings
    trainer: LlmTrainerSettings
    tokenizer: TokenizerSettings
    eval_data: LlmDataSettings | None = None

    def __post_init__(self) -> None:
        self.model = adapt_to_run(self.model, self.trainer, self.deepspeed is not None)
        template = template_of(self.model, self.tokenizer.folder)
        self.data = with_option(self.data, "template", template)
        if self.eval_data is not None:
            self.eval_data = with_option(self.eval_data, "template", template)


class LanguageModelTask(RunTask):
    """A run whose checkpoints are a language model's: an adapter, or all weights.

    llm: the model. base_folder: that of its start; None: random weights.
    """

    family = DEFAULT_FAMILY  # of systems with its checkpoints
    llm: nn.Module
    tokenizer: TextTokenizer
    tokenizer_folder: Path
    base_folder: Path | None

    def published(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter with PEFT 0.4's names, or all weights; of tied ones one."""
        names = {name.removeprefix("llm."): name for name in weights}
        if is_lora(self.llm):
            names = {adapter_name(published): name for published, name in names.items()}
        return {
            published: weights[names[published]].detach()
            for published in published_weights(self.llm)
            if published in names
        }

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write an adapter or a plain LLaMA folder, with the tokenizer's files."""
        save_llm_weights(self.llm, folder, weights)
        self.tokenizer.save_pretrained(folder)
        self.record_base(folder)

    def record_base(self, folder: Path) -> None:
        """Write which system the checkpoint belongs to, for `SystemConfig.find`."""
        write_checkpoint_system(
            folder, self.family, llm=self.base_folder, tokenizer=self.tokenizer_folder
        )

    def load(self, folder: Path) -> None:
        load_llm_weights(self.llm, folder)


class LlmTask(LanguageModelTask):
    """One run of the language model in one process."""

    run: LlmRunSettings
    settings: LlmTrainerSettings
    plain_attention = False
    meter: TokenMeter
    start_hint = "model.adapter, or model.path"
    run_type: ClassVar[type[RunSettings]] = LlmRunSettings

    def __init__(self, run: LlmRunSettings, group: ProcessGroup, device: torch.device) -> None:
        """Open data and tokenizer. Raises as `RunTask.train`."""
        super().__init__(run, group, device)
        # Another number of rows is another mean gradient at the same rate.
        self.fixes_rows = self.settings.resume in ("auto", "never")
        if self.fixes_rows:
            self.start_hint += ", or trainer.resume=CHECKPOINT to keep the optimizer"
        if self.settings.precision == "fp16" and device.type == "cpu":
            raise ConfigError("trainer: fp16 needs a GPU; use bf16 or fp32 on a CPU.")
        self.tokenizer_folder = run.tokenizer.folder
        self.tokenizer = self.load_tokenizer(self.tokenizer_folder)
        path = run.model.path
        self.base_folder = None if path is None else project_path(path)

        # 1. The loss.
        default_average = "tokens" if run.data.packing else "batch"
        # Whether all learned tokens of a step have equal weight, else all micro-batches.
        self.equal_token_weights = (self.settings.loss_average or default_average) == "tokens"
        self.loss_weights = LossWeights(
            self.tokenizer.vocabulary.n_text, self.settings.text_weight, self.settings.image_weight
        )

        # 2. The data of training and evaluation.
        self.data = LlmBatches(
            run.data,
            self.tokenizer,
            rank=group.rank,
            world=group.world,
            nodes=group.nodes,
            workers=self.settings.dataloader_num_workers,
            log=self._log,
        )
        self.parts = [self.data]
        self.rows = run.data.rows
        self.evaluation_batches = self._read_evaluation_batches()
        if self.evaluation_batches:
            self.eval_steps = self.settings.eval_steps
        if self.zero_stage == 3:  # no process has the weights
            self.sample_steps = 0
        self.meter = TokenMeter()

    @staticmethod
    def load_tokenizer(folder: str | Path) -> TextTokenizer:
        """The tokenizer of a folder, by its files."""
        return load_text_tokenizer(folder)

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
        config = find_llama(self.llm).config
        if self.run.model.freeze_embeddings and config.tie_word_embeddings:
            self._log("freeze_embeddings: the head is frozen, too, since it is the embeddings.")
        self.width = int(config.hidden_size)
        self.module = self.make_module()
        self.optimizer = build_optimizer(self.module, self.run.optim, self.device)
        self.meter.flops = token_flops(self.llm, 1.0)  # before ZeRO-3 shards the weights
        self.meter.peak = self.settings.peak_tflops or peak_tflops(
            self.device, DTYPES[self.settings.precision]
        )
        self.saves_frozen = not is_lora(self.llm)  # an adapter's folder is not complete
        if self.run.deepspeed is None:
            round_residual(self.module, self.settings.precision)

        # Log what is trained.
        batch_kind = "padded rows"
        if self.run.data.packing:
            batch_kind = f"{self.rows} packed rows of {self.run.data.length:,}"
        engine = "plain" if self.run.deepspeed is None else "deepspeed"
        averaged = "tokens" if self.equal_token_weights else "micro-batches"
        self.log_sizes(f"{engine}, micro-steps of {batch_kind}, the loss a mean over {averaged}; ")

    def check_views(self, side: int, default: int) -> None:
        """Raise ConfigError if views of a source (default: `default` pixels) do not fit the vision
        encoder."""
        for data in (self.run.data, self.run.eval_data):
            if data is None:
                continue
            for source in data.sources:
                resolution = source.options.get("base_resolution", default)
                if opens_images(source.decoder) and resolution != side:
                    raise ConfigError(
                        f"data: base_resolution of source {source.name} is {resolution}, but the "
                        f"vision encoder's input is {side} pixels a side."
                    )

    def make_module(self) -> nn.Module:
        """The trained module, around `llm`."""
        return LossModule(self.llm, self.loss_weights)

    def batches(self, step: int) -> Sequence[LlmBatch]:
        read = itertools.islice(self.data, self.settings.gradient_accumulation_steps)
        return [self.prepare_batch(batch) for batch in read]

    def weight(self, batch: LlmBatch) -> float:
        """The weighted number of learned tokens; 1 if micro-batches have equal weights."""
        if not self.equal_token_weights:
            return 1.0
        is_packed = batch.attention_mask is None
        return self.loss_weights.count(batch.labels, batch.position_ids if is_packed else None)

    def loss(self, model: nn.Module, batch: LlmBatch | None) -> tuple[Tensor, Metrics]:
        """A sum over tokens, or the mean of the batch; None: of a blank batch."""
        n_positions = 0 if batch is None else batch.input_ids.numel()
        if batch is None:
            batch = self.prepare_batch(blank_batch())
        parts = self.loss_parts(model, batch)
        return parts.sum if self.equal_token_weights else parts.mean, {
            "text_sum": parts.text_sum,
            "text_count": parts.text_count,
            "image_sum": parts.image_sum,
            "image_count": parts.image_count,
            "tokens": batch.tokens,
            "squares": batch.squares,
            "positions": n_positions,
        }

    def prepare_batch(self, batch: LlmBatch) -> LlmBatch:
        """A batch prepared for `loss_parts`."""
        return batch

    def loss_parts(self, model: nn.Module, batch: LlmBatch) -> LossParts:
        """`loss.LossParts` of a prepared batch."""
        batch = batch.to(self.device)
        return model(
            batch.input_ids,
            batch.labels,
            batch.position_ids,
            batch.attention_mask,
            axis_ids=batch.axis_ids,
        )

    def close(self) -> None:
        self.data.close()

    def finish(self, run: RunView) -> Mapping[str, object]:
        """For summary.json: data of all processes, and metrics."""
        return {
            "data": join_reports(run.group.gather(self.data.report())),
            "processes": run.group.world,
            "rows": self.rows,
            "micro_steps": self.settings.gradient_accumulation_steps,
            **self.meter.total,
            "loss": self.meter.last.get("loss"),
            "evaluation": run.evaluation,
            "checkpoint": str(run.checkpoint),
        }

    def summary(self, record: JsonObject) -> list[str]:
        return summary_lines(record)

    def _read_evaluation_batches(self) -> list[LlmBatch]:
        """Evaluation batches, read before the first step so that errors show early; none: no
        evaluation.

        A set that fits into the batches of all processes is used once, so that its loss is
        independent of their number. All processes have the same number of batches, since forward
        passes are collective under DDP and ZeRO-3.
        """
        if self.run.eval_data is None or not self.settings.eval_steps:
            if self.run.eval_data is not None or self.settings.eval_steps:
                self._log("nothing is evaluated: this needs eval_data and trainer.eval_steps.")
            return []

        # This process's batches.
        with LlmBatches(
            read_once(self.run.eval_data),
            self.tokenizer,
            rank=self.group.rank,
            world=self.group.world,
        ) as data:
            batches = list(itertools.islice(data, self.settings.eval_batches))

        # As many as the process with the most has.
        counts = self.group.gather({"batches": len(batches)})
        longest = max(count["batches"] for count in counts)
        return batches + [blank_batch()] * (longest - len(batches))

    def evaluate(self, run: RunView) -> Mapping[str, float]:
        """Mean losses of the evaluation data of all processes; empty without targets, or if the run
        is stopped."""
        sums = torch.zeros(len(LossParts._fields), dtype=torch.float64)
        # This process's batches; a signal in any process ends the evaluation in all.
        for batch in self.evaluation_batches:
            if run.stop_requested():
                self._log("the evaluation is skipped, since the run is stopped.")
                return {}
            with run.autocast():
                parts = self.loss_parts(run.model, self.prepare_batch(batch))
            # Summed on the CPU, since Apple GPUs have no fp64.
            sums += torch.stack([part.float() for part in parts]).cpu().double()
        all_sums = torch.tensor(self.group.sum(sums.tolist()), dtype=torch.float64)
        return self.evaluation_line(LossParts(*all_sums))

    @cached_property
    def sampled_batch(self) -> LlmBatch:
        """The first batch of the evaluation's or of all training data, also in a resumed run."""
        if self.evaluation_batches:
            return self.evaluation_batches[0]
        with LlmBatches(self.run.data, self.tokenizer) as data:
            return next(data)

    def write_samples(self, run: RunView) -> None:
        """Write answers to the same prompts every time, to `samples/` and TensorBoard."""
        batch = self.prepare_batch(self.sampled_batch)
        llama = find_llama(self.llm)
        file = self.run.output_dir / "samples" / f"step-{run.step}.txt"
        with run.autocast():
            # A forward pass shows the embeddings, including those of images.
            with record_embeds(llama) as embeds:
                self.loss_parts(self.module, batch)
            text = write_samples(file, llama, self.tokenizer, batch, embeds[0])
        if run.board is not None:
            run.board.add_text("samples", text, run.step)

    def evaluation_line(self, sums: LossParts) -> dict[str, float]:
        """Log numbers from the sums over all batches; empty without targets."""
        if not sums.text_count + sums.image_count:
            return {}
        line = {"eval_loss": float(sums.sum / sums.count.clamp(min=MIN_WEIGHT))}
        if sums.image_count:
            line["eval_text_loss"] = float(sums.text_mean)
            line["eval_image_loss"] = float(sums.image_mean)
        return line

    def identity(self, world: int) -> Identity:
        identity = super().identity(world)
        identity.fixed["model"] = {
            "path": self.run.model.path,
            "sizes": self.run.model.sizes,
            "lora": self.run.model.lora,
            "words": self.tokenizer.vocabulary.size,
        }
        identity.fixed["tokenizer"] = tokenizer_checksum(self.tokenizer)
        compared = identity.fixed if self.fixes_rows else identity.reported
        micro_steps = self.settings.gradient_accumulation_steps
        compared["rows_per_step"] = world * micro_steps * self.rows
        return identity


def tokenizer_checksum(tokenizer: TextTokenizer) -> int:
    """A checksum of all tokens."""
    tokens = tokenizer.tokens(range(tokenizer.vocabulary.size))
    return zlib.crc32("\n".join(tokens).encode())


def blank_batch() -> LlmBatch:
    """A batch without targets, for a process whose data ended before others'.

    Padded, since attention of packed rows may be compiled for each length.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64)
    return LlmBatch(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE_INDEX),
        position_ids=torch.arange(2)[None],
        attention_mask=torch.ones_like(ids),
        tokens=0,
        squares=0,
    )
