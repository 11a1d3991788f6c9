"""Stage 2 of LaVIT, unified pre-training, as a task of the trainer: the language model's, with images in its rows.

    [image, text]   continuous rows of the trained merger and projector are read; the text is learned
    [text, image]   the frozen tokenizer's codes are learned, and image end
    text            as ever

The frozen vision encoder and token selector see images on the device; which patches are kept is a function of (seed,
sample). Codes are made by stage 1's merger, which stays as it was, and what the language model reads by the trained
one. In log lines `text_loss` is that of text, `image_loss` that of codes and image end. A checkpoint is a
`language_model` folder of a released LaVIT. Source: specification §5.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.data.decoders.seed_x import OpenedOptions
from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.device import DTYPES
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import first_file
from seed_multimodal.images.transforms import normalise
from seed_multimodal.lavit.checkpoints import load_dynamic_tokenizer
from seed_multimodal.lavit.modeling import MODES, TokenMerger, kept_rows
from seed_multimodal.lavit.processing import LavitTokenizer
from seed_multimodal.nn.layers import cast_layers, checkpoint_layers
from seed_multimodal.settings import setting
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.frozen_features import FrozenFeatures
from seed_multimodal.training.lavit.rows import ReadyBatch, fill_rows
from seed_multimodal.training.llm.config import find_folder
from seed_multimodal.training.llm.loss import LossModule, LossParts, LossWeights, find_llama
from seed_multimodal.training.llm.task import LlmTask
from seed_multimodal.training.run import Run
from seed_multimodal.weights import assign_strictly, load_state_dict, save_state_dict, some_weights

VISUAL = ("visual_weight.safetensors", "visual_weight.bin")
PARTS = ("causal_encoder", "vit_proj")  # what is trained beside the language model, by the released names


@dataclass
class VisualModel:
    """The frozen tokenizer of stage 1, and where the trained merger and projector start.

    Attributes:
        path: the tokenizer's folder, a released model's or ours (`lavit.checkpoints`).
        start: a `visual_weight` file, or a folder with one; None: stage 1's merger, and a new projector (`seed`).
        selection: `draw` (as released: each patch by its probability, a function of seed and sample here) or
            `threshold`.
        at_once: images that the frozen networks take at a time.
    """

    path: str
    start: str | None = None
    selection: str = setting("draw", choices=MODES)
    at_once: int = setting(16, least=1)
    seed: int = setting(0, least=0)


class UnifiedLoss(LossModule):
    """`LossModule` with features in places of the rows. Parameter names: `llm.*`, `causal_encoder.*`, `vit_proj.*`.

    The merger takes part in every step, with numbers that count for nothing where the batch has no image to read: all
    processes compute gradients of the same parameters, and ZeRO-3 gathers them in one order.
    """

    def __init__(self, llm: nn.Module, merger: nn.Module, projector: nn.Linear, weights: LossWeights) -> None:
        super().__init__(llm, weights)
        self.causal_encoder, self.vit_proj = merger, projector

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None,
                attention_mask: Tensor | None = None, features: Tensor | None = None,
                keep: Tensor | None = None, kept: Tensor | None = None, places: Tensor | None = None) -> LossParts:
        """As `LossModule`; `features`, `keep`, `kept` and `places` as of `rows.ReadyBatch`."""
        llama: Any = find_llama(self.llm)
        embeds = llama.get_input_embeddings()(input_ids)
        if features is None or keep is None or kept is None or places is None:
            nothing = self.vit_proj.weight.new_zeros(1, 1, self.vit_proj.in_features)
            embeds = embeds + 0.0 * self.read(nothing, nothing.new_ones(1, 1)).sum().to(embeds)
        else:
            rows = self.read(features, keep).flatten(0, 1).index_select(0, kept)
            embeds = embeds.flatten(0, 1).index_copy(0, places, rows.to(embeds)).view_as(embeds)
        return super().forward(input_ids, labels, position_ids, attention_mask, embeds)

    def read(self, features: Tensor, keep: Tensor) -> Tensor:
        """Features `[n, N, D]`, kept or not `[n, N]` → what the language model reads `[n, N, width]`."""
        found: Tensor = self.vit_proj(self.causal_encoder(features.to(self.vit_proj.weight.dtype), keep))
        return found


class PretrainTask(LlmTask):
    """One run in one process. `visual`: the frozen tokenizer, whose merger makes codes and stays as it was."""

    module: UnifiedLoss
    start_hint = "model.path and visual_encoder.start"
    tokenizer_kind = LavitTokenizer
    kinds = {**LlmTask.kinds, "visual_encoder": VisualModel}

    def __init__(self, run: Run, group: ProcessGroup, device: torch.device) -> None:
        """Open data and tokenizers. Raises as `RunTask.train`; ConfigError for parts that do not belong together."""
        self.visual = load_dynamic_tokenizer(find_folder(run.visual_encoder.path))
        super().__init__(run, group, device)
        sizes, words = self.visual.config, self.tokenizer.vocabulary
        for name, there, here in (("codes", sizes.codebook_size, words.n_codes),
                                  ("patches an image", sizes.patches, words.tokens_per_image)):
            if there != here:
                raise ConfigError(f"visual_encoder: the visual tokenizer has {there} {name}, but the words of the "
                                  f"tokenizer {run.tokenizer} are for {here}.")
        self.check_views(sizes.vit.image_size, OpenedOptions.base_resolution)

    # ------------------------------------------------------------------------------------------------- the training

    def make_module(self) -> nn.Module:
        """Merger and projector, in fp32, beside the language model; the frozen tokenizer moves to the device."""
        visual, settings = self.visual, self.run.visual_encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            merger = TokenMerger(visual.config)
            projector = nn.Linear(visual.config.vit.width, int(find_llama(self.llm).config.hidden_size))
        if settings.start is None:
            merger.load_state_dict(visual.causal_encoder.state_dict())
        else:
            load_visual({"causal_encoder": merger, "vit_proj": projector}, find_folder(settings.start))
        if self.run.model.gradient_checkpointing:
            checkpoint_layers(merger)
        visual.vit_proj = None
        cast_layers(visual, DTYPES[self.settings.precision])
        visual.to(self.device)
        self.features = FrozenFeatures(visual.encoder, self.device,
                                       lambda pixels: visual.patch_features(normalise(pixels)), settings.at_once)
        return UnifiedLoss(self.llm, merger.to(self.device), projector.to(self.device), self.loss_weights)

    @torch.no_grad()
    def ready(self, batch: LlmBatch) -> ReadyBatch:
        """The batch with its images: codes of those that are written, features of those that are read."""
        views, words = batch.views, self.tokenizer.vocabulary
        if views is None:
            return ReadyBatch(**vars(batch))
        features = self.features(views.pixels)
        generators = [torch.Generator().manual_seed(seed) for seed in views.seeds]
        keep = self.visual.select(features, mode=self.run.visual_encoder.selection, generator=generators).keep_BN
        on_cpu = keep.cpu() > 0.5
        written, read = views.written.nonzero().flatten(), (~views.written).nonzero().flatten()
        codes: list[list[int] | None] = [None] * len(on_cpu)
        drawn = written.to(self.device)
        for place, found in zip(written.tolist(), self._codes(features[drawn], keep[drawn]), strict=True):
            codes[place] = found
        filled, places = fill_rows(batch, on_cpu.sum(1).tolist(), codes, words.code_start, self.tokenizer.pad_id)
        if not len(read):
            return ReadyBatch(**vars(filled))
        seen = read.to(self.device)
        return ReadyBatch(**vars(filled), features=features[seen], keep=keep[seen],
                          kept=on_cpu[read].flatten().nonzero().flatten(), places=places)

    def _codes(self, features: Tensor, keep: Tensor) -> list[list[int]]:
        """Features `[n, N, D]` and what is kept of them `[n, N]` → the codes of each image."""
        at_once, codes = self.run.visual_encoder.at_once, list[list[int]]()
        for some, kept in zip(features.split(at_once), keep.split(at_once), strict=True) if len(features) else ():
            rows, counts = kept_rows(self.visual.merge(some, kept), kept)
            codes += [one.tolist() for one in self.visual.quantize_rows(rows)[0].split(counts.tolist())]
        return codes

    def losses(self, model: nn.Module, batch: LlmBatch) -> Any:
        batch = batch.to(self.device)
        assert isinstance(batch, ReadyBatch)
        return model(batch.input_ids, batch.labels, batch.position_ids, batch.attention_mask, batch.features,
                     batch.keep, batch.kept, batch.places)

    # ---------------------------------------------------------------------------------------------- the checkpoints

    def frozen_models(self) -> dict[str, list[float]]:
        """Stage 1's tokenizer, by whose codes images are written."""
        return {"visual tokenizer": some_weights(self.visual)}

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
        super().load_weights(folder, allow_missing)
        load_visual({name: getattr(self.module, name) for name in PARTS}, folder)


def load_visual(parts: Mapping[str, nn.Module], place: Path) -> None:
    """Fill merger and projector from a file, or a folder with one.

    Raises:
        CheckpointError: there is none, or one of its tensors is missing or of another size.
    """
    file = first_file(place, VISUAL) if place.is_dir() else place
    if file is None or not file.is_file():
        raise CheckpointError(f"{place}: there is no {VISUAL[0]}, the merger and projector of a language model.")
    state = load_state_dict(file)
    for name, part in parts.items():
        start = f"{name}."
        assign_strictly(part, {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)},
                        file)
