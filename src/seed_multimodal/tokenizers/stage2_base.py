"""Base of both stages 2: a frozen encoder, deliberate corruption of codes, and the losses of the codebook.

    Loss = 5 · codebook + 2 · (1 - cosine to the Q-Former's output) + the decode side's own distillation loss

SEED-2's (`stage2.Stage2Model`) ends in an image embedding, SEED-1's (`seed1_stage2.Seed1Stage2Model`) in text features.
Each derives from `Stage2Base` and then from its tokenizer: it is that tokenizer with losses, and `to_tokenizer()` hands
the trained weights over without copying names.
As released the frozen Q-Former stays in train mode, so its dropout makes codes and targets noisy
(`frozen_dropout=False` stops that). Unused codes receive no gradient but are weight-decayed if the optimiser does so.
Ours, off by default: training the Q-Former too, corrupted codes, a prefix of the codes, and no quantiser (warm-up).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import setting
from seed_multimodal.tokenizers.encoder import CodeTokenizer, first_rows
from seed_multimodal.tokenizers.released import ENCODER_PARTS, TOWER
from seed_multimodal.weights import LoadReport, assign_strictly


@dataclass(frozen=True)
class CodebookWeights:
    """Factors of the loss terms that both stages 2 have."""

    embed: float = setting(5.0, least=0)
    recon_s: float = setting(2.0, least=0)


@dataclass(kw_only=True)
class CodebookOutput:
    """Weighted losses `[]` that add up to `loss`, and the activations they came from.

    `loss_embed_raw` is unweighted. `indices` is None when the quantiser was bypassed, `recon_s` without its blocks.
    """

    loss: Tensor
    loss_embed: Tensor
    loss_recon_s: Tensor
    loss_embed_raw: Tensor
    indices: Tensor | None
    pre_quant: Tensor
    quant: Tensor
    query_output: Tensor
    query_up: Tensor
    recon_s: Tensor | None
    target: Tensor


class Stage2Base(CodeTokenizer):
    """Mixed in before the tokenizer's class.

    Attributes:
        tokenizer_class: what `to_tokenizer` makes. output_class: what `forward` returns.
        target_tower: name of the frozen model that makes the target, which may be None.
        weights: factors of the loss terms.
    """

    tokenizer_class: ClassVar[type[CodeTokenizer]]
    output_class: ClassVar[type[CodebookOutput]]
    target_tower: ClassVar[str]
    weights: CodebookWeights

    def start_training(self, *, freeze_qformer: bool, frozen_dropout: bool, corrupt: float, nested: float) -> None:
        """Called once all parts exist: check and store the options, freeze parameters.

        Args:
            freeze_qformer: False trains `Qformer`, `query_tokens` and `ln_vision` too (the vision tower never).
            frozen_dropout: leave the frozen Q-Former in train mode, as released.
            corrupt: each sample gets a fraction of its codes, uniform in [0, corrupt], replaced by random ones before
                decoding (training mode only), so that the decoder survives a language model's errors.
            nested: probability that a sample is decoded from its first k codes only, k uniform (training mode only),
                so that early codes carry the most; the positions after them hold zeros.

        Raises:
            ConfigError: a probability outside 0..1.
        """
        for name, value in (("corrupt", corrupt), ("nested", nested)):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} must be a probability between 0 and 1, got {value}.")
        self.freeze_qformer, self.frozen_dropout = freeze_qformer, frozen_dropout
        self.corrupt, self.nested = corrupt, nested
        parts: list[nn.Module | nn.Parameter | None] = [self.visual_encoder, getattr(self, self.target_tower)]
        if freeze_qformer:
            parts += [self.ln_vision, self.Qformer, self.query_tokens]
        for part in parts:
            if part is not None:
                part.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As usual, except that the vision tower, and a frozen Q-Former if asked for, stay in eval mode."""
        super().train(mode)
        self.visual_encoder.eval()
        if self.freeze_qformer and not self.frozen_dropout:
            self.Qformer.eval()
        return self

    def encoder_output(self, images: Tensor | None, vit_features: Tensor | None = None) -> Tensor:
        """Pixels, or tower output `[B, N, W]` before `ln_vision`, → Q-Former output `[B, 32, D]`."""
        with torch.no_grad():
            vit = self.visual_encoder(images) if vit_features is None else vit_features
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_qformer):
            return self.query_features_from(self.ln_vision(vit))

    def through_codes(self, query_features: Tensor, target: Tensor, quantize: bool,
                      generator: torch.Generator | None) -> Any:
        """Q-Former output `[B, 32, D]` → codes, corrupted as configured in training, → both decoders: the output.

        Args:
            target: what the decode side should predict from the codes.
            quantize: False lets the features themselves through (warm-up before `quantize.init_from`).
            generator: draws the corruption.
        """
        pre_quant = self.pre_quant_from_features(query_features)
        if quantize:
            quant, embed_raw, indices = self.quantize(pre_quant)
            quant = self.keep_prefix(self.corrupt_codes(quant, generator), generator)
        else:
            quant, embed_raw, indices = self.quantize.prepare(pre_quant), pre_quant.new_zeros(()), None
        query_up = self.upsample(quant)
        loss_embed, loss_recon, recon_s = self.weights.embed * embed_raw, query_up.new_zeros(()), None
        if hasattr(self, "blocks"):
            recon_s = self.rebuild_queries(query_up)
            loss_recon = self.weights.recon_s * (1 - cosine(recon_s, query_features.detach())).mean()
        losses, activations = self.distil(query_up, target)
        return self.output_class(
            loss=sum(losses.values(), loss_embed + loss_recon), loss_embed=loss_embed, loss_recon_s=loss_recon,
            loss_embed_raw=embed_raw, indices=indices, pre_quant=pre_quant, quant=quant, query_output=query_features,
            query_up=query_up, recon_s=recon_s, target=target, **losses, **activations)

    def distil(self, query_up: Tensor, target: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The decode side: `upsample`d codes `[B, 32, D]` → its weighted losses and its activations, by the names in
        `output_class`."""
        raise NotImplementedError

    def corrupt_codes(self, quant: Tensor, generator: torch.Generator | None) -> Tensor:
        """Codebook rows `[B, 32, d]`, in training some of them others' (see `corrupt`)."""
        if not (self.training and self.corrupt):
            return quant
        device = quant.device if generator is None else generator.device
        shape = quant.shape[:2]
        fraction = self.corrupt * torch.rand(shape[0], 1, generator=generator, device=device)
        swap = (torch.rand(shape, generator=generator, device=device) < fraction).to(quant.device)
        codes = torch.randint(self.quantize.size, shape, generator=generator, device=device).to(quant.device)
        if self.quantize.sections > 1:  # others of the same place, which is what a language model confuses
            own = self.quantize.size // self.quantize.sections
            codes = codes % own + own * torch.arange(self.quantize.sections, device=codes.device)
        return torch.where(swap[..., None], self.quantize.lookup(codes).detach().to(quant.dtype), quant)

    def keep_prefix(self, quant: Tensor, generator: torch.Generator | None) -> Tensor:
        """Codebook rows `[B, 32, d]`, in training some samples' only up to a place (see `nested`)."""
        if not (self.training and self.nested):
            return quant
        count, places = quant.shape[:2]
        device = quant.device if generator is None else generator.device
        keep = torch.randint(1, places + 1, (count, 1), generator=generator, device=device)
        whole = torch.rand(count, 1, generator=generator, device=device) >= self.nested
        return first_rows(quant, torch.where(whole, places, keep).to(quant.device))

    def load_stage1(self, state: Mapping[str, Tensor], source: str = "the stage-1 model") -> LoadReport:
        """Take the encoder side by name from a stage-1 state dict (text path and projections are left behind).

        A training checkpoint without the frozen vision tower is accepted: load the tower separately.
        """
        own = self.state_dict()
        state = {name: value for name, value in state.items() if name in own and name.split(".")[0] in ENCODER_PARTS}
        rest = [name for name in own if name.split(".")[0] not in ENCODER_PARTS]
        if not any(name.startswith(TOWER) for name in state):
            rest += [name for name in own if name.startswith(TOWER)]
        return assign_strictly(self, state, source, allow_missing=rest)

    def to_tokenizer(self) -> Any:
        """The trained `tokenizer_class` in eval mode; its tensors are this model's own, not copies."""
        with torch.device("meta"):
            tokenizer = self.tokenizer_class(self.config)  # type: ignore[call-arg]
        wanted = tokenizer.state_dict()
        tokenizer.load_state_dict({name: value for name, value in self.state_dict().items() if name in wanted},
                                  assign=True)
        tokenizer.quantize.counts = torch.zeros_like(self.quantize.counts)  # not saved, so still without memory
        return tokenizer.requires_grad_(False).eval()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine along the last axis without an epsilon, as released: `[..., D]` → `[...]`."""
    a, b = a.float(), b.float()
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
