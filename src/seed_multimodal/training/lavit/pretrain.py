"""LaVIT's stage 2, unified pre-training, as a trainer task: the language model's task, with images in its rows.

    [image, text]   input: continuous features of the trained token merger and projector; target: the text
    [text, image]   target: the frozen tokenizer's codes, and image end
    text            target: the text

The frozen vision encoder and token selector run on the device; patch selection is determined by (seed, sample). Codes
come from stage 1's frozen token merger, input features from the trained one. In log lines `text_loss` is that of text,
`image_loss` that of codes and image end. A checkpoint is a `language_model` folder of an original LaVIT. Source:
specification §5.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.data.decoders.seed_x import FeatureDecoderOptions
from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.device import DTYPES
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import VISUAL_WEIGHTS, first_file
from seed_multimodal.images.transforms import normalise
from seed_multimodal.lavit.checkpoints import VISUAL_WEIGHT_FILES, load_dynamic_tokenizer
from seed_multimodal.lavit.modeling import MODES, TokenMerger, kept_rows
from seed_multimodal.lavit.processing import LavitTokenizer
from seed_multimodal.nn.layers import cast_layers, checkpoint_layers
from seed_multimodal.settings import setting
from seed_multimodal.system.config import record_base
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.frozen_models import FrozenFeatures
from seed_multimodal.training.lavit.rows import ReadyBatch, fill_rows
from seed_multimodal.training.llm.config import project_path
from seed_multimodal.training.llm.loss import LossModule, LossParts, LossWeights, find_llama
from seed_multimodal.training.llm.task import LlmTask
from seed_multimodal.training.run import RunSettings
from seed_multimodal.weights import assign_strictly, fingerprint, load_state_dict, save_state_dict

PARTS = ("causal_encoder", "vit_proj")  # trained with the language model, original names


@dataclass
class VisualModel:
    """The frozen tokenizer of stage 1, and the initialization of the trained token merger and projector.

    Attributes:
        path: the tokenizer's folder, an original model's or ours (`lavit.checkpoints`).
        start: a `visual_weight` file, or a folder with one; None: stage 1's token merger, and a new projector (`seed`).
        selection: `draw` (original: each patch by its probability; here determined by seed and sample) or
            `threshold`.
        at_once: images per forward pass of the frozen networks.
    """

    path: str
    start: str | None = None
    selection: str = setting("draw", choices=MODES)
    at_once: int = setting(16, minimum=1)
    seed: int = setting(0, minimum=0)


class UnifiedLoss(LossModule):
    """`LossModule` with image features in the rows. Parameter names: `llm.*`, `causal_encoder.*`, `vit_proj.*`.

    The token merger runs in every step, on dummy input if the batch has no input image, so that all processes compute
    gradients of the same parameters and ZeRO-3 gathers them in the same order.
    """

    def __init__(
        self, llm: nn.Module, merger: nn.Module, projector: nn.Linear, weights: LossWeights
    ) -> None:
        super().__init__(llm, weights)
        self.causal_encoder, self.vit_proj = merger, projector

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        keep: Tensor | None = None,
        kept: Tensor | None = None,
        places: Tensor | None = None,
    ) -> LossParts:
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
        """Features `[n, N, D]` and selection mask `[n, N]` → input of the language model `[n, N, width]`."""
        found: Tensor = self.vit_proj(
            self.causal_encoder(features.to(self.vit_proj.weight.dtype), keep)
        )
        return found


class PretrainTask(LlmTask):
    """One run in one process. `visual`: the frozen tokenizer, which computes codes."""

    module: UnifiedLoss
    start_hint = "model.path and visual_encoder.start"
    tokenizer_kind = LavitTokenizer
    group_types = {**LlmTask.group_types, "visual_encoder": VisualModel}

    def __init__(self, run: RunSettings, group: ProcessGroup, device: torch.device) -> None:
        """Open data and tokenizers. Raises as `RunTask.train`; ConfigError: mismatched tokenizers."""
        self.visual = load_dynamic_tokenizer(project_path(run.visual_encoder.path))
        super().__init__(run, group, device)
        sizes, words = self.visual.config, self.tokenizer.vocabulary
        for name, there, here in (
            ("codes", sizes.codebook_size, words.n_codes),
            ("patches an image", sizes.patches, words.tokens_per_image),
        ):
            if there != here:
                raise ConfigError(
                    f"visual_encoder: the visual tokenizer has {there} {name}, but tokenizer "
                    f"{run.tokenizer} expects {here}."
                )
        self.check_views(sizes.vit.image_size, FeatureDecoderOptions.base_resolution)

    # ------------------------------------------------------------------------------------------------- training

    def make_module(self) -> nn.Module:
        """Token merger and projector, in fp32, with the language model; moves the frozen tokenizer to the device."""
        visual, settings = self.visual, self.run.visual_encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            merger = TokenMerger(visual.config)
            projector = nn.Linear(
                visual.config.vit.width, int(find_llama(self.llm).config.hidden_size)
            )
        if settings.start is None:
            merger.load_state_dict(visual.causal_encoder.state_dict())
        else:
            load_visual(
                {"causal_encoder": merger, "vit_proj": projector}, project_path(settings.start)
            )
        if self.run.model.gradient_checkpointing:
            checkpoint_layers(merger)
        visual.vit_proj = None
        cast_layers(visual, DTYPES[self.settings.precision])
        visual.to(self.device)
        self.features = FrozenFeatures(
            visual.encoder,
            self.device,
            lambda pixels: visual.patch_features(normalise(pixels)),
            settings.at_once,
        )
        return UnifiedLoss(
            self.llm, merger.to(self.device), projector.to(self.device), self.loss_weights
        )

    @torch.no_grad()
    def prepare_batch(self, batch: LlmBatch) -> ReadyBatch:
        """The batch with codes of target images and features of input images."""
        views, words = batch.views, self.tokenizer.vocabulary
        if views is None:
            return ReadyBatch(**vars(batch))
        features = self.features(views.pixels)
        generators = [torch.Generator().manual_seed(seed) for seed in views.seeds]
        keep = self.visual.select(
            features, mode=self.run.visual_encoder.selection, generator=generators
        ).keep_BN
        on_cpu = keep.cpu() > 0.5
        written, read = views.is_target.nonzero().flatten(), (~views.is_target).nonzero().flatten()
        codes: list[list[int] | None] = [None] * len(on_cpu)
        drawn = written.to(self.device)
        for place, found in zip(
            written.tolist(), self._codes(features[drawn], keep[drawn]), strict=True
        ):
            codes[place] = found
        filled, places = fill_rows(
            batch, on_cpu.sum(1).tolist(), codes, words.code_start, self.tokenizer.pad_id
        )
        if not len(read):
            return ReadyBatch(**vars(filled))
        seen = read.to(self.device)
        return ReadyBatch(
            **vars(filled),
            features=features[seen],
            keep=keep[seen],
            kept=on_cpu[read].flatten().nonzero().flatten(),
            places=places,
        )

    def _codes(self, features: Tensor, keep: Tensor) -> list[list[int]]:
        """Features `[n, N, D]` and selection mask `[n, N]` → codes of each image."""
        at_once, codes = self.run.visual_encoder.at_once, list[list[int]]()
        for some, kept in (
            zip(features.split(at_once), keep.split(at_once), strict=True) if len(features) else ()
        ):
            rows, counts = kept_rows(self.visual.merge(some, kept), kept)
            codes += [
                one.tolist() for one in self.visual.quantize_rows(rows)[0].split(counts.tolist())
            ]
        return codes

    def loss_parts(self, model: nn.Module, batch: LlmBatch) -> Any:
        batch = batch.to(self.device)
        assert isinstance(batch, ReadyBatch)
        return model(
            batch.input_ids,
            batch.labels,
            batch.position_ids,
            batch.attention_mask,
            batch.features,
            batch.keep,
            batch.kept,
            batch.places,
        )

    # ---------------------------------------------------------------------------------------------- checkpoints

    def frozen_models(self) -> dict[str, list[float]]:
        """Stage 1's tokenizer."""
        return {"visual tokenizer": fingerprint(self.visual)}

    def weights(self, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Weights of the language model (or its adapter), token merger and projector, with original names."""
        everything = dict(self.module.named_parameters()) if gathered is None else gathered
        visual = {
            name: value.detach() for name, value in everything.items() if name.startswith(PARTS)
        }
        others = (
            None
            if gathered is None
            else {name: value for name, value in gathered.items() if name not in visual}
        )
        return {**super().weights(others), **visual}

    def save_files(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """A `language_model` folder: LLaMA's or an adapter's files, the tokenizer's, `visual_weight.safetensors`."""
        visual = {name: value for name, value in weights.items() if name.startswith(PARTS)}
        super().save_files(
            folder, {name: value for name, value in weights.items() if name not in visual}
        )
        save_state_dict(visual, folder / VISUAL_WEIGHTS)

    def record_base(self, folder: Path) -> None:
        record_base(
            folder,
            "lavit",
            llm=self.base_folder,
            tokenizer=project_path(self.run.visual_encoder.path),
        )

    def load_weights(self, folder: Path, allow_missing: Sequence[str] = ()) -> None:
        super().load_weights(folder, allow_missing)
        load_visual({name: getattr(self.module, name) for name in PARTS}, folder)


def load_visual(parts: Mapping[str, nn.Module], place: Path) -> None:
    """Load token merger and projector from a file, or a folder with one.

    Raises:
        CheckpointError: no file, or a tensor is missing or of another size.
    """
    file = first_file(place, VISUAL_WEIGHT_FILES) if place.is_dir() else place
    if file is None or not file.is_file():
        raise CheckpointError(
            f"{place}: no {VISUAL_WEIGHTS} (token merger and projector of a language model)."
        )
    state = load_state_dict(file)
    for name, part in parts.items():
        start = f"{name}."
        assign_strictly(
            part,
            {
                key.removeprefix(start): value
                for key, value in state.items()
                if key.startswith(start)
            },
            file,
        )
