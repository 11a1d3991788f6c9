"""LaVIT's stage 2, unified pre-training, as a trainer task: the language model's task with images.

    [image, text]   input: continuous features of the trained token merger and projector; target:
                    the text
    [text, image]   target: the frozen tokenizer's codes, and image end
    text            target: the text

The frozen vision encoder and token selector run on the device; patch selection is determined by
(seed, sample). Codes come from stage 1's frozen token merger, input features from the trained one.
In log lines `text_loss` is that of text, `image_loss` that of codes and image end. A checkpoint is
a `language_model` folder of an original LaVIT. Source: LaVIT (arXiv 2309.04669).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from seed_multimodal.config import project_path
from seed_multimodal.data.decoders.features import FeatureDecoderOptions
from seed_multimodal.data.stream.config import with_option
from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.device import DTYPES, seeded
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.fingerprints import fingerprint
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.models.lavit.checkpoints import VISUAL_WEIGHT_FILES, load_dynamic_tokenizer
from seed_multimodal.models.lavit.modeling import MODES, TokenMerger
from seed_multimodal.models.lavit.processing import load_lavit_tokenizer
from seed_multimodal.nn.frozen import FrozenFeatures
from seed_multimodal.nn.layers import cast_layers, checkpoint_layers
from seed_multimodal.pipelines.config import write_checkpoint_system
from seed_multimodal.recipes.lavit.losses import UnifiedLoss
from seed_multimodal.recipes.lavit.train_rows import ReadyBatch, fill_rows
from seed_multimodal.settings import non_negative, positive, setting
from seed_multimodal.state_dicts import assign_strictly, load_state_dict, save_state_dict
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.llm.loss import LossParts, find_llama
from seed_multimodal.training.llm.task import LlmRunSettings, LlmTask
from seed_multimodal.weights.catalogue import VISUAL_WEIGHTS
from seed_multimodal.weights.find import first_file

PARTS = ("causal_encoder", "vit_proj")  # trained with the language model, original names


@dataclass
class VisualModel:
    """The frozen tokenizer of stage 1, and where token merger and projector start from.

    Attributes:
        path: the tokenizer's folder, an original model's or ours (`models.lavit.checkpoints`).
        start: a `visual_weight` file, or a folder with one; None: stage 1's token merger, and a new
            projector (`seed`).
        selection: `draw` (original: each patch by its probability; here determined by seed and
            sample) or `threshold`.
        at_once: images per forward pass of the frozen networks.
    """

    path: str
    start: str | None = None
    selection: str = setting("draw", choices=MODES)
    at_once: int = positive(16)
    seed: int = non_negative(0)


@dataclass(kw_only=True)
class PretrainRunSettings(LlmRunSettings):
    """With the visual tokenizer."""

    visual_encoder: VisualModel


class PretrainTask(LlmTask):
    """One run in one process. `visual`: the frozen tokenizer, which computes codes."""

    run: PretrainRunSettings
    module: UnifiedLoss
    start_hint = "model.path and visual_encoder.start"
    run_type = PretrainRunSettings

    def __init__(self, run: PretrainRunSettings, group: ProcessGroup, device: torch.device) -> None:
        """Open data and tokenizers.

        Raises:
            ConfigError: mismatched tokenizers. Others as `RunTask.train`.
        """
        # Data workers resize images as the vision encoder's preprocessing says.
        self.visual = load_dynamic_tokenizer(project_path(run.visual_encoder.path))
        preprocessing = self.visual.transform.describe()
        run.data = with_option(run.data, "preprocessing", preprocessing)
        if run.eval_data is not None:
            run.eval_data = with_option(run.eval_data, "preprocessing", preprocessing)
        super().__init__(run, group, device)

        # Codes become tokens, so both must have the same number.
        vocabulary = self.tokenizer.vocabulary
        for name, size, expected in (
            ("codes", self.visual.config.codebook_size, vocabulary.n_codes),
            ("patches an image", self.visual.n_patches, vocabulary.tokens_per_image),
        ):
            if size != expected:
                raise ConfigError(
                    f"visual_encoder: the visual tokenizer has {size} {name}, but tokenizer "
                    f"{run.tokenizer.folder} expects {expected}."
                )
        self.check_views(self.visual.encoder.image_size, FeatureDecoderOptions.base_resolution)

    @staticmethod
    def load_tokenizer(folder: str | Path) -> TextTokenizer:
        return load_lavit_tokenizer(folder)

    # ---- training

    def make_module(self) -> nn.Module:
        """Token merger and projector, in fp32, with the language model.

        Also moves the frozen tokenizer to the device.
        """
        visual = self.visual
        settings = self.run.visual_encoder

        # 1. What is trained, from stage 1 or an earlier stage 2.
        with seeded(settings.seed):
            width = visual.encoder.width
            merger = TokenMerger(visual.config, width)
            llm_width = int(find_llama(self.llm).config.hidden_size)
            projector = nn.Linear(width, llm_width)
        if settings.start is None:
            merger.load_state_dict(visual.causal_encoder.state_dict())
        else:
            parts = {"causal_encoder": merger, "vit_proj": projector}
            load_visual(parts, project_path(settings.start))
        if self.run.model.gradient_checkpointing:
            checkpoint_layers(merger)

        # 2. The frozen tokenizer.
        visual.vit_proj = None
        cast_layers(visual, DTYPES[self.settings.precision])
        visual.to(self.device)

        def features(pixels: Tensor) -> Tensor:
            return visual.patch_features(visual.transform.normalise(pixels))

        self.frozen_models = {"visual tokenizer": fingerprint(visual)}
        self.features = FrozenFeatures(visual.encoder, self.device, features, settings.at_once)
        merger = merger.to(self.device)
        projector = projector.to(self.device)
        return UnifiedLoss(self.llm, merger, projector, self.loss_weights)

    @torch.no_grad()
    def prepare_batch(self, batch: LlmBatch) -> ReadyBatch:
        """The batch with codes of target images and features of input images."""
        views = batch.views
        if views is None:
            return ReadyBatch(**vars(batch))

        # 1. Select patches of all images.
        features = self.features(views.pixels)  # [n, N, D]
        generators = [torch.Generator().manual_seed(seed) for seed in views.seeds]
        selection = self.visual.select(
            features, mode=self.run.visual_encoder.selection, generator=generators
        )
        keep = selection.keep_BN
        mask = keep.cpu() > 0.5  # [n, N]

        # 2. Codes of target images, in rows of the actual lengths.
        targets = views.is_target.nonzero().flatten()
        on_device = targets.to(self.device)
        codes: list[list[int] | None] = [None] * len(mask)
        target_codes = self._codes(features[on_device], keep[on_device])
        for index, image_codes in zip(targets.tolist(), target_codes, strict=True):
            codes[index] = image_codes
        code_start = self.tokenizer.vocabulary.code_start
        counts = mask.sum(1).tolist()
        filled, token_indices = fill_rows(
            batch, counts, codes, code_start, self.tokenizer.pad_token_id
        )

        # 3. Features of input images.
        inputs = (~views.is_target).nonzero().flatten()
        if not len(inputs):
            return ReadyBatch(**vars(filled))
        on_device = inputs.to(self.device)
        return ReadyBatch(
            **vars(filled),
            features=features[on_device],
            keep=keep[on_device],
            patch_indices=mask[inputs].flatten().nonzero().flatten(),
            token_indices=token_indices,
        )

    def _codes(self, features: Tensor, keep: Tensor) -> list[list[int]]:
        """Features `[n, N, D]` and selection mask `[n, N]` → codes of each image."""
        if not len(features):
            return []
        batch_size = self.run.visual_encoder.at_once
        batches = map(self.visual.codes, features.split(batch_size), keep.split(batch_size))
        return [image_codes.tolist() for batch in batches for image_codes in batch]

    def loss_parts(self, model: nn.Module, batch: LlmBatch) -> LossParts:
        batch = batch.to(self.device)
        assert isinstance(batch, ReadyBatch)
        return model(
            batch.input_ids,
            batch.labels,
            batch.position_ids,
            batch.attention_mask,
            batch.features,
            batch.keep,
            batch.patch_indices,
            batch.token_indices,
        )

    # ---- checkpoints

    def published(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of language model or adapter, token merger and projector; original names."""
        return {**super().published(weights), **_visual_weights(weights)}

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """A `language_model` folder: files of LLaMA or an adapter, tokenizer, `visual_weight`."""
        visual = _visual_weights(weights)
        others = {name: value for name, value in weights.items() if name not in visual}
        super().save(folder, others)
        save_state_dict(visual, folder / VISUAL_WEIGHTS)

    def record_base(self, folder: Path) -> None:
        write_checkpoint_system(
            folder,
            "lavit",
            llm=self.base_folder,
            tokenizer=project_path(self.run.visual_encoder.path),
        )

    def load(self, folder: Path) -> None:
        super().load(folder)
        load_visual({name: getattr(self.module, name) for name in PARTS}, folder)


def _visual_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `PARTS`."""
    return {name: value for name, value in weights.items() if name.startswith(PARTS)}


def load_visual(parts: Mapping[str, nn.Module], path: Path) -> None:
    """Load token merger and projector from a file, or a folder with one.

    Raises:
        CheckpointError: no file, or a tensor is missing or of another size.
    """
    file = first_file(path, VISUAL_WEIGHT_FILES) if path.is_dir() else path
    if file is None or not file.is_file():
        raise CheckpointError(
            f"{path}: no {VISUAL_WEIGHTS} (token merger and projector of a language model)."
        )
    assign_strictly(nn.ModuleDict(parts), load_state_dict(file), file, foreign=True)
