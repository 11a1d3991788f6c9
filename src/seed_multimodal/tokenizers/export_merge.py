"""Which tensor of an exported tokenizer comes from which file: each part from the latest stage that trained it.

Stage 2's decode side decides the kind: a SEED-2 tokenizer (it ends in one image embedding) or a SEED-1 tokenizer (77
text-like embeddings). The published training code's checkpoints hold both decode sides: such a file is SEED-2's unless
`seed1` is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.tokenizers.checkpoints import State, our_config
from seed_multimodal.tokenizers.encoder import CodeTokenizer
from seed_multimodal.tokenizers.initial import tower_tensors
from seed_multimodal.tokenizers.released import ENCODER_PARTS, TOWER, VISION_URL
from seed_multimodal.tokenizers.seed1_stage2 import Seed1Stage2Model
from seed_multimodal.tokenizers.stage2 import Stage2Model
from seed_multimodal.tokenizers.stage2_base import Stage2Base
from seed_multimodal.tokenizers.tokenizer_config import TokenizerConfig
from seed_multimodal.weights import load_state_dict

AUTO = "auto"
CODEBOOK = "quantize.embedding.weight"
KINDS: dict[str, type[Stage2Base]] = {"seed2": Stage2Model, "seed1": Seed1Stage2Model}


@dataclass
class Merged:
    """Tensors of the tokenizer without its tower, the tower, and where each name came from.

    Attributes:
        kind: a key of `KINDS`. sizes: as given, from our config.json beside a file, or read off the tensors.
        files: the names each file holds; `left_out`: names of the stage-2 file that another decode side owns.
    """

    kind: str
    sizes: TokenizerConfig
    state: State
    tower: State
    origin: dict[str, str]
    files: dict[str, list[str]]
    left_out: dict[str, list[str]]
    tower_file: Path

    @property
    def stage2(self) -> type[Stage2Base]:
        """The training module of stage 2."""
        return KINDS[self.kind]

    @property
    def tokenizer(self) -> type[CodeTokenizer]:
        """The tokenizer's class."""
        return self.stage2.tokenizer_class


def part_of(name: str) -> str:
    """The first part of a tensor's name."""
    return name.split(".")[0]


def choose_kind(asked: str, state: Mapping[str, Tensor], file: Path) -> str:
    """The kind of a stage-2 checkpoint.

    Args:
        asked: `auto`, or a kind, which the checkpoint must then hold.

    Raises:
        ConfigError: no such kind. CheckpointError: the checkpoint is another kind's.
    """
    layouts = {kind: stage2.tokenizer_class.layout for kind, stage2 in KINDS.items()}
    held = [kind for kind, layout in layouts.items() if layout.needed[0] in state]
    if asked == AUTO:
        return next(iter(held or KINDS))
    if asked not in KINDS:
        raise ConfigError(f"Unknown kind of tokenizer {asked!r}: use {', '.join((AUTO, *KINDS))}.")
    if held and asked not in held:
        raise CheckpointError(f"{file}: stage 2 of {layouts[held[0]].name} (it holds {layouts[held[0]].needed[0]!r}, "
                              f"not {layouts[asked].needed[0]!r}); export it as {held[0]} or {AUTO}.")
    return asked


def merge(stage1: Path | None, stage2: Path, vision: Path | None, asked: str,
          config: TokenizerConfig | str | Path | None = None) -> Merged:
    """Read the stages and the tower, in float32.

    Args:
        vision: as `tower_tensors` takes it. asked: see `choose_kind`. config: sizes, or a config.json.

    Raises:
        CheckpointError: not the stages they should be, a part that no file holds, another tower than was trained, or no
            tensor shows a size. ConfigError: sizes of the other kind of tokenizer.
    """
    late = load_state_dict(stage2)
    early = load_state_dict(stage1) if stage1 is not None else {}
    if CODEBOOK not in late:
        advice = "; the two stages were swapped." if CODEBOOK in early else "."
        raise CheckpointError(f"{stage2}: not a stage-2 checkpoint: it holds no {CODEBOOK!r} (its first "
                              f"tensor is {next(iter(late))!r}){advice}")
    kind = choose_kind(asked, late, stage2)
    tokenizer = KINDS[kind].tokenizer_class
    sizes = known_sizes(config, tokenizer.config_class, [file for file in (stage2, stage1) if file is not None])
    late, left_out = tokenizer.released_names(late)
    # Buffers are always saved, so a lone position_ids does not mean that stage 2 holds the Q-Former.
    trained = {part_of(name) for name in late if not name.endswith("position_ids")} & set(ENCODER_PARTS)
    state, origin = {}, {}
    for file, tensors in ((stage1, early), (stage2, late)):
        for name, value in tensors.items():
            part = part_of(name)
            if part not in ENCODER_PARTS or (part in trained) == (file == stage2):
                state[name], origin[name] = _float(value), str(file)
    for part in ENCODER_PARTS[1:]:
        if not any(part_of(name) == part for name in state):
            where = f"neither {stage2.name} nor {stage1.name} holds" if stage1 else f"{stage2.name} does not hold"
            raise CheckpointError(f"{stage2}: {where} {part!r}; give the stage-1 checkpoint that stage 2 started from.")
    files = {str(file): list(tensors) for file, tensors in ((stage1, early), (stage2, late)) if file is not None}
    tower = {name.removeprefix(TOWER): value for name, value in state.items() if name.startswith(TOWER)}
    state = {name: value for name, value in state.items() if not name.startswith(TOWER)}
    holder = Path(next((file for name, file in origin.items() if name.startswith(TOWER)), ""))
    if vision is None and not tower:
        raise CheckpointError(f"{stage2}: no stage holds the frozen vision tower; download it from {VISION_URL} and "
                              "give it as the vision file.")
    if vision is not None:
        shape = None if sizes is None else sizes.vit
        given = {name: _float(value) for name, value in tower_tensors(vision, shape).items()}
        _same_tower(tower, given, holder, vision)
        if not tower:
            tower, holder = given, vision
            origin |= dict.fromkeys((TOWER + name for name in tower), str(vision))
        files[str(vision)] = [TOWER + name for name in given]
    if sizes is None:
        whole = {**state, **{TOWER + name: value for name, value in tower.items()}}
        sizes = tokenizer.config_class.infer(whole, stage2)
    return Merged(kind, sizes, state, tower, origin, files, {str(stage2): left_out}, holder)


def known_sizes(config: TokenizerConfig | str | Path | None, kind: type[TokenizerConfig],
                files: Sequence[Path]) -> TokenizerConfig | None:
    """The tokenizer's sizes as given, or from our config.json beside one of the `files`; None: neither.

    Raises:
        ConfigError: of the other kind of tokenizer.
    """
    if isinstance(config, TokenizerConfig):
        if not isinstance(config, kind):
            raise ConfigError(f"The sizes given are a {config.name} tokenizer's, {files[0]} is a {kind.name} one's.")
        return config
    beside = (found for file in files if (found := our_config(file.parent, kind.model_type)) is not None)
    file = Path(config) if config is not None else next(beside, None)
    return None if file is None else kind.read(file)


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _same_tower(trained: Mapping[str, Tensor], given: Mapping[str, Tensor], holder: Path, vision: Path) -> None:
    """Refuse a vision file that is not the tower a stage was trained with."""
    for name, value in trained.items():
        if name not in given or given[name].shape != value.shape or not torch.equal(given[name], value):
            raise CheckpointError(f"{vision}: not the vision tower that {holder} was trained with (first other tensor: "
                                  f"{name!r}); that file holds its own, so leave the vision file out.")
