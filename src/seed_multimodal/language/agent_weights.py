"""Weights of `ContinuousLVLM` from a checkpoint, strict by family of tensors.

    resamplers, patch_pos_embed    all of them must be there: the released files hold these 23 tensors alone
    llm.*                          none (the language model is loaded apart), or all that belong to it
    frozen base of a LoRA          none (DeepSpeed's export of the trained tensors alone), or all

Read are `.bin` and safetensors files, folders with one or several, and what DeepSpeed's `zero_to_fp32.py` writes (a
file, or a folder of shards). Note: peft before 0.7 named a layer's frozen weight `q_proj.weight`, later
`q_proj.base_layer.weight`. The released loader left out whatever did not fit, without an error.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from seed_multimodal.errors import CheckpointError
from seed_multimodal.language.adapters import PREFIX
from seed_multimodal.language.llama import ROTARY
from seed_multimodal.language.shards import Shards
from seed_multimodal.weights import LoadReport, assign_strictly

LLM = "llm."
_OUTER = ("module.", "_orig_mod.")
_POSITIONS = "*_resampler.pos_embed"  # fixed sines, which an export of the trained tensors leaves out
_FROZEN = (f"{LLM}*.base_layer.*", f"{LLM}*.original_module.*")  # of a LoRA


def load_agent(model: nn.Module, source: str | Path, *, language: bool = True) -> LoadReport:
    """Put the weights of a file or folder into a `ContinuousLVLM`.

    Args:
        language: those of a language model, too, if there are any.

    Raises:
        CheckpointError: tensors that are missing from a family, unknown, or of another size (one sentence names the
            first), damaged or unsafe files, a LoRA where the language model has none, or the other way round.
    """
    shards = Shards(source)
    own = model.state_dict()
    there = {_plain(name): name for name in shards.entries if language or not _plain(name).startswith(LLM)}
    spoken = [name for name in there if name.startswith(LLM)]
    _check_kind(spoken, own, source)
    state = {_current(name, own): shards.read(there[name]) for name in there}
    state |= {name: state[other] for name, other in _tied(own).items() if other in state and name not in state}
    families = [*_FROZEN, _POSITIONS] if spoken else [f"{LLM}*", _POSITIONS]
    absent = [family for family in families if not fnmatch.filter(state, family)]
    report = assign_strictly(model, state, source, allow_missing=absent, allow_unexpected=[ROTARY])
    shards.close()
    return report


def _tied(own: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are others' (a head tied to the embeddings), which a file holds once."""
    first: dict[tuple[int, ...], str] = {}
    return {name: other for name, value in own.items()
            if (other := first.setdefault((value.data_ptr(), *value.shape), name)) != name and value.data_ptr()}


def _plain(name: str) -> str:
    while name.startswith(_OUTER):
        name = name.removeprefix(next(outer for outer in _OUTER if name.startswith(outer)))
    return name


def _check_kind(language: list[str], own: Iterable[str], source: str | Path) -> None:
    """Refuse a LoRA's tensors for a plain language model, and a plain one's for a model with a LoRA."""
    if not language:
        return
    tuned, wants = (any(name.startswith(LLM + PREFIX) for name in names) for names in (language, own))
    if tuned and not wants:
        raise CheckpointError(f"{source}: holds a language model with a LoRA, but this one has none; load it with the "
                              f"LoRA that it was trained with, or merge it first.")
    if wants and not tuned:
        raise CheckpointError(f"{source}: holds a language model without a LoRA, but this one has one.")


def _current(name: str, own: Container[str]) -> str:
    """The name as the installed peft gives it."""
    stem, _, last = name.rpartition(".")
    newer = f"{stem}.base_layer.{last}"
    return newer if name not in own and newer in own else name
