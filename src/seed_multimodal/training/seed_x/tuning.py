"""SEED-X's instruction tuning as a trainer task: the language model's task, with input and target image features.

The frozen vision encoder runs on the device; `ContinuousLVLM` computes both losses. Trained are the language model
(LoRA, embeddings and norms, or all weights), both resamplers and the position vectors of views; they are a checkpoint's
`model.safetensors`, with the original names, for `load_agent`. In log lines `text_loss` is the token loss, `image_loss`
the feature regression loss and `loss` their weighted sum: means of padded micro-batches, as in the original; with
packing, tokens and target images of a step have equal weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.data.decoders.seed_x import SeedXOptions
from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.data.stream.views import INPUT_IMAGE, TARGET_IMAGE
from seed_multimodal.device import DTYPES, copy_to
from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import AGENT_CONFIG
from seed_multimodal.images.transforms import normalise
from seed_multimodal.seed_x.modeling import AgentSettings, ContinuousLVLM, load_agent
from seed_multimodal.seed_x.processing import seed_x_vocabulary
from seed_multimodal.seed_x.vision import (
    INPUT_RESAMPLER,
    OUTPUT_RESAMPLER,
    QwenVit,
    QwenVitConfig,
    Resampler,
    ResamplerConfig,
)
from seed_multimodal.settings import read_settings, setting
from seed_multimodal.system.config import record_base
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.frozen_models import FrozenFeatures
from seed_multimodal.training.llm.config import check_target, project_path
from seed_multimodal.training.llm.lora import (
    RECORDED,
    adapter_settings,
    check_same_scale,
    copy_weights,
    is_lora,
)
from seed_multimodal.training.llm.loss import LossParts, find_llama, use_attention
from seed_multimodal.training.llm.task import LlmTask
from seed_multimodal.training.run import RunSettings
from seed_multimodal.training.task import WEIGHTS
from seed_multimodal.weights import load_state_dict, save_state_dict

LORA_FIELDS = (*RECORDED, "modules_to_save")
AGENT_TARGETS = (
    "src.models.mllm.seed_x.ContinuousLVLM.from_pretrained",
    "src.models.mllm.seed_x.ContinuousLVLM",
)
ENCODER_TARGETS = (
    "src.models.tokenizer.qwen_visual.VisionTransformerWithAttnPool.from_pretrained",
)
_RESAMPLERS = ("input_resampler", "output_resampler")
_PATH = "pretrained_model_path"


@dataclass
class AgentModel:
    """The resamplers and the losses.

    Attributes:
        path: weights to start from, as for `load_agent` (may include a language model or LoRA); None: new ones, by
            `seed`. Sizes stored with them (`agent.json`) override the resamplers' settings.
        losses: weights of the two losses and the like.
    """

    path: str | None = None
    input_resampler: ResamplerConfig = field(default=INPUT_RESAMPLER)
    output_resampler: ResamplerConfig = field(default=OUTPUT_RESAMPLER)
    losses: AgentSettings = field(default_factory=AgentSettings)
    seed: int = setting(0, minimum=0)


@dataclass
class EncoderModel:
    """The frozen vision encoder: weights, as `QwenVit.from_pretrained`; `at_once`: views per forward pass; `sizes`:
    None: those stored with the weights, or the original ones."""

    path: str
    sizes: QwenVitConfig | None = None
    at_once: int = setting(16, minimum=1)


def read_agent(config: Mapping[str, Any], where: str = "agent") -> AgentModel:
    """Settings from a mapping: ours, or the original's with its `_target_`. Raises ConfigError."""
    given = {str(key): value for key, value in config.items()}
    if "_target_" in given:
        check_target(given, AGENT_TARGETS, where)
        del given["_target_"]
        losses = {
            one.name: given.pop(one.name) for one in fields(AgentSettings) if one.name in given
        }
        path = given.pop(_PATH, None)
        parts = {
            name: {key: value for key, value in given[name].items() if not key.startswith("_")}
            for name in _RESAMPLERS
            if isinstance(given.get(name), Mapping)
        }
        given |= {
            **parts,
            **({"path": path} if path else {}),
            "losses": losses | (given.get("losses") or {}),
        }
    made = read_settings(AgentModel, given, where)
    file = _agent_json(made)
    recorded = read_json_object(file) if file is not None else {}
    for name in _RESAMPLERS:
        if recorded.get(name):
            setattr(made, name, read_settings(ResamplerConfig, recorded[name], f"{file}: {name}"))
    return made


def read_encoder(config: Mapping[str, Any], where: str = "visual_encoder") -> EncoderModel:
    """Settings from a mapping: ours, or the original's with its `_target_`, where unused keys are ignored (the original
    file has one with a stray quotation mark). Raises ConfigError."""
    given = {str(key): value for key, value in config.items()}
    if "_target_" in given:
        check_target(given, ENCODER_TARGETS, where)
        sizes = {one.name: given[one.name] for one in fields(QwenVitConfig) if one.name in given}
        given = {
            "path": given.get(_PATH),
            "sizes": sizes,
            **{key: value for key, value in given.items() if key == "at_once"},
        }
    if not given.get("path"):
        raise ConfigError(
            f"{where}: path (in the original's files {_PATH}) is required: the vision encoder's weights."
        )
    return read_settings(EncoderModel, given, where)


class TuningTask(LlmTask):
    """One run in one process."""

    module: ContinuousLVLM
    start_hint = "agent.path"
    group_types = {**LlmTask.group_types, "visual_encoder": EncoderModel, "agent": AgentModel}
    group_readers = {**LlmTask.group_readers, "visual_encoder": read_encoder, "agent": read_agent}
    words_per_image = (
        1.0  # ratio of learned tokens to target images of this step, over all processes
    )

    def __init__(self, run: RunSettings, group: ProcessGroup, device: torch.device) -> None:
        """Open data and tokenizer. Raises as `RunTask.train`; ConfigError: a tokenizer of another system."""
        if (run.trainer.text_weight, run.trainer.image_weight) != (1.0, 1.0):
            raise ConfigError(
                "trainer: SEED-X's losses are weighted by agent.losses.lm_loss_scale and rec_loss_scale."
            )
        if run.model.freeze_embeddings:
            raise ConfigError(
                "model: freeze_embeddings is not supported for SEED-X, whose checkpoints hold trained "
                "weights only."
            )
        super().__init__(run, group, device)
        seed_x_vocabulary(self.tokenizer)

    # ------------------------------------------------------------------------------------------------- training

    def make_module(self) -> nn.Module:
        """The agent around the language model; also loads the vision encoder."""
        settings, dtype = self.run.visual_encoder, DTYPES[self.settings.precision]
        encoder = QwenVit.from_pretrained(
            project_path(settings.path),
            config=settings.sizes,
            device=self.device,
            dtype=dtype,
            log=self._log,
        )
        self.encoder = FrozenFeatures(
            encoder,
            self.device,
            lambda pixels: encoder(normalise(pixels).to(dtype)).to(dtype),
            settings.at_once,
        )
        self.check_views(encoder.config.image_size, SeedXOptions.base_resolution)
        agent, seen = self.run.agent, encoder.config.output_dim
        read, written = agent.input_resampler, agent.output_resampler
        for name, found, needed in (
            ("input_resampler.kv_dim", read.kv_dim or read.embed_dim, seen),
            ("input_resampler.embed_dim", read.embed_dim, self.width),
            ("output_resampler.kv_dim", written.kv_dim or written.embed_dim, self.width),
            ("output_resampler.embed_dim", written.embed_dim, seen),
        ):
            if found != needed:
                raise ConfigError(
                    f"agent: {name} is {found}, but must be {needed}: the language model is {self.width} "
                    f"wide, the vision encoder's features {seen}."
                )
        module = build_agent(self.llm, agent)
        return (
            module if self.zero_stage == 3 else module.to(self.device)
        )  # ZeRO-3 moves each parameter's shard

    def begin_step(self, step: int) -> bool:
        """Load the step's micro-batches and count their learned tokens and target images."""
        more = super().begin_step(step)
        (images,) = self.group.sum([float(sum(map(_written, self.batches)))])
        self.words_per_image = self.meter.divisor / max(images, 1.0)
        return more

    def loss_parts(self, model: nn.Module, batch: LlmBatch) -> LossParts:
        found = model(**self.inputs(batch))
        words, images, scales = found["lm_loss"], found["rec_loss"], self.run.agent.losses
        learned, written = (
            words.new_tensor(float(count), dtype=torch.float32)
            for count in (batch.learned, _written(batch))
        )
        shares = (learned, written * self.words_per_image) if self.averages_tokens else (1.0, 1.0)
        total = (
            scales.lm_loss_scale * shares[0] * words + scales.rec_loss_scale * shares[1] * images
        )
        return LossParts(
            total,
            learned if self.averages_tokens else torch.ones_like(learned),
            words.detach() * learned,
            learned,
            images.detach() * written,
            written,
        )

    def inputs(self, batch: LlmBatch) -> dict[str, Any]:
        """Arguments of `ContinuousLVLM.forward` for a batch, on the device. Padding is on the right, so causal
        attention masks it; packed rows are separated by position ids."""
        views, packed = batch.views, batch.attention_mask is None
        features = None if views is None else self.encoder(views.pixels)
        batch = replace(batch, views=None).to(self.device)
        marks = (
            torch.zeros_like(batch.input_ids)
            if views is None
            else copy_to(self.device, views.marks)
        )
        found = {
            "input_ids": batch.input_ids,
            "labels": batch.labels,
            "ids_cmp_mask": marks == INPUT_IMAGE,
            "ids_gen_mask": marks == TARGET_IMAGE,
            "position_ids": batch.position_ids if packed else None,
        }
        llama = find_llama(self.llm)
        use_attention(llama, packed)
        if packed and "flash" in str(
            llama.config._attn_implementation
        ):  # needs packing in a single row
            found = {name: value.reshape(1, -1) for name, value in found.items()}
        read = None if views is None else copy_to(self.device, ~views.is_target)
        return {
            **found,
            "attention_mask": None,
            "image_embeds": features,
            "embeds_cmp_mask": read,
            "embeds_gen_mask": None if read is None else ~read,
            "patch_positions": None if views is None else copy_to(self.device, views.positions),
        }

    def evaluation_line(
        self,
        total: float,
        count: float,
        text: float,
        text_count: float,
        image: float,
        image_count: float,
    ) -> dict[str, float]:
        """As `LlmTask`, with both means weighted as in training."""
        found = super().evaluation_line(total, count, text, text_count, image, image_count)
        scales = self.run.agent.losses
        mean = scales.lm_loss_scale * text / max(
            text_count, 1
        ) + scales.rec_loss_scale * image / max(image_count, 1)
        return {**found, "eval_loss": mean} if found else {}

    # ---------------------------------------------------------------------------------------------- checkpoints

    def frozen_models(self) -> dict[str, list[float]]:
        """The vision encoder."""
        return {"vision encoder": self.encoder.fingerprint}

    def identity(self, world: int) -> dict[str, Any]:
        """As `LlmTask`, with the resamplers' sizes."""
        found = super().identity(world)
        sizes = {name: asdict(getattr(self.run.agent, name)) for name in _RESAMPLERS}
        return {**found, "model": {**found["model"], **sizes}}

    @property
    def saves_frozen(self) -> bool:
        """Checkpoints hold the trained weights."""
        return False

    def weights(self, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The trained weights, with original names."""
        return {
            name: value.detach()
            for name, value in (self._trained() if gathered is None else gathered).items()
        }

    def save_files(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the trained weights, the model's settings, and the tokenizer's files."""
        save_state_dict(weights, folder / WEIGHTS)
        lora = (
            None
            if not is_lora(self.llm)
            else {
                key: value
                for key, value in adapter_settings(self.llm).items()
                if key in LORA_FIELDS and value is not None
            }
        )
        about = {
            **asdict(self.run.agent),
            "base": self.run.model.path,
            "lora": lora,
            "train_embeddings": self.run.model.train_embeddings,
            "llm": None if lora else find_llama(self.llm).config.to_diff_dict(),
        }
        replace_text(folder / AGENT_CONFIG, json.dumps(about, indent=1))
        self.tokenizer.save_pretrained(folder)
        self.record_base(folder)

    def record_base(self, folder: Path) -> None:
        record_base(
            folder,
            "seed_x",
            llm=self.base_folder,
            vision=project_path(self.run.visual_encoder.path),
        )

    def load_weights(self, folder: Path, allow_missing: Sequence[str] = ()) -> None:
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder}: holds no {WEIGHTS}.")
        copy_weights(self._trained(), load_state_dict(folder / WEIGHTS), str(folder))

    def _trained(self) -> dict[str, Tensor]:
        return {
            name: value for name, value in self.module.named_parameters() if value.requires_grad
        }


def build_agent(llm: Any, settings: AgentModel) -> ContinuousLVLM:
    """New resamplers around a language model, or those of `settings.path`. Raises CheckpointError: as `load_agent`, or
    another LoRA scale."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        agent = ContinuousLVLM(
            llm,
            Resampler(settings.input_resampler),
            Resampler(settings.output_resampler),
            settings.losses,
        )
    if settings.path is not None:
        file = _agent_json(settings)
        recorded = read_json_object(file) if file is not None else {}
        if file is not None and is_lora(llm) and isinstance(recorded.get("lora"), Mapping):
            check_same_scale(llm, recorded["lora"], file)  # not visible in tensor sizes
        load_agent(agent, project_path(settings.path))
    return agent


def _agent_json(settings: AgentModel) -> Path | None:
    """`agent.json` of the initial weights, if it exists."""
    if settings.path is None:
        return None
    place = project_path(settings.path)
    file = (place if place.is_dir() else place.parent) / AGENT_CONFIG
    return file if file.is_file() else None


def _written(batch: LlmBatch) -> int:
    return 0 if batch.views is None else int(batch.views.is_target.sum())
