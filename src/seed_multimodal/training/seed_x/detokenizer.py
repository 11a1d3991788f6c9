"""SEED-X's de-tokenizer as a task of the loop: both stages of the SDXL adapter, from pictures and edits.

Stage 1: the resampler and the U-Net's keys and values learn to draw from a frozen tower's embeddings. Stage 2: the
first convolution also reads the latents of a condition picture, the source of an edit or zeros. What the paper says and
what is our choice: `detokenizers/sdxl_training.py`, and the configurations' comments.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from seed_multimodal.data.stream.drawn_pairs import DrawnPairs, open_pictures
from seed_multimodal.data.stream.order import MixedOrder
from seed_multimodal.data.stream.pair_dataset import JoinedPairs, SourceDataset, sample_seed
from seed_multimodal.data.stream.step_batches import StepBatches, block_of
from seed_multimodal.detokenizers.sdxl_adapter import SIZES, SDXLAdapter
from seed_multimodal.detokenizers.sdxl_training import AdapterLoss, adapter_from_sdxl
from seed_multimodal.device import copy_to
from seed_multimodal.disk import replace_text, writing
from seed_multimodal.errors import ConfigError
from seed_multimodal.hub import SDXL_WHERE, find_folder
from seed_multimodal.quiet import quiet_libraries
from seed_multimodal.training.checkpoint_folders import check_shared
from seed_multimodal.training.distributed import ProcessGroup, leave_processes, start_processes
from seed_multimodal.training.failures import translate_errors
from seed_multimodal.training.llm.summary import save_config
from seed_multimodal.training.loop import train
from seed_multimodal.training.meter import Meter
from seed_multimodal.training.optimizers import build_optimizer, schedule
from seed_multimodal.training.resume import other_numbers, refuse_other_kind, refuse_other_numbers
from seed_multimodal.training.seed_x.detokenizer_features import (
    DTYPES,
    PictureFeatures,
    drawn_latents,
    load_autoencoder,
    load_schedule,
)
from seed_multimodal.training.seed_x.detokenizer_memory import held_memory
from seed_multimodal.training.seed_x.detokenizer_settings import DetokenizerModel, DetokenizerRun, read_detokenizer_run
from seed_multimodal.training.seed_x.kept_features import keep_features
from seed_multimodal.training.task import Task
from seed_multimodal.training.zero import fill_config, full_weights, use_offload_threads
from seed_multimodal.vision.checkpointing import checkpointed
from seed_multimodal.vision.qwen_vit import QwenVit

ADAPTER = "adapter"  # the folder of the result in the run's
SMALL = 256  # side of pictures of which the autoencoder takes one at a time; of smaller ones it takes several
# Settings that change no number of the training, or are reported elsewhere (`DetokenizerTask.check_resume`).
_QUIET = ("output_dir", "data.batch_size", "data.cache", "model.gradient_checkpointing", "trainer.resume",
          "trainer.logging_steps", "trainer.save_steps", "trainer.save_total_limit", "trainer.async_save",
          "trainer.report_to", "trainer.run_name", "trainer.dataloader_num_workers", "trainer.device",
          "trainer.timeout_minutes", "trainer.gradient_accumulation_steps", "trainer.save_frozen", "deepspeed")


class DetokenizerTask(Task):
    """One run in one process."""

    name, record_file, checkpoint_folder = "train", "summary.json", ""
    quiet_keys = _QUIET
    start_hint = "model.start"
    module: SDXLAdapter

    def __init__(self, run: DetokenizerRun, group: ProcessGroup, device: torch.device) -> None:
        """Open the sources. Raises as `train_detokenizer`."""
        self.run, self.settings, self.group, self.device = run, run.trainer, group, device
        self.config = run.plain
        self.learning_rate(self.settings.max_steps - 1)  # a schedule with impossible options ends here
        self.loss = AdapterLoss(run.model.dropout, run.model.min_snr)
        self.sources = [open_pictures(source.spec()) for source in run.data.sources]
        self.meter = Meter(run.data.batch_size * self.settings.gradient_accumulation_steps)
        self.features: PictureFeatures
        self.batches: StepBatches

    # ------------------------------------------------------------------------------------------------- the training

    def prepare(self) -> None:
        """Write the configuration into the output folder; build data, models and optimiser."""
        run, model = self.run, self.run.model
        if self.group.first:
            save_config(run.output_dir, run.plain)
        check_shared(run.output_dir / "config.yaml", self.group)
        self.schedule = load_schedule(model.sdxl)
        self._prepare_data()
        self._prepare_features()
        self.module = build_adapter(model).to(self.device)
        if self.module.latent_channels != self.latent_channels:
            raise ConfigError(f"model: the adapter draws latents of {self.module.latent_channels} channels, but the "
                              f"autoencoder of {model.sdxl} makes {self.latent_channels}.")
        read, made = self.module.resampler.sizes.embedding_dim, self.empty.shape[-1]
        if read != made:
            raise ConfigError(f"model: the resampler reads embeddings of width {read}, but the tower makes {made} "
                              "(resampler.embedding_dim).")
        self.optimizer = build_optimizer(self.module, run.optim)

    def _prepare_data(self) -> None:
        data = self.run.data
        parts: list[SourceDataset] = [
            DrawnPairs(source, data.view, reads_condition=self.run.model.stage == 2, seed=data.seed,
                       max_bad_in_a_row=data.max_bad_in_a_row, log=self._log) for source in self.sources]
        self.account = parts[0] if len(parts) == 1 else JoinedPairs(parts)
        self.batches = StepBatches(self.account, data.batch_size, seed=data.seed, rank=self.group.rank,
                                   world=self.group.world, workers=self.settings.dataloader_num_workers,
                                   order=self._order(parts))

    def _prepare_features(self) -> None:
        model, data = self.run.model, self.run.data
        vae = load_autoencoder(model.sdxl)
        self.scaling, self.latent_channels = float(vae.config.scaling_factor), int(vae.config.latent_channels)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if data.resolution % factor:
            raise ConfigError(f"data: resolution {data.resolution} is no multiple of {factor}, pixels of a latent.")
        tower = QwenVit.from_pretrained(model.tower, config=model.tower_sizes, device=self.device,
                                        dtype=DTYPES[self.settings.precision])
        size = tower.config.image_size
        if size != data.tower_size:
            raise ConfigError(f"data: tower_size is {data.tower_size}, but the tower {model.tower} sees {size} pixels "
                              "a side.")
        self.features = PictureFeatures(tower, vae, model.tokens, self.device, data.cache or None,
                                        at_once=max(1, SMALL**2 // data.resolution**2))
        self.empty = self.features.empty(size)
        if data.cache:
            about = {key: value for key, value in self.run.plain["data"].items() if key not in ("cache", "batch_size")}
            keep_features(self.features, self.batches, self._samples(self.group.world) * self.settings.max_steps,
                          self.group, folder=self.run.output_dir, batch_size=data.batch_size, about=about,
                          workers=self.settings.dataloader_num_workers, log=self._log)

    def _order(self, parts: list[SourceDataset]) -> MixedOrder | None:
        if len(parts) == 1:
            return None
        data = self.run.data
        return MixedOrder([len(part) for part in parts], [source.weight for source in data.sources], data.seed,
                          sizes=[part.shard_sizes for part in parts], block=min(map(block_of, parts)))

    def prepared(self, run: Any) -> None:
        """Log what is trained."""
        trained = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.module.parameters())
        world, pictures = self.group.world, sum(map(len, self.sources))
        self._log(f"stage {self.run.model.stage}: {trained:,} of {total:,} parameters are trained in "
                  f"{self.settings.precision}, {world} process{'es' if world > 1 else ''} on {self.device.type}; "
                  f"{pictures:,} pictures of {len(self.sources)} source{'s' if len(self.sources) > 1 else ''}, "
                  f"{self._samples(world)} a step; output in {self.run.output_dir}.")
        held = held_memory(self.module, world=world, deepspeed=self.run.deepspeed, precision=self.settings.precision,
                           ema=self.settings.ema > 0, tower=self.features.tower.held,
                           autoencoder=self.features.moments.held)
        kept = "; tower and autoencoder are not held, their features are kept" if self.run.data.cache else ""
        self._log(f"a process holds {held}{kept}; activations come on top.")

    def deepspeed_config(self, world: int) -> Mapping[str, Any] | None:
        """The configuration's DeepSpeed block, filled."""
        if self.run.deepspeed is None:
            return None
        config, remarks = fill_config(self.run.deepspeed, self.settings.loop_settings(), world=world,
                                      rows=self.run.data.batch_size,
                                      hidden_size=self.module.resampler.sizes.embedding_dim)
        for remark in filter(None, [*remarks, use_offload_threads(config)]):
            self._log(remark)
        return config

    def learning_rate(self, step: int) -> float:
        """By `OptimSettings`."""
        return schedule(step, self.run.optim, self.settings.max_steps, self.settings.gradient_accumulation_steps)

    def micro_step(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """The adapter's loss on a batch; what is random follows from the batch's place in the order, so that a step's
        numbers do not depend on how many processes share it. On CPUs attention by plain matrix products, as
        `StageTask`."""
        place = micro_step * self.group.world + self.group.rank
        generator = torch.Generator().manual_seed(sample_seed(self.settings.seed, 0, place))
        kernel = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()
        with kernel:
            batch = self.batches.at(micro_step)
            seen = self.features(batch)
            latents = drawn_latents(seen["moments"], self.scaling, generator)
            made = self.loss(model, self.schedule, latents, seen["embeds"], copy_to(self.device, batch["time_ids"]),
                             empty_features=self.empty, condition_latents=seen.get("condition"), generator=generator)
        return made["total_loss"], {"mse": made["mse"]}

    def status(self) -> Mapping[str, float]:
        """Seconds spent waiting for data, and bad samples."""
        return {"wait_seconds": self.batches.wait_seconds, "bad_samples": len(self.batches.bad_samples())}

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        """Write the adapter, for `SDXLAdapter.from_pretrained`."""
        folder, module = self.run.output_dir / ADAPTER, self.module
        if self.run.deepspeed is not None:  # its weights are in half precision; what is trained is kept in fp32, spread
            trained = full_weights(module)
            module = build_adapter(self.run.model) if group.first else module
            if group.first:
                module.load_state_dict(trained, strict=False)
        if group.first:
            with writing(folder):
                module.save_pretrained(folder)
        return {"stage": self.run.model.stage, "processes": group.world, "samples_per_step": self._samples(group.world),
                "bad_samples": len(self.batches.bad_samples()), "adapter": str(folder),
                **{key: round(value, 6) for key, value in self.meter.smooth.items()}}

    # ---------------------------------------------------------------------------------------------- the checkpoints

    def identity(self, world: int) -> dict[str, Any]:
        """Stage, what is trained, and samples of a step over all processes, from which their order follows."""
        model = self.run.model
        return {"model": {"stage": model.stage, "trained": model.trained, "resampler": asdict(model.resampler),
                          "start": model.start}, "optimizer": self.run.optim.name, "processes": world,
                "engine": "plain" if self.run.deepspeed is None else "deepspeed", "zero_stage": self._zero_stage(),
                "max_steps": self.settings.max_steps, "samples_per_step": self._samples(world)}

    def check_resume(self, folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        """Refuse another model or optimiser, and another number of samples per step."""
        refuse_other_kind(folder, saved, now, {"model": "model", "optimizer": "optimiser", "engine": "engine",
                                               "zero_stage": "ZeRO stage"}, self.start_hint)
        if self.run.deepspeed is not None:
            refuse_other_numbers(folder, saved, now, {"processes": "processes"}, self.start_hint)
        refuse_other_numbers(folder, saved, now, {"samples_per_step": "samples per step"}, self.start_hint)
        return other_numbers(saved, now, {"processes": "processes",
                                          "max_steps": "steps in all (the schedule follows)"})

    def state_dict(self, step: int) -> dict[str, Any]:
        """The bad samples that this process found."""
        return self.account.state_dict()

    def load_state_dict(self, states: list[dict[str, Any]], rank: int) -> None:
        """Inverse of `state_dict`."""
        for state in states[rank::self.group.world]:  # there may have been more processes, or fewer
            self.account.load_state_dict(state)

    def save_files(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """As the base's, with the resampler's sizes: a checkpoint that holds frozen weights is an adapter, too."""
        super().save_files(folder, weights)
        replace_text(folder / SIZES, json.dumps(asdict(self.module.resampler.sizes), indent=1) + "\n")

    def _zero_stage(self) -> int:
        return int(((self.run.deepspeed or {}).get("zero_optimization") or {}).get("stage", 0))

    def _samples(self, world: int) -> int:
        return self.run.data.batch_size * self.settings.gradient_accumulation_steps * world

    def _log(self, text: str) -> None:
        if self.group.first:
            print(f"[{self.name}] {text}", flush=True)


def build_adapter(settings: DetokenizerModel) -> SDXLAdapter:
    """What training begins with, on the CPU, with what is trained switched on.

    Raises:
        CheckpointError: weights that are not there. ConfigError: a first stage that begins with a second one.
    """
    sdxl = find_folder(settings.sdxl, ("unet/*",), SDXL_WHERE)
    adapter = SDXLAdapter.from_pretrained(settings.start, sdxl).train() if settings.start else adapter_from_sdxl(
        sdxl, settings.resampler, seed=settings.seed)
    if settings.stage == 2:
        adapter.add_condition_channels()
    elif adapter.reads_condition:
        raise ConfigError(f"model: {settings.start} is of the second stage; train it with stage=2.")
    adapter.set_trainable(settings.trained)
    if settings.gradient_checkpointing:
        adapter.unet.enable_gradient_checkpointing(checkpointed)
    return adapter


def train_detokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train by a resolved configuration; under torchrun every process calls it.

    Returns:
        The run's record, also `output_dir/summary.json`; the adapter lies in `output_dir/adapter`.

    Raises:
        SeedError: settings, data, weights or a machine with which the run cannot continue; checkpoints stay intact.
        SystemExit: 143 after SIGTERM; the step was finished and saved.
    """
    run = read_detokenizer_run(config)
    quiet_libraries(libraries=("transformers", "diffusers", "DeepSpeed", "accelerate"))
    with translate_errors("the start", "nothing was trained yet"):
        group, device = start_processes(run.trainer.device, run.trainer.timeout_minutes,
                                        group_of_one=run.deepspeed is not None)
    clean = False
    try:
        with translate_errors("the start", "nothing was trained yet"):
            task = DetokenizerTask(run, group, device)
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: task.batches.close() if hasattr(task, "batches") else None)
            record = train(task, task.settings.loop_settings(), run.output_dir, group=group, device=device)
        clean = True
        return record
    except SystemExit:
        clean = True
        raise
    finally:
        leave_processes(clean)
