"""Instruction tuning of SEED-X as a task of the loop: the language model's, with pictures as features on both sides.

The data workers give views as pixels; the frozen tower turns those that are read or written into features on the
device; `ContinuousLVLM` gives both losses. What is trained: the language model (a LoRA, its embeddings and norms, or
all of it), both resamplers and the vectors of a view's place. A checkpoint's `model.safetensors` holds exactly that, by
the released names, and `load_agent` reads it. In log lines `text_loss` is that of words and `image_loss`
the distance of written features; their weighted sum is `loss`.

Padded micro-batches: the mean of the micro-batches' means, as released. Packed ones: each learned word of a step weighs
the same, and each written picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.data.decoders.seed_x import PictureOptions
from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.data.stream.views import READ, WRITTEN
from seed_multimodal.device import copy_to
from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.lora import AGENT_CONFIG
from seed_multimodal.seed_x.modeling import POOLED, ContinuousLVLM, load_agent
from seed_multimodal.seed_x.processing import seed_x_words
from seed_multimodal.seed_x.vision import QwenVit, QwenVitConfig, Resampler
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.llm.config import RunSettings, find_folder
from seed_multimodal.training.llm.lora import RECORDED, adapter_settings, is_lora, refuse_other_scale
from seed_multimodal.training.llm.loss import find_llama, use_attention
from seed_multimodal.training.llm.task import LlmTask, blank_batch, counts, first_batches
from seed_multimodal.training.seed_x.tuning_settings import AgentModel, TowerModel, read_agent, read_tower
from seed_multimodal.training.seed_x.vision_features import VisionFeatures
from seed_multimodal.training.task import WEIGHTS
from seed_multimodal.weights import load_state_dict, save_state_dict

LORA_FIELDS = (*RECORDED, "modules_to_save")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class TuningTask(LlmTask):
    """One run in one process."""

    module: ContinuousLVLM
    start_hint = "agent.path"
    kinds = {**LlmTask.kinds, "visual_encoder": TowerModel, "agent": AgentModel}

    def __init__(self, run: RunSettings, group: ProcessGroup, device: torch.device) -> None:
        """Open data and tokenizer. Raises as `train_llm`; ConfigError for a tokenizer of another system."""
        for name in ("visual_encoder", "agent"):
            if getattr(run, name) is None:
                raise ConfigError(f"configuration: {name} is needed for SEED-X: choose one of its files.")
        for name, kept in (("text_weight", (1.0,)), ("image_weight", (1.0,)), ("loss_kernel", ("auto", "plain"))):
            if getattr(run.trainer, name) not in kept:
                raise ConfigError(f"trainer.{name}: has no effect on SEED-X; leave it out (its losses are weighed by "
                                  "agent.losses.lm_loss_scale and rec_loss_scale).")
        assert run.agent is not None and run.visual_encoder is not None
        self.agent_settings, self.tower_settings = read_agent(run.agent), read_tower(run.visual_encoder)
        super().__init__(run, group, device)
        seed_x_words(self.tokenizer)
        self.tower: VisionFeatures
        self.pictures = 0.0  # written in this step, in all processes

    # ------------------------------------------------------------------------------------------------- the training

    def make_module(self) -> nn.Module:
        """The agent around the language model; opens the tower, too."""
        settings = self.tower_settings
        encoder = QwenVit.from_pretrained(find_folder(settings.path), config=settings.sizes, device=self.device,
                                          dtype=_DTYPES[self.settings.precision], log=self._log)
        self.tower = VisionFeatures(encoder, self.device, settings.at_once)
        sizes: QwenVitConfig = self.tower.model.config
        _check_agent(self.agent_settings, sizes)
        for name, given in (("data", self.run.data), ("eval_data", self.run.eval_data or {})):
            _check_views(name, given, self.agent_settings, sizes.image_size,
                         self.tokenizer.vocabulary.tokens_per_image)
        return build_agent(self.llm, self.agent_settings).to(self.device)

    def begin_step(self, step: int) -> bool:
        """Load the step's micro-batches and count their learned words and written pictures."""
        count = self.settings.gradient_accumulation_steps
        self.batches = first_batches(self.data, count, start=step * count)
        counts = [sum(batch.learned for batch in self.batches), sum(map(_written, self.batches)), len(self.batches)]
        words, self.pictures, left = self.group.sum(list(map(float, counts)))
        world = self.group.world
        self.each = left / world
        self.share = world / max(words, 1.0)
        self.meter.divisor = float(world)
        return left > 0

    def micro_step(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """This micro-batch's share of the loss."""
        place = micro_step % self.settings.gradient_accumulation_steps
        real = self.batches[place] if place < len(self.batches) else None
        batch = real or blank_batch()
        losses = model(**self.inputs(batch))
        words, pictures = losses["lm_loss"], losses["rec_loss"]
        shares = (1.0 / max(self.each, 1e-8),) * 2
        if self.by_tokens:
            shares = (self.share * batch.learned, self.group.world * _written(batch) / max(self.pictures, 1.0))
        scales = self.agent_settings.losses
        value = scales.lm_loss_scale * shares[0] * words + scales.rec_loss_scale * shares[1] * pictures
        return value, {
            "loss": value.detach(), "text_sum": words.detach() * batch.learned, "text_count": batch.learned,
            "image_sum": pictures.detach() * _written(batch), "image_count": _written(batch), **counts(real)}

    def evaluation_sums(self, model: nn.Module, batch: LlmBatch) -> Tensor:
        """See `LlmTask`: the means over learned words and over written pictures; the first two are not used."""
        with self.loop.engine.autocast():
            losses = model(**self.inputs(batch))
        found = []
        for name, count in (("lm_loss", batch.learned), ("rec_loss", _written(batch))):
            found += [losses[name].float() * count, losses[name].new_tensor(float(count), dtype=torch.float32)]
        return torch.stack([torch.zeros_like(found[0])] * 2 + found)

    def evaluation_line(self, total: float, count: float, text: float, text_count: float, image: float,
                        image_count: float) -> dict[str, float]:
        """See `LlmTask`; both losses, weighted as in training."""
        found = super().evaluation_line(total, count, text, text_count, image, image_count)
        scales = self.agent_settings.losses
        mean = scales.lm_loss_scale * text / max(text_count, 1) + scales.rec_loss_scale * image / max(image_count, 1)
        return {**found, "eval_loss": mean} if found else {}

    def inputs(self, batch: LlmBatch) -> dict[str, Any]:
        """A batch as `ContinuousLVLM.forward` takes it, on the device. Padding is on the right, so that causal
        attention hides it; packed rows go by their positions."""
        views, packed = batch.views, batch.attention_mask is None
        features = None if views is None else self.tower(views.pixels)
        batch = replace(batch, views=None).to(self.device)
        marks = torch.zeros_like(batch.input_ids) if views is None else copy_to(self.device, views.marks)
        found = {"input_ids": batch.input_ids, "labels": batch.labels, "ids_cmp_mask": marks == READ,
                 "ids_gen_mask": marks == WRITTEN, "position_ids": batch.position_ids if packed else None}
        llama = find_llama(self.llm)
        use_attention(llama, packed)
        if packed and "flash" in str(llama.config._attn_implementation):  # it knows one row of several sequences
            found = {name: value.reshape(1, -1) for name, value in found.items()}
        read = None if views is None else copy_to(self.device, ~views.written)
        return {**found, "attention_mask": None, "image_embeds": features, "embeds_cmp_mask": read,
                "embeds_gen_mask": None if read is None else ~read,
                "patch_positions": None if views is None else copy_to(self.device, views.positions)}

    # ---------------------------------------------------------------------------------------------- the checkpoints

    def frozen_models(self) -> dict[str, list[float]]:
        """The tower."""
        return {"tower": self.tower.some_weights}

    def identity(self, world: int) -> dict[str, Any]:
        """As the language model's, with the resamplers' sizes."""
        found = super().identity(world)
        sizes = {name: asdict(getattr(self.agent_settings, name)) for name in ("input_resampler", "output_resampler")}
        return {**found, "model": {**found["model"], **sizes}}

    def weights(self, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What is trained, by the released names."""
        return {name: value.detach() for name, value in (self._trained() if gathered is None else gathered).items()}

    def save_files(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """The trained weights, what builds their model, and the tokenizer's files."""
        save_state_dict(weights, folder / WEIGHTS)
        lora = None if not is_lora(self.llm) else {
            key: value for key, value in adapter_settings(self.llm).items() if key in LORA_FIELDS and value is not None}
        about = {**asdict(self.agent_settings), "base": self.model_settings.path, "lora": lora,
                 "train_embeddings": self.model_settings.train_embeddings,
                 "llm": None if lora else find_llama(self.llm).config.to_diff_dict()}
        replace_text(folder / AGENT_CONFIG, json.dumps(about, indent=1))
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def load_weights(self, folder: Path, allow_missing: Sequence[str] = ()) -> None:
        """Inverse of `save_files`."""
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder}: holds no {WEIGHTS}.")
        state, own = load_state_dict(folder / WEIGHTS), self._trained()
        for name in sorted(own.keys() ^ state.keys()):
            raise CheckpointError(f"{folder}: {name!r} is {'missing' if name in own else 'not trained here'}.")
        for name, value in own.items():
            if value.shape != state[name].shape:
                raise CheckpointError(f"{folder}: {name!r} is {tuple(state[name].shape)}, not {tuple(value.shape)}.")
            value.copy_(state[name])

    def _trained(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.module.named_parameters() if value.requires_grad}


def build_agent(llm: Any, settings: AgentModel) -> ContinuousLVLM:
    """New resamplers around a language model, or those of `settings.path`.

    Raises:
        ConfigError: sizes that do not fit each other. CheckpointError: as `load_agent`.
    """
    width, one, other = int(find_llama(llm).config.hidden_size), settings.input_resampler, settings.output_resampler
    for name, given in (("input_resampler.embed_dim", one.embed_dim), ("output_resampler.kv_dim", other.kv_dim)):
        if (given or other.embed_dim) != width:
            raise ConfigError(f"agent: {name} is {given}, but the language model is {width} wide.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        agent = ContinuousLVLM(llm, Resampler(one), Resampler(other), settings.losses)
    if settings.path is not None:
        place = find_folder(settings.path)
        _check_recorded(llm, settings, (place if place.is_dir() else place.parent) / AGENT_CONFIG)
        load_agent(agent, place)
    return agent


def _check_recorded(llm: Any, settings: AgentModel, file: Path) -> None:
    """Refuse what no tensor's size shows: other heads, or another scale of a LoRA, than the weights were made with."""
    recorded = read_json_object(file) if file.is_file() else {}
    for name in ("input_resampler", "output_resampler"):
        there = recorded[name].get("num_heads") if isinstance(recorded.get(name), Mapping) else None
        here = getattr(settings, name).num_heads
        if there not in (None, here):
            raise CheckpointError(f"{file}: {name}.num_heads is {there}, but the agent is set up with {here}.")
    if is_lora(llm) and isinstance(recorded.get("lora"), Mapping):
        refuse_other_scale(llm, recorded["lora"], file)


def _check_agent(agent: AgentModel, tower: QwenVitConfig) -> None:
    """Refuse resamplers that do not fit the tower's features; a batch would say so much later, or none would."""
    one, other = agent.input_resampler, agent.output_resampler
    for name, found in (("input_resampler.kv_dim", one.kv_dim or one.embed_dim),
                        ("output_resampler.embed_dim", other.embed_dim)):
        if found != tower.output_dim:
            raise ConfigError(f"agent: {name} is {found}, but the vision tower's features have {tower.output_dim} "
                              "numbers.")
    written = tower.n_queries // POOLED if agent.losses.vit_down else tower.n_queries
    if other.grid_size**2 != written:
        raise ConfigError(f"agent: output_resampler.grid_size {other.grid_size} gives {other.grid_size**2} features of "
                          f"a picture, but {written} are to be written: the vision tower's {tower.n_queries}, "
                          f"{'each 4 averaged' if agent.losses.vit_down else 'as they are'} (losses.vit_down).")


def _check_views(name: str, given: Mapping[str, Any], agent: AgentModel, side: int, words: int) -> None:
    """Refuse views that are not the tower's size (it would take them, and see worse), and numbers of image words that
    are not the resamplers'."""
    read = agent.input_resampler.grid_size**2
    for source in read_data_settings(given, name).sources if given else []:
        found = source.options.get("base_resolution", PictureOptions.base_resolution)
        if found != side:
            raise ConfigError(f"{name}: base_resolution of the source {source.name} is {found}, but the vision tower "
                              f"reads views of {side} pixels a side.")
        inside, outside = (source.options.get(f"num_img_{way}_tokens") or words for way in ("in", "out"))
        if inside != read:
            raise ConfigError(f"{name}: a view of the source {source.name} takes {inside} image words "
                              f"(num_img_in_tokens), but agent.input_resampler gives {read} embeddings of it "
                              "(grid_size squared).")
        if math.isqrt(outside) ** 2 != outside:
            raise ConfigError(f"{name}: num_img_out_tokens of the source {source.name} is {outside}, which is no "
                              "square grid of image words.")


def _written(batch: LlmBatch) -> int:
    return 0 if batch.views is None else int(batch.views.written.sum())
