"""`ContinuousLVLM`, SEED-X's "agent": a stock LLaMA that reads and outputs image features.

    input    features [256, 4096] ─► input resampler + position of the view ─► 64 embeddings
             tokens ─► embeddings
    output   states ─► tokens
             states at 64 image tokens ─► output resampler ─► features [64, 4096]

The states are those AT the image tokens, after the final norm, not those that predict them.
Training is in `losses`.

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

from seed_multimodal.errors import DataError
from seed_multimodal.language.llm import ROTARY
from seed_multimodal.nn.vision.qwen import Resampler, position_features
from seed_multimodal.settings import non_negative
from seed_multimodal.state_dicts import LoadReport, assign_strictly, load_checkpoint

if TYPE_CHECKING:
    from seed_multimodal.language.llm import LanguageModel


@dataclass(frozen=True)
class AgentSettings:
    """Losses and positions; the defaults are the original ones."""

    lm_loss_scale: float = non_negative(1.0)  # weight of the tokens' loss
    rec_loss_scale: float = non_negative(6.0)  # weight of the features' loss
    add_patch_pos: bool = True  # whether views have positions
    vit_down: bool = True  # whether targets are averaged over 4 neighbours
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

    def embed(
        self, ids: Tensor, mask: Tensor, features: Tensor | None, positions: Tensor | None
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
                f"The batch has {n_image_tokens} image tokens for {len(replacements)} rows of "
                "its images."
            )
        return embeds.masked_scatter(mask[..., None], replacements.to(embeds))

    def read_images(self, features: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
        """Features `[V, N, K]` and centres `[V, 2]` of each image's views → embeddings `[n, D]`.

        Each image is resampled by itself, so that its embeddings do not depend on the others.
        """
        device = next(self.input_resampler.parameters()).device
        embeddings = [
            self._embed_views(image_features.to(device), centres.to(device))
            for image_features, centres in zip(features, positions, strict=True)
        ]
        return torch.cat(embeddings).flatten(0, 1)

    def output_features(self, states: Tensor) -> Tensor:
        """States at image tokens [n, 64, D] → features [n, 64, K]."""
        weight = next(self.output_resampler.parameters())
        return self.output_resampler(states.to(weight))

    def _embed_views(self, features: Tensor, positions: Tensor | None) -> Tensor:
        """Features [n, N, K] of views and their centres [n, 2] → embeddings [n, 64, D]."""
        weight = next(self.input_resampler.parameters())
        embeddings: Tensor = self.input_resampler(features.to(weight))
        if not self.settings.add_patch_pos:
            return embeddings
        assert positions is not None
        position_embeddings = position_features(positions, self.patch_pos_embed)[:, None]
        return embeddings + position_embeddings.to(embeddings)


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
