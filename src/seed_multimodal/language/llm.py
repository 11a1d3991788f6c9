"""`LanguageModel`: what we use of a causal language model of transformers.

`LlamaForCausalLM` fulfils it, and so does any other model of `AutoModelForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import GenerationConfig


class LanguageModelConfig(Protocol):
    """Sizes of a language model."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`."""


class LanguageModel(Protocol):
    """A causal language model: token embeddings, a decoder, and a head of scores."""

    config: LanguageModelConfig
    generation_config: GenerationConfig
    name_or_path: str  # the folder or hub name it was loaded from

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    # ---- parts

    def get_input_embeddings(self) -> nn.Module:
        """Ids → embeddings `[B, L, D]`."""

    def get_decoder(self) -> nn.Module:
        """The layers: embeddings or ids → `last_hidden_state` `[B, L, D]`, after the final norm."""

    def get_output_embeddings(self) -> nn.Module:
        """The head: states `[…, D]` → scores `[…, V]`."""

    def resize_token_embeddings(self, new_num_tokens: int, *, mean_resizing: bool) -> nn.Module:
        """Change the rows of both embeddings."""

    # ---- computation

    def __call__(self, input_ids: Tensor, *, use_cache: bool) -> Any:
        """Ids `[B, L]` → an output with `logits` `[B, L, V]`."""

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **generation_config: Any,
    ) -> Tensor:
        """Generated ids `[B, n]`; with `inputs` after these."""

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Choose the attention kernels ("sdpa", "flash_attention_2", …)."""

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Recompute the layers in the backward pass."""

    # ---- as of `nn.Module` and `PreTrainedModel`

    def to(self, *args: Any) -> Self: ...

    def eval(self) -> Self: ...

    def train(self, mode: bool = True) -> Self: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(
        self, *, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def save_pretrained(
        self, save_directory: str | Path, *, max_shard_size: str | int = "50GB"
    ) -> None: ...
