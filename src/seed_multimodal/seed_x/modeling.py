"""`ContinuousLVLM`: a stock LLaMA with continuous image features as input and output (SEED-X's "agent").

                features [256, 4096] ─► input resampler + place of the view ─► 64 embeddings ─┐
    tokens ─► embeddings ─────────────────────────────────────────────────────────────────────┴► LLaMA ─► tokens
                                                  states at 64 image words ─► output resampler ─► features [64, 4096]

Training: cross-entropy of tokens, and the distance of output features to those of the image, averaged over 4
neighbours. The states are those AT the image tokens, after the final norm, not those that predict them. Both resamplers
run in every step, with weight zero if the batch has no image for them, so that all processes compute gradients of the
same parameters and ZeRO-3 gathers them in the same order.

Source: SEED-X (arXiv 2404.14396) and its code (`seed_x.py`); parameter names are the original ones.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from seed_multimodal.errors import DataError
from seed_multimodal.language.llama import ROTARY
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.seed_x.vision import position_features
from seed_multimodal.settings import setting
from seed_multimodal.weights import LoadReport, assign_strictly, load_checkpoint

POOLED = 4  # neighbours that are averaged to one target


@dataclass(frozen=True)
class AgentSettings:
    """Weights of the two losses; whether views have a place; targets averaged over 4 neighbours (`vit_down`); squared
    distance (`mse`) or 1 - cosine. The defaults are the original ones."""

    lm_loss_scale: float = setting(1.0, minimum=0)
    rec_loss_scale: float = setting(6.0, minimum=0)
    add_patch_pos: bool = True
    vit_down: bool = True
    mse: bool = True


class ContinuousLVLM(nn.Module):
    """The language model (a stock `LlamaForCausalLM`, or one with a LoRA) with its two resamplers, for features
    [B, N, K] → [B, 64, D] and states [B, 64, D] → [B, 64, K]; D is the width of the language model."""

    def __init__(
        self,
        llm: Any,
        input_resampler: nn.Module,
        output_resampler: nn.Module,
        settings: AgentSettings | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings or AgentSettings()
        self.llm = llm
        self.input_resampler, self.output_resampler = input_resampler, output_resampler
        if self.settings.add_patch_pos:
            width = llm.config.hidden_size
            self.patch_pos_embed = nn.Parameter(width**-0.5 * torch.randn(4, width))

    # ---- training

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        image_embeds: Tensor | None,
        embeds_gen_mask: Tensor | None,
        embeds_cmp_mask: Tensor | None,
        ids_gen_mask: Tensor,
        ids_cmp_mask: Tensor,
        patch_positions: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """A batch → `total_loss`, `lm_loss`, `rec_loss`; label -100 is not learned, padding is on the right.

        Args:
            image_embeds: [N, places, K], features of all views of the batch, in the order of their words.
            embeds_gen_mask, embeds_cmp_mask: bool [N], views that are written and read; others are left out.
            ids_gen_mask, ids_cmp_mask: bool [B, L], their image words. position_ids: [B, L], of packed sequences.
        """
        read, drawn = _chosen(image_embeds, embeds_cmp_mask), _chosen(image_embeds, embeds_gen_mask)
        embeds = self.embed(
            input_ids, ids_cmp_mask, read, _chosen(patch_positions, embeds_cmp_mask)
        )
        if read is None:
            sizes: Any = self.input_resampler.config
            blank = embeds.new_zeros(1, 1, sizes.kv_dim or sizes.embed_dim)
            embeds = embeds + 0.0 * self._read(blank, embeds.new_zeros(1, 2)).sum().to(embeds)
        states: Tensor = self.llm.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        lm_loss = self.language_loss(states, labels)
        if drawn is None:
            rec_loss = 0.0 * self.output_features(states[:1, :1]).float().sum()
        else:
            rec_loss = self.regression_loss(states[ids_gen_mask], drawn)
        total = self.settings.lm_loss_scale * lm_loss + self.settings.rec_loss_scale * rec_loss
        return {"total_loss": total, "lm_loss": lm_loss, "rec_loss": rec_loss}

    def language_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """States and labels [B, L] → cross-entropy of each next token; 0 where nothing is learned."""
        learned = labels[:, 1:] != IGNORE_INDEX  # of a row of SEED-X a tenth or less
        logits = self.llm.get_output_embeddings()(states[:, :-1][learned]).float()
        total = functional.cross_entropy(logits, labels[:, 1:][learned], reduction="sum")
        return total / learned.sum().clamp(min=1)

    def regression_loss(self, states: Tensor, features: Tensor) -> Tensor:
        """States at the image words [n · 64, D], features of those images [n, N, K] → their distance."""
        target = features.detach().to(states.device)
        if self.settings.vit_down:
            target = functional.avg_pool1d(target.transpose(1, 2), POOLED, POOLED).transpose(1, 2)
        written = self.output_features(states.unflatten(0, (len(features), -1))).float()
        if self.settings.mse:
            return functional.mse_loss(written, target.float())
        return (1 - functional.cosine_similarity(written, target.float(), dim=-1)).mean()

    # ---- inference

    def embed(
        self,
        ids: Tensor,
        mask: Tensor,
        features: Tensor | None,
        positions: Tensor | None,
        views: list[int] | None = None,
    ) -> Tensor:
        """Tokens [B, L] → embeddings [B, L, D], with features [n, N, K] of views, whose centres are `positions` [n, 2],
        in the places of `mask` (bool [B, L]), in order. `views` of each image: then each image is read alone, so that
        it has the same embeddings next to any others."""
        embeds: Tensor = self.llm.get_input_embeddings()(ids)
        if features is None:
            return embeds
        sizes = views or [len(features)]
        centres = [None] * len(sizes) if positions is None else positions.split(sizes)
        read = torch.cat(
            [self._read(*one) for one in zip(features.split(sizes), centres, strict=True)]
        ).flatten(0, 1)
        if int(mask.sum()) != len(read):
            raise DataError(
                f"The batch has {int(mask.sum())} image words for {len(read)} embeddings of its images."
            )
        return embeds.masked_scatter(mask[..., None], read.to(embeds))

    def read_images(self, features: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
        """Features `[V, N, K]` of each image's views, and their centres `[V, 2]` → embeddings `[n, D]` of all views.

        Each image is read alone, so that it has the same embeddings next to any others.
        """
        device = next(self.input_resampler.parameters()).device
        embeddings = [
            self._read(views.to(device), centres.to(device))
            for views, centres in zip(features, positions, strict=True)
        ]
        return torch.cat(embeddings).flatten(0, 1)

    def output_features(self, states: Tensor) -> Tensor:
        """States at image words [n, 64, D] → features [n, 64, K]."""
        features: Tensor = self.output_resampler(
            states.to(next(self.output_resampler.parameters()))
        )
        return features

    def _read(self, features: Tensor, positions: Tensor | None) -> Tensor:
        read: Tensor = self.input_resampler(features.to(next(self.input_resampler.parameters())))
        if not self.settings.add_patch_pos:
            return read
        assert positions is not None
        return read + position_features(positions, self.patch_pos_embed)[:, None].to(read)


def _chosen(values: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The rows of `mask`; None where it has none."""
    if values is None or mask is None or not bool(mask.any()):
        return None
    return values[mask.to(values.device)]


# ---- weights


LLM = "llm."
_WRAPPERS = ("module.", "_orig_mod.")
_POSITIONS = (
    "*_resampler.pos_embed"  # fixed sines, which an export of the trained tensors leaves out
)
_FROZEN = (f"{LLM}*.base_layer.*", f"{LLM}*.original_module.*")  # of a LoRA


def load_agent(model: nn.Module, source: str | Path, *, language: bool = True) -> LoadReport:
    """Put the weights of a file or folder (also what DeepSpeed's `zero_to_fp32.py` writes) into a `ContinuousLVLM`.

    Resamplers and `patch_pos_embed` must be complete: the original files hold these 23 tensors alone. Tensors of the
    language model (left out without `language`), and the frozen base of a LoRA, must be complete or absent. peft before
    0.7 wrote a layer's frozen weight as `q_proj.weight`, later `q_proj.base_layer.weight`.

    Raises:
        CheckpointError: tensors that are missing, unknown, or of another size; damaged or unsafe files.
    """
    expected, state = model.state_dict(), {}
    for name, value in load_checkpoint(source).items():
        while name.startswith(_WRAPPERS):
            name = name.partition(".")[2]
        if language or not name.startswith(LLM):
            stem, _, last = name.rpartition(".")
            newer = f"{stem}.base_layer.{last}"
            state[newer if name not in expected and newer in expected else name] = value
    state |= {
        name: state[other]
        for name, other in _tied(expected).items()
        if other in state and name not in state
    }
    families = (
        [*_FROZEN, _POSITIONS]
        if any(name.startswith(LLM) for name in state)
        else [f"{LLM}*", _POSITIONS]
    )
    absent = [family for family in families if not fnmatch.filter(state, family)]
    return assign_strictly(model, state, source, allow_missing=absent, allow_unexpected=[ROTARY])


def _tied(expected: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are others' (a head tied to the embeddings), which a file holds once."""
    first: dict[tuple[int, ...], str] = {}
    return {
        name: other
        for name, value in expected.items()
        if (other := first.setdefault((value.data_ptr(), *value.shape), name)) != name
        and value.data_ptr()
    }
