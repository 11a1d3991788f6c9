"""What an export makes of trained stages: a SEED-2 or a SEED-1 tokenizer, told apart by stage 2's decode side.

    seed2    ends in one image embedding; released as seed_quantizer.pt and eva_vit_g.pth
    seed1    ends in 77 text-like embeddings; released as causal_qformer.pth, seed_tokenizer.pth and eva_vit_g.pth

The published training code's checkpoints hold both decode sides: such a file is SEED-2's unless `seed1` is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.tokenizers.checkpoints import QUANTIZER_FILES, TOWER, VISION_FILES, build
from seed_multimodal.tokenizers.codebook_training import CodebookTraining
from seed_multimodal.tokenizers.encoder import ENCODER_PARTS, CodeTokenizer
from seed_multimodal.tokenizers.seed1 import Seed1Config
from seed_multimodal.tokenizers.seed1_loading import QFORMER_FILES, TOKENIZER_FILES, build_seed1, rename_training
from seed_multimodal.tokenizers.seed1_stage2 import Seed1Stage2Model
from seed_multimodal.tokenizers.seed2 import Seed2Config
from seed_multimodal.tokenizers.stage2 import Stage2Model
from seed_multimodal.tokenizers.tokenizer_config import TokenizerConfig

AUTO = "auto"
CODEBOOK = "quantize.embedding.weight"
State = dict[str, Tensor]


@dataclass(frozen=True)
class ExportKind:
    """One kind of tokenizer.

    Attributes:
        head: a tensor that stage 2 of this kind holds.
        build: (config, tensors, tower's tensors, source, tower's source) → the filled tokenizer.
        rename: a stage-2 checkpoint → its tensors by their released names, and the names left out.
        released: file of the released layout → whether it holds the tensor of a name; `main` is the one to open.
        wrapped: released files hold `{"model": tensors}` (the tower's never does).
    """

    name: str
    flag: str
    head: str
    config: type[TokenizerConfig]
    stage2: type[CodebookTraining]
    build: Callable[..., CodeTokenizer]
    rename: Callable[[Mapping[str, Tensor]], tuple[State, list[str]]]
    released: Mapping[str, Callable[[str], bool]]
    main: str
    wrapped: bool

    def release(self, state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """A tokenizer's tensors → the content of each released file."""
        files: dict[str, dict[str, Any]] = {}
        for file, belongs in self.released.items():
            tensors = {name.removeprefix(TOWER): value.clone() for name, value in state.items() if belongs(name)}
            files[file] = {"model": tensors} if self.wrapped and file not in VISION_FILES else tensors
        return files


def _is_tower(name: str) -> bool:
    return name.startswith(TOWER)


def _is_encoder(name: str) -> bool:
    return name.split(".")[0] in ENCODER_PARTS and not _is_tower(name)


SEED2 = ExportKind(
    "SEED-2", "seed2", "distill_image_proj.weight", Seed2Config, Stage2Model, build, lambda state: (dict(state), []),
    {QUANTIZER_FILES[-1]: lambda name: not _is_tower(name), VISION_FILES[-1]: _is_tower}, QUANTIZER_FILES[-1], False)
SEED1 = ExportKind(
    "SEED-1", "seed1", "distill_text_proj.weight", Seed1Config, Seed1Stage2Model, build_seed1, rename_training,
    {QFORMER_FILES[-1]: _is_encoder, TOKENIZER_FILES[-1]: lambda name: not _is_encoder(name) and not _is_tower(name),
     VISION_FILES[-1]: _is_tower}, TOKENIZER_FILES[-1], True)
KINDS = {kind.flag: kind for kind in (SEED2, SEED1)}


def choose_kind(asked: str, state: Mapping[str, Tensor], file: Path) -> ExportKind:
    """The kind of a stage-2 checkpoint.

    Args:
        asked: `auto`, or the flag of a kind, which the checkpoint must then hold.

    Raises:
        ConfigError: no such kind. CheckpointError: the checkpoint is another kind's.
    """
    if asked == AUTO:
        return SEED1 if SEED1.head in state and SEED2.head not in state else SEED2
    if asked not in KINDS:
        raise ConfigError(f"Unknown kind of tokenizer {asked!r}: use {', '.join((AUTO, *KINDS))}.")
    kind, other = KINDS[asked], next(kind for flag, kind in KINDS.items() if flag != asked)
    if kind.head not in state and other.head in state:
        raise CheckpointError(f"{file}: stage 2 of {other.name} (it holds {other.head!r}, not {kind.head!r}); export "
                              f"it as {other.flag} or {AUTO}.")
    return kind
