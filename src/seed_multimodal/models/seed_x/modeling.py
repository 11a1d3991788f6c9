"""`ContinuousLVLM`, SEED-X's "agent": a stock LLaMA that reads and outputs image features.

    input    features [256, 4096] ─► input resampler + position of the view ─► 64 embeddings
             tokens ─► embeddings
    output   states ─► tokens
             states at 64 image tokens ─► output resampler ─► features [64, 4096]

Training: cross-entropy of tokens, and the distance of output features to those of the image,
averaged over 4 neighbours. The states are those AT the image tokens, after the final norm, not
those that predict them. Both resamplers run in every step, with weight zero if the batch has no
image for them, so that all processes compute gradients of the same parameters and ZeRO-3 gathers
them in the same order.

Source: SEED-X (arXiv 2404.14396) and its code (`seed_x.py`); parameter names are the original ones.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from seed_multimodal.errors import DataError
from seed_multimodal.language.llama import ROTARY
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.models.seed_x.vision import Resampler, position_features
from seed_multimodal.settings import setting
from seed_multimodal.weights import LoadReport, assign_strictly, load_checkpoint

if TYPE_CHECKING:
    from seed_multimodal.language.llm import LanguageModel

POOLED = 4  # neighbours that are averaged to one target


@dataclass(frozen=True)
class AgentSettings:
    """Losses and positions; the defaults are the original ones."""

    lm_loss_scale: float = setting(1.0, minimum=0)  # weight of the tokens' loss
    rec_loss_scale: float = setting(6.0, minimum=0)  # weight of the features' loss
    add_patch_pos: bool = True  # whether views have positions
    vit_down: bool = True  # whether targets are averaged over `POOLED` neighbours
    mse: bool = True  # squared distance; False: 1 - cosine


class ContinuousLVLM(nn.Module):
    """The language model with its two resamplers.

    llm: a stock `LlamaForCausalLM`, or one with a LoRA; its width is D.
    input_resampler: features [B, N, K] → embeddings [B, 64, D].
    output_resampler: states [B, 64, D] → features [B, 64, K].
    """

    def __init__(
        self,
        llm: LanguageModel,
        input_resampler: Resampler,
        output_resampler: Resampler,
        settings: AgentSettings | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings or AgentSettings()
        self.llm = llm
        self.input_resampler = input_resampler
        self.output_resampler = output_resampler
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
        """A batch → `total_loss`, `lm_loss`, `rec_loss`; padding is on the right.

        labels: [B, L], -100 is not learned.
        image_embeds: [N, tokens, K], features of the batch's views, in the order of their tokens.
        embeds_cmp_mask, embeds_gen_mask: bool [N], the views that are input and target; those of
            neither are not used.
        ids_cmp_mask, ids_gen_mask: bool [B, L], the image tokens of input and target views.
        patch_positions: [N, 2], centres of the views.
        position_ids: [B, L], of packed sequences.
        """
        # 1. Embeddings of tokens and input views; without views the resampler runs on zeros.
        input_features = _rows_of(image_embeds, embeds_cmp_mask)
        target_features = _rows_of(image_embeds, embeds_gen_mask)
        positions = _rows_of(patch_positions, embeds_cmp_mask)
        embeds = self.embed(input_ids, ids_cmp_mask, input_features, positions)
        if input_features is None:
            config = self.input_resampler.config
            blank = embeds.new_zeros(1, 1, config.kv_dim or config.embed_dim)
            resampled = self._embed_views(blank, embeds.new_zeros(1, 2))
            embeds = embeds + 0.0 * resampled.sum().to(embeds)

        # 2. States of the language model [B, L, D].
        states: Tensor = self.llm.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state

        # 3. Losses; without target views the resampler runs on any state.
        lm_loss = self.language_loss(states, labels)
        if target_features is None:
            rec_loss = 0.0 * self.output_features(states[:1, :1]).float().sum()
        else:
            rec_loss = self.regression_loss(states[ids_gen_mask], target_features)
        total = self.settings.lm_loss_scale * lm_loss + self.settings.rec_loss_scale * rec_loss
        return {"total_loss": total, "lm_loss": lm_loss, "rec_loss": rec_loss}

    def language_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """States and labels [B, L] → cross-entropy of each next token; 0 if none is learned."""
        targets = labels[:, 1:]
        # Logits only where something is learned: in a row of SEED-X a tenth or less.
        is_learned = targets != IGNORE_INDEX
        logits = self.llm.get_output_embeddings()(states[:, :-1][is_learned]).float()
        total = functional.cross_entropy(logits, targets[is_learned], reduction="sum")
        return total / is_learned.sum().clamp(min=1)

    def regression_loss(self, states: Tensor, features: Tensor) -> Tensor:
        """States at image tokens [n · 64, D] and features of the images [n, N, K] → distance."""
        target = features.detach().to(states.device)
        if self.settings.vit_down:
            target = functional.avg_pool1d(target.transpose(1, 2), POOLED, POOLED).transpose(1, 2)
        target = target.float()
        output = self.output_features(states.unflatten(0, (len(features), -1))).float()
        if self.settings.mse:
            return functional.mse_loss(output, target)
        return (1 - functional.cosine_similarity(output, target, dim=-1)).mean()

    # ---- inference

    def embed(
        self,
        ids: Tensor,
        mask: Tensor,
        features: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """Tokens [B, L] → embeddings [B, L, D], with those of views at the image tokens.

        mask: bool [B, L], the image tokens, in the order of the views.
        features: [n, N, K], of views.
        positions: [n, 2], centres of the views.
        """
        embeds: Tensor = self.llm.get_input_embeddings()(ids)
        if features is None:
            return embeds

        # The views' embeddings replace those of the image tokens.
        replacements = self._embed_views(features, positions).flatten(0, 1)  # [n · 64, D]
        n_image_tokens = int(mask.sum())
        if n_image_tokens != len(replacements):
            raise DataError(
                f"The batch has {n_image_tokens} image words for {len(replacements)} embeddings of "
                "its images."
            )
        return embeds.masked_scatter(mask[..., None], replacements.to(embeds))

    def read_images(self, features: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
        """Features `[V, N, K]` and centres `[V, 2]` of each image's views → embeddings `[n, D]`.

        Each image is resampled by itself, so that its embeddings do not depend on the others.
        """
        device = next(self.input_resampler.parameters()).device
        embeddings: list[Tensor] = []
        for image_features, centres in zip(features, positions, strict=True):
            embeddings.append(self._embed_views(image_features.to(device), centres.to(device)))
        return torch.cat(embeddings).flatten(0, 1)

    def output_features(self, states: Tensor) -> Tensor:
        """States at image tokens [n, 64, D] → features [n, 64, K]."""
        weight = next(self.output_resampler.parameters())
        features: Tensor = self.output_resampler(states.to(weight))
        return features

    def _embed_views(self, features: Tensor, positions: Tensor | None) -> Tensor:
        """Features [n, N, K] of views and their centres [n, 2] → embeddings [n, 64, D]."""
        weight = next(self.input_resampler.parameters())
        embeddings: Tensor = self.input_resampler(features.to(weight))
        if not self.settings.add_patch_pos:
            return embeddings
        assert positions is not None
        position_embeddings = position_features(positions, self.patch_pos_embed)[:, None]
        return embeddings + position_embeddings.to(embeddings)


def _rows_of(values: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The rows where the mask is true; None: there are none."""
    if values is None or mask is None or not bool(mask.any()):
        return None
    return values[mask.to(values.device)]


# ---- weights


LLM = "llm."
_WRAPPERS = ("module.", "_orig_mod.")  # of DeepSpeed and torch.compile
# Fixed sines, which an export of the trained tensors omits.
_POSITIONS = "*_resampler.pos_embed"
_LORA_BASE = (f"{LLM}*.base_layer.*", f"{LLM}*.original_module.*")  # frozen


def load_agent(model: nn.Module, source: str | Path, *, language: bool = True) -> LoadReport:
    """Load the weights of a file or folder into a `ContinuousLVLM`.

    Resamplers and `patch_pos_embed` must be complete: the original files hold only these 23
    tensors. Tensors of the language model, and the frozen base of a LoRA, must be complete or
    absent.

    source: also the output of DeepSpeed's `zero_to_fp32.py`.
    language: False ignores tensors of the language model.

    Raises:
        CheckpointError: tensors that are missing, unknown, or of another size; damaged or unsafe
            files.
    """
    # 1. Tensors by the names of the model.
    expected = model.state_dict()
    state: dict[str, Tensor] = {}
    for name, value in load_checkpoint(source).items():
        name = _model_name(name, expected)
        if language or not name.startswith(LLM):
            state[name] = value
    for name, tied_name in _tied(expected).items():
        if tied_name in state and name not in state:
            state[name] = state[tied_name]

    # 2. Groups of tensors that may be missing, but only all of them.
    has_language_model = any(name.startswith(LLM) for name in state)
    groups = [*_LORA_BASE, _POSITIONS] if has_language_model else [f"{LLM}*", _POSITIONS]
    absent = [pattern for pattern in groups if not fnmatch.filter(state, pattern)]
    return assign_strictly(model, state, source, allow_missing=absent, allow_unexpected=[ROTARY])


def _model_name(name: str, expected: Collection[str]) -> str:
    """The model's name of a file's tensor."""
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    # A layer's frozen weight: `q_proj.weight` in files of peft before 0.7.
    stem, _, last = name.rpartition(".")
    peft_name = f"{stem}.base_layer.{last}"
    if name not in expected and peft_name in expected:
        return peft_name
    return name


def _tied(expected: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tied tensors (a head tied to the embeddings) → the name that a file holds."""
    first_names: dict[tuple[int, ...], str] = {}
    tied: dict[str, str] = {}
    for name, value in expected.items():
        address = value.data_ptr()
        first_name = first_names.setdefault((address, *value.shape), name)
        if address and first_name != name:
            tied[name] = first_name
    return tied
