"""Stage 2 of LaVIT, unified pre-training, as a task of the loop: the language model's, with pictures in its rows.

    [picture, text]   continuous rows of the trained merger and projector are read; the text is learned
    [text, picture]   the frozen tokenizer's codes are learned, and image end
    text              as ever

The data workers give pictures as pixels. On the device the frozen tower and selector see them; which patches are kept
is a function of (seed, sample), so that a run resumes exactly. Codes are made by stage 1's merger, which stays as it
was, and what the language model reads by the trained one. In log lines `text_loss` is that of text, `image_loss` that
of codes and image end. A checkpoint is a `language_model` folder of a released LaVIT: LLaMA (or an adapter) and
`visual_weight.safetensors`. Source: specification §5.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.data.decoders import FEATURE_DECODERS
from seed_multimodal.data.decoders.lavit import LavitOptions
from seed_multimodal.data.stream.config import SourceSettings, read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.device import DTYPES
from seed_multimodal.errors import ConfigError
from seed_multimodal.lavit.processing import LavitTokenizer
from seed_multimodal.likeness import some_weights
from seed_multimodal.nn.layers import checkpoint_layers
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.lavit.pretrain_settings import (
    PARTS,
    VISUAL,
    VisualModel,
    VisualTokens,
    load_visual,
    read_visual,
)
from seed_multimodal.training.lavit.rows import ReadyBatch, fill_rows
from seed_multimodal.training.lavit.unified_loss import UnifiedLoss
from seed_multimodal.training.llm.config import RunSettings
from seed_multimodal.training.llm.loss import find_llama
from seed_multimodal.training.llm.task import LlmTask
from seed_multimodal.weights import save_state_dict


class PretrainTask(LlmTask):
    """One run in one process."""

    module: UnifiedLoss
    start_hint = "model.path and visual_encoder.start"
    tokenizer_kind = LavitTokenizer
    kinds = {**LlmTask.kinds, "visual_encoder": VisualModel}

    def __init__(self, run: RunSettings, group: ProcessGroup, device: torch.device) -> None:
        """Open data and tokenizers. Raises as `train_llm`; ConfigError for parts that do not belong together."""
        if run.visual_encoder is None:
            raise ConfigError("configuration: visual_encoder is needed for LaVIT: choose one of its files.")
        if run.agent is not None:
            raise ConfigError("configuration: agent is SEED-X's; LaVIT has none.")
        self.visual = VisualTokens(read_visual(run.visual_encoder), DTYPES[run.trainer.precision])
        super().__init__(run, group, device)
        sizes, words = self.visual.config, self.tokenizer.vocabulary
        for name, there, here in (("codes", sizes.codebook_size, words.n_codes),
                                  ("patches a picture", sizes.patches, words.tokens_per_image)):
            if there != here:
                raise ConfigError(f"visual_encoder: the visual tokenizer has {there} {name}, but the words of the "
                                  f"tokenizer {run.tokenizer} are for {here}.")
        for where, given in (("data", run.data), ("eval_data", run.eval_data)):
            _check_sides(where, given, sizes.vit.image_size)

    # ------------------------------------------------------------------------------------------------- the training

    def make_module(self) -> nn.Module:
        """Merger and projector beside the language model; the frozen tokenizer moves to the device."""
        merger, projector = self.visual.trained_parts(int(find_llama(self.llm).config.hidden_size))
        if self.model_settings.gradient_checkpointing:
            checkpoint_layers(merger)
        self.visual.to(self.device)
        return UnifiedLoss(self.llm, merger.to(self.device), projector.to(self.device), kind=self.settings.loss_kernel,
                           weights=self.loss_weights)

    @torch.no_grad()
    def ready(self, batch: LlmBatch) -> ReadyBatch:
        """The batch with its pictures: codes of those that are written, features of those that are read."""
        views, words = batch.views, self.tokenizer.vocabulary
        if views is None:
            return ReadyBatch(**vars(batch))
        features = self.visual.features(views.pixels)
        keep = self.visual.choose(features, views.seeds.tolist())
        on_cpu = keep.cpu() > 0.5
        written, read = views.written.nonzero().flatten(), (~views.written).nonzero().flatten()
        codes: list[list[int] | None] = [None] * len(on_cpu)
        if len(written):
            drawn = written.to(self.device)
            for place, found in zip(written.tolist(), self.visual.codes(features[drawn], keep[drawn]), strict=True):
                codes[place] = found
        filled, places = fill_rows(batch, on_cpu.sum(1).tolist(), codes, words.code_start, self.tokenizer.pad_id,
                                   words.boi_id)
        if not len(read):
            return ReadyBatch(**vars(filled))
        seen = read.to(self.device)
        return ReadyBatch(**vars(filled), features=features[seen], keep=keep[seen],
                          kept=on_cpu[read].flatten().nonzero().flatten(), places=places)

    def losses(self, model: nn.Module, batch: LlmBatch) -> Any:
        """See `LlmTask`."""
        batch = batch.to(self.device)
        assert isinstance(batch, ReadyBatch)
        return model(batch.input_ids, batch.labels, batch.position_ids, batch.attention_mask, batch.features,
                     batch.keep, batch.kept, batch.places)

    # ---------------------------------------------------------------------------------------------- the checkpoints

    def frozen_models(self) -> dict[str, list[float]]:
        """Stage 1's tokenizer, by whose codes pictures are written."""
        return {"visual tokenizer": some_weights(self.visual.tokenizer)}

    def weights(self, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The language model's (or its adapter's), and merger and projector by their released names."""
        everything = dict(self.module.named_parameters()) if gathered is None else gathered
        visual = {name: value.detach() for name, value in everything.items() if name.startswith(PARTS)}
        others = None if gathered is None else {name: value for name, value in gathered.items() if name not in visual}
        return {**super().weights(others), **visual}

    def save_files(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """A `language_model` folder: LLaMA's or an adapter's files, the tokenizer's, `visual_weight.safetensors`."""
        visual = {name: value for name, value in weights.items() if name.startswith(PARTS)}
        super().save_files(folder, {name: value for name, value in weights.items() if name not in visual})
        save_state_dict(visual, folder / VISUAL[0])

    def load_weights(self, folder: Path, allow_missing: Sequence[str] = ()) -> None:
        """Inverse of `save_files`."""
        super().load_weights(folder, allow_missing)
        load_visual({name: getattr(self.module, name) for name in PARTS}, folder)


def _reading(given: Mapping[str, Any] | None, name: str) -> list[SourceSettings]:
    """The sources whose pictures are opened."""
    return [one for one in read_data_settings(given, name).sources if one.decoder in FEATURE_DECODERS] if given else []


def _check_sides(name: str, given: Mapping[str, Any] | None, side: int) -> None:
    """Refuse pictures that are not the tower's size."""
    for source in _reading(given, name):
        found = source.options.get("base_resolution", LavitOptions.base_resolution)
        if found != side:
            raise ConfigError(f"{name}: base_resolution of the source {source.name} is {found}, but the vision tower "
                              f"reads pictures of {side} pixels a side.")
