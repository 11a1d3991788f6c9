"""What both stage-2 models share: their state for `training.codebook`, and their sizes and options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seed_lavis.base import qformer_sizes, vit_sizes
from seed_lavis.options import CodebookOptions


class CodebookMixin:
    """State of stage-2 models for `CodebookMaintenance`: the codes of the last batch, whether codes are used yet."""

    options: CodebookOptions
    use_codes = True
    codes: Tensor | None = None
    features: Tensor | None = None

    def prepare_codebook(self) -> None:
        """A moving-average codebook changes without gradient: it counts as trained, so that it is saved."""
        if self.options.ema_decay is not None:
            self.quantize.embedding.weight.requires_grad_(True)  # type: ignore[attr-defined]

    @property
    def skips_parameters(self) -> bool:
        """Whether some trained parameters get no gradient in some steps (an option of DistributedDataParallel)."""
        return self.options.ema_decay is not None or self.options.codebook_warmup > 0

    def encoder_output(self, images: Tensor | None, vit_features: Tensor | None = None) -> Tensor:
        """As the library's, with the tower in `vit_precision`."""
        if vit_features is None:
            with torch.no_grad():
                vit_features = self.tower(images)  # type: ignore[attr-defined]
        return super().encoder_output(None, vit_features)  # type: ignore[misc]

    def codebook_points(self, batch: Mapping[str, Any]) -> Tensor:
        """Features of a batch before the quantiser `[B, 32, d]`."""
        return self.encode_task_layer(self.encoder_output(batch["image"]))  # type: ignore[attr-defined]

    def note_codes(self, pre_quant: Tensor, indices: Tensor | None) -> None:
        """Keep the last batch's codes and features."""
        self.features, self.codes = pre_quant.detach().float(), indices


def stage2_sizes(options: CodebookOptions) -> dict[str, Any]:
    """Sizes in the configurations of both stage-2 models."""
    return {"vit": vit_sizes(options), "qformer": qformer_sizes(options), "num_query": options.num_query_token,
            "codebook_size": options.n_embed, "codebook_dim": options.codebook_embed_dim,
            "decode_depth": options.decode_depth, "decode_heads": options.decode_heads,
            "reverse_depth": options.reverse_depth, "normalize_codes": options.normalize_codes,
            "codebook_sections": options.codebook_sections}


def stage2_training(options: CodebookOptions) -> dict[str, Any]:
    """Options of the training that both stage-2 models take, besides loss weights and targets."""
    return {name: getattr(options, name) for name in ("freeze_qformer", "frozen_dropout", "corrupt", "nested",
                                                      "ema_decay")}
