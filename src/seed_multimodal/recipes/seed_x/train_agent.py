"""SEED-X's instruction tuning as a trainer task: the language model's task with image features.

The frozen vision encoder runs on the device; `TrainedAgent` computes both losses. Trained are the
language model (LoRA, embeddings and norms, or all weights), both resamplers and the position
vectors of views; they are a checkpoint's `model.safetensors`, with the original names, for
`load_agent`. In log lines `text_loss` is the token loss, `image_loss` the feature regression loss
and `loss` their weighted sum: means of padded micro-batches, as in the original; with packing,
tokens and target images of a step have equal weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from seed_multimodal.config import from_compat, project_path
from seed_multimodal.data.decoders.features import INPUT_IMAGE, TARGET_IMAGE
from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.device import DTYPES, copy_to, seeded
from seed_multimodal.disk import JsonObject, read_json_object, replace_json
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.models.seed_x.modeling import AgentSettings, load_agent
from seed_multimodal.models.seed_x.processing import seed_x_vocabulary
from seed_multimodal.nn.frozen import FrozenFeatures
from seed_multimodal.nn.vision.qwen import (
    INPUT_RESAMPLER,
    OUTPUT_RESAMPLER,
    QwenVit,
    QwenVitConfig,
    Resampler,
    ResamplerConfig,
)
from seed_multimodal.pipelines.config import write_checkpoint_system
from seed_multimodal.recipes.seed_x.data import SeedXOptions
from seed_multimodal.recipes.seed_x.losses import TrainedAgent, loss_parts
from seed_multimodal.settings import non_negative, positive, read_settings
from seed_multimodal.state_dicts import copy_weights, load_state_dict, save_state_dict
from seed_multimodal.training.config import ConfigNode
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.llm.lora import (
    RECORDED_FIELDS,
    adapter_settings,
    check_same_scale,
    is_lora,
)
from seed_multimodal.training.llm.loss import (
    LossParts,
    find_llama,
    joins_rows,
    use_attention,
)
from seed_multimodal.training.llm.task import LlmRunSettings, LlmTask
from seed_multimodal.training.optimizers import trained_parameters
from seed_multimodal.training.task import WEIGHTS, Identity
from seed_multimodal.weights.catalogue import AGENT_CONFIG

LORA_FIELDS = (*RECORDED_FIELDS, "modules_to_save")
_RESAMPLERS = ("input_resampler", "output_resampler")


@dataclass
class AgentModel:
    """The resamplers and the losses.

    Attributes:
        path: weights to start from, as for `load_agent` (may include a language model or LoRA);
            None: new ones, by `seed`. Sizes stored with them (`agent.json`) override the
            resamplers' settings.
        losses: weights of the two losses and the like.
    """

    path: str | None = None
    input_resampler: ResamplerConfig = field(default=INPUT_RESAMPLER)
    output_resampler: ResamplerConfig = field(default=OUTPUT_RESAMPLER)
    losses: AgentSettings = field(default_factory=AgentSettings)
    seed: int = non_negative(0)


@dataclass
class EncoderModel:
    """The frozen vision encoder.

    Attributes:
        path: its weights, as `QwenVit.from_pretrained`.
        sizes: where none are stored with the weights; None: the original ones.
        at_once: views per forward pass.
    """

    path: str
    sizes: QwenVitConfig | None = None
    at_once: int = positive(16)


# ---- settings


def read_agent(config: ConfigNode, label: str = "agent") -> AgentModel:
    """Settings from a mapping: ours, or the original's with its `_target_`. Raises ConfigError."""
    values = {str(key): value for key, value in config.items()}
    if "_target_" in values:
        values = from_compat("part_files:agent_keys")(values, label)
    agent = read_settings(AgentModel, values, label)

    # Sizes that are stored with the weights.
    file = _agent_json(agent)
    stored = read_json_object(file) if file is not None else {}
    for name in _RESAMPLERS:
        if stored.get(name):
            sizes = read_settings(ResamplerConfig, stored[name], f"{file}: {name}")
            setattr(agent, name, sizes)
    return agent


def read_encoder(config: ConfigNode, label: str = "visual_encoder") -> EncoderModel:
    """Settings from a mapping: ours, or the original's with its `_target_`. Raises ConfigError."""
    values = {str(key): value for key, value in config.items()}
    if "_target_" in values:
        values = from_compat("part_files:encoder_keys")(values, label)
    if not values.get("path"):
        raise ConfigError(
            f"{label}: path (in the original's files pretrained_model_path) is required: the "
            "vision encoder's weights."
        )
    return read_settings(EncoderModel, values, label)


# ---- the task


@dataclass(kw_only=True)
class TuningRunSettings(LlmRunSettings):
    """With the frozen vision encoder and the agent."""

    readers = {**LlmRunSettings.readers, "visual_encoder": read_encoder, "agent": read_agent}

    visual_encoder: EncoderModel
    agent: AgentModel


@dataclass
class TuningBatch(LlmBatch):
    """A micro-batch in its step.

    tokens_per_image: learned tokens of the step over its target images, in all processes.
    """

    tokens_per_image: float = 1.0


class TuningTask(LlmTask):
    """One run in one process."""

    run: TuningRunSettings
    module: TrainedAgent
    start_hint = "agent.path"
    run_type = TuningRunSettings

    def __init__(self, run: TuningRunSettings, group: ProcessGroup, device: torch.device) -> None:
        """Open data and tokenizer.

        Raises:
            ConfigError: a tokenizer of another system. Others as `RunTask.train`.
        """
        if (run.trainer.text_weight, run.trainer.image_weight) != (1.0, 1.0):
            raise ConfigError(
                "trainer: SEED-X's losses are weighted by agent.losses.lm_loss_scale and "
                "rec_loss_scale."
            )
        if run.model.freeze_embeddings:
            raise ConfigError(
                "model: freeze_embeddings is not supported for SEED-X, whose checkpoints hold "
                "trained weights only."
            )
        super().__init__(run, group, device)
        seed_x_vocabulary(self.tokenizer)

    # ---- training

    def make_module(self) -> nn.Module:
        """The agent around the language model; also loads the vision encoder."""
        # 1. The frozen vision encoder.
        settings = self.run.visual_encoder
        dtype = DTYPES[self.settings.precision]
        encoder = QwenVit.from_pretrained(
            project_path(settings.path),
            config=settings.sizes,
            device=self.device,
            dtype=dtype,
            log=self._log,
        )

        def features(pixels: Tensor) -> Tensor:
            return encoder(encoder.preprocessing.normalise(pixels).to(dtype)).to(dtype)

        self.encoder = FrozenFeatures(encoder, self.device, features, settings.at_once)
        self.frozen_models = {"vision encoder": self.encoder.fingerprint}
        self.check_views(encoder.config.image_size, SeedXOptions.base_resolution)

        # 2. The resamplers: features → language model, and back.
        agent = self.run.agent
        feature_dim = encoder.config.output_dim
        inputs = agent.input_resampler
        outputs = agent.output_resampler
        for name, width, needed in (
            ("input_resampler.kv_dim", inputs.kv_dim or inputs.embed_dim, feature_dim),
            ("input_resampler.embed_dim", inputs.embed_dim, self.width),
            ("output_resampler.kv_dim", outputs.kv_dim or outputs.embed_dim, self.width),
            ("output_resampler.embed_dim", outputs.embed_dim, feature_dim),
        ):
            if width != needed:
                raise ConfigError(
                    f"agent: {name} is {width}, but must be {needed}: the language model is "
                    f"{self.width} wide, the vision encoder's features {feature_dim}."
                )
        module = build_agent(self.llm, agent)
        # ZeRO-3 moves each parameter's shard.
        return module if self.zero_stage == 3 else module.to(self.device)

    def batches(self, step: int) -> Sequence[TuningBatch]:
        """As the base's, with the ratio of all processes' tokens and images."""
        batches = super().batches(step)
        counts = [sum(map(self.weight, batches)), sum(map(_n_targets, batches))]
        n_tokens, n_images = self.group.sum(counts)
        ratio = n_tokens / max(n_images, 1.0)
        return [TuningBatch(**vars(batch), tokens_per_image=ratio) for batch in batches]

    def loss_parts(self, model: nn.Module, batch: LlmBatch) -> LossParts:
        tokens_per_image = batch.tokens_per_image if isinstance(batch, TuningBatch) else 1.0
        return loss_parts(
            model(**self.inputs(batch)),
            self.run.agent.losses,
            n_tokens=batch.learned,
            n_images=_n_targets(batch),
            tokens_per_image=tokens_per_image if self.equal_token_weights else None,
        )

    def inputs(self, batch: LlmBatch) -> dict[str, Tensor | None]:
        """Arguments of `TrainedAgent.forward` for a batch, on the device.

        Padding is on the right, so causal attention masks it; packed rows are separated by position
        ids.
        """
        # 1. Features of the images, and where they are in the batch.
        views = batch.views
        batch = batch.to(self.device)
        images: dict[str, Tensor | None] = dict.fromkeys(
            ("image_embeds", "embeds_cmp_mask", "embeds_gen_mask", "patch_positions")
        )
        marks = torch.zeros_like(batch.input_ids)
        if views is not None:
            is_target = copy_to(self.device, views.is_target)
            images = {
                "image_embeds": self.encoder(views.pixels),
                "embeds_cmp_mask": ~is_target,
                "embeds_gen_mask": is_target,
                "patch_positions": copy_to(self.device, views.positions),
            }
            marks = copy_to(self.device, views.marks)

        # 2. The rows.
        is_packed = batch.attention_mask is None
        rows = {
            "input_ids": batch.input_ids,
            "labels": batch.labels,
            "ids_cmp_mask": marks == INPUT_IMAGE,
            "ids_gen_mask": marks == TARGET_IMAGE,
            "position_ids": batch.position_ids if is_packed else None,
        }
        llama = find_llama(self.llm)
        use_attention(llama, is_packed)
        if is_packed and joins_rows(llama.config):
            rows = {name: value.reshape(1, -1) for name, value in rows.items()}
        return {**rows, **images, "attention_mask": None}

    def evaluation_line(self, sums: LossParts) -> dict[str, float]:
        """As `LlmTask`, with both means weighted as in training."""
        line = super().evaluation_line(sums)
        if not line:
            return {}
        scales = self.run.agent.losses
        text_loss = scales.lm_loss_scale * sums.text_mean
        image_loss = scales.rec_loss_scale * sums.image_mean
        return {**line, "eval_loss": float(text_loss + image_loss)}

    # ---- checkpoints

    def identity(self, world: int) -> Identity:
        """As `LlmTask`, with the resamplers' sizes."""
        identity = super().identity(world)
        for name in _RESAMPLERS:
            identity.fixed["model"][name] = asdict(getattr(self.run.agent, name))
        return identity

    def prepare(self) -> None:
        super().prepare()
        self.saves_frozen = False  # checkpoints hold the trained weights

    def published(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trained weights, with original names."""
        trained = trained_parameters(self.module)
        return {name: weights[name].detach() for name in trained if name in weights}

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the trained weights, the model's settings, and the tokenizer's files."""
        save_state_dict(weights, folder / WEIGHTS)

        # The settings; a language model that is trained as a whole is described, too.
        lora: JsonObject | None = None
        llm_config: JsonObject | None = None
        if is_lora(self.llm):
            adapter = adapter_settings(self.llm)
            lora = {key: adapter[key] for key in LORA_FIELDS if adapter.get(key) is not None}
        else:
            llm_config = find_llama(self.llm).config.to_diff_dict()
        agent_config = {
            **asdict(self.run.agent),
            "base": self.run.model.path,
            "lora": lora,
            "train_embeddings": self.run.model.train_embeddings,
            "llm": llm_config,
        }
        replace_json(folder / AGENT_CONFIG, agent_config)
        self.tokenizer.save_pretrained(folder)
        self.record_base(folder)

    def record_base(self, folder: Path) -> None:
        write_checkpoint_system(
            folder,
            "seed_x",
            llm=self.base_folder,
            vision=project_path(self.run.visual_encoder.path),
        )

    def load(self, folder: Path) -> None:
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder}: holds no {WEIGHTS}.")
        state = load_state_dict(folder / WEIGHTS)
        copy_weights(trained_parameters(self.module), state, str(folder))


def build_agent(llm: nn.Module, settings: AgentModel) -> TrainedAgent:
    """New resamplers around a language model, or those of `settings.path`.

    Raises:
        CheckpointError: as `load_agent`, or another LoRA scale.
    """
    with seeded(settings.seed):
        agent = TrainedAgent(
            llm,
            Resampler(settings.input_resampler),
            Resampler(settings.output_resampler),
            settings.losses,
        )
    if settings.path is None:
        return agent

    # Load them; another scale of the LoRA would not be visible in tensor sizes.
    file = _agent_json(settings)
    if file is not None and is_lora(llm):
        recorded = read_json_object(file).get("lora")
        if isinstance(recorded, Mapping):
            check_same_scale(llm, recorded, file)
    load_agent(agent, project_path(settings.path))
    return agent


def _agent_json(settings: AgentModel) -> Path | None:
    """`agent.json` of the initial weights, if it exists."""
    if settings.path is None:
        return None
    path = project_path(settings.path)
    folder = path if path.is_dir() else path.parent
    file = folder / AGENT_CONFIG
    return file if file.is_file() else None


def _n_targets(batch: LlmBatch) -> int:
    """Target images of a batch."""
    return 0 if batch.views is None else int(batch.views.is_target.sum())
