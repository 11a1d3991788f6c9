"""nano's stage 2 of the SEED-2 tokenizer, `nano_codebook` in the LAVIS application: the decoded
embedding must give what linear layers read out of the vision encoder's embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from seed_lavis.compat import registry
from seed_lavis.models import Blip2CodebookAllImage
from seed_lavis.options import Stage2Options
from torch import Tensor, nn

from seed_multimodal.settings import setting
from seed_multimodal.state_dicts import load_state_dict
from seed_nano.labels import label_divergence, load_label_heads


@dataclass(kw_only=True)
class NanoCodebookOptions(Stage2Options):
    """Keys of `model` that stage 2 has not."""

    readout_weight: str  # file of a linear read-out [M, E], compared by squared error
    label_heads: str  # file of linear classifiers on the embedding
    # Weight of the divergence between labels read from both embeddings.
    label_weight: float = setting(minimum=0)


@registry.register_model("nano_codebook")
class NanoCodebook(Blip2CodebookAllImage):
    """Stage 2 with the errors of label heads and of a read-out in its loss; both are frozen and not
    saved."""

    options_type = NanoCodebookOptions
    options: NanoCodebookOptions

    def __init__(self, options: NanoCodebookOptions) -> None:
        readout = next(iter(load_state_dict(options.readout_weight).values()))
        label_heads = load_label_heads(options.label_heads)
        super().__init__(options)
        self.scale_start()
        self.register_buffer("readout", readout.float(), persistent=False)
        self.label_heads = label_heads

    @torch.no_grad()
    def scale_start(self) -> None:
        """Random weights around the codebook and in the decoder that preserve activations' size.

        PyTorch's, as in the original, shrink activations at each layer, so codes have no effect for
        hundreds of steps.
        """
        gains: list[tuple[nn.Sequential, float]] = [
            (self.encode_task_layer, 1.0),
            (self.decode_task_layer, 1.0),
            (self.image_down, 2.0),  # ReLU halves the mean square
        ]
        for layers, gain in gains:
            for layer in layers:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=(gain / layer.in_features) ** 0.5)
        projection = self.distill_image_proj
        nn.init.normal_(projection.weight, std=0.3 * projection.in_features**-0.5)
        nn.init.normal_(self.pos_embed_image, std=0.5)

    def other_losses(self, embeds: Tensor, target: Tensor) -> dict[str, Tensor]:
        error = (embeds.float() - target.float()) @ self.readout.T
        divergence = label_divergence(self.label_heads, embeds, target).mean()
        return {
            "loss_readout": error.square().mean(),
            "loss_labels": self.options.label_weight * divergence,
        }
