"""Sizes of a SEED-2 tokenizer: the defaults are the released model, anything smaller is the same code.

Written as `config.json` beside our weights; `infer` reads the sizes off a checkpoint without one, except the numbers
of attention heads, which no tensor shows: those are known for the released widths only.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.vision.eva import EvaConfig

MODEL_TYPE = "seed2_tokenizer"
RELEASED_VIT_FILE_DEPTH = 40
_RELEASED_HEADS = {"vit": {1408: 16}, "qformer": {768: 12}}


@dataclass(frozen=True)
class Seed2Config:
    """All sizes; `use_qformer_image` picks the decode head (False: `image_down`, True: Reverse Q-Former).

    `recon_s`: keep `pos_embed`/`blocks`, which only stage 2's reconstruction loss uses (released: kept).
    `normalize_codes` and `codebook_sections` are ours: codes compared and decoded on the unit sphere (released: off);
    each of the `num_query` positions chooses from its own part of the codebook (released: 1, all from all).
    """

    vit: EvaConfig = field(default_factory=EvaConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    num_query: int = 32
    codebook_size: int = 8192
    codebook_dim: int = 32
    decode_depth: int = 4
    decode_heads: int = 12
    image_features_dim: int = 1024
    use_qformer_image: bool = False
    reverse_depth: int = 12
    recon_s: bool = True
    normalize_codes: bool = False
    codebook_sections: int = 1

    def __post_init__(self) -> None:
        if self.codebook_sections not in (1, self.num_query):
            raise ConfigError(f"codebook_sections must be 1 or num_query ({self.num_query}), "
                              f"got {self.codebook_sections}.")

    @property
    def reverse_qformer(self) -> QFormerConfig:
        """The Reverse Q-Former differs from the Q-Former in depth only."""
        return dataclasses.replace(self.qformer, depth=self.reverse_depth)

    def with_image_size(self, size: int) -> Seed2Config:
        """The same tokenizer for images of another size (the position table must be resized with it)."""
        return dataclasses.replace(self, vit=dataclasses.replace(self.vit, image_size=size))

    def to_dict(self) -> dict[str, object]:
        """Plain values for `config.json`."""
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object], source: str | Path = "the tokenizer's config") -> Seed2Config:
        """Inverse of `to_dict`; an unknown key is a `ConfigError` that names the nearest known one."""
        values = dict(values)
        if values.pop("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise ConfigError(f"{source}: this is not the configuration of a SEED-2 tokenizer.")
        parts = {"vit": EvaConfig, "qformer": QFormerConfig}
        for name, part in parts.items():
            inner = values.get(name, {})
            if not isinstance(inner, Mapping):
                raise ConfigError(f"{source}: {name!r} must hold a mapping of sizes.")
            values[name] = _build(part, inner, f"{source}: in {name!r}")
        return _build(cls, values, source)

    @classmethod
    def read(cls, file: Path) -> Seed2Config:
        """Read `config.json`; raises `ConfigError` when it is damaged or describes another model."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: not a readable JSON file ({error}).") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: holds a {type(values).__name__}, not a mapping of sizes.")
        return cls.from_dict(values, file)

    @classmethod
    def infer(cls, state: Mapping[str, Tensor], source: str | Path) -> Seed2Config:
        """Sizes from the shapes in a flat checkpoint that holds `visual_encoder.*` too.

        A tower of 40 blocks is the released file, of which 39 are used. `image_down` decides the decode head even
        when `Reverse_Qformer` keys are present, because the released file may carry those of a training-only branch.

        Raises:
            CheckpointError: a tensor that shows a size is missing, or the heads are not known for a width.
        """
        shape = _Shapes(state, source)
        width, num_query = shape("query_tokens")[2], shape("query_tokens")[1]
        layer = "Qformer.bert.encoder.layer"
        qformer = QFormerConfig(
            width=width, depth=_count(state, layer), heads=_heads("qformer", width, source),
            mlp_width=shape(f"{layer}.0.intermediate_query.dense.weight")[0],
            cross_attention_freq=_cross_freq(state),
            max_positions=state["Qformer.bert.embeddings.position_ids"].shape[1]
            if "Qformer.bert.embeddings.position_ids" in state else QFormerConfig.max_positions)
        reverse = "image_down.0.weight" not in state
        codebook = shape("quantize.embedding.weight")
        return cls(
            vit=_infer_vit(state, shape, source), qformer=qformer, num_query=num_query,
            codebook_size=codebook[0], codebook_dim=codebook[1], decode_depth=_count(state, "blocks_image"),
            recon_s=_count(state, "blocks") > 0, use_qformer_image=reverse,
            image_features_dim=shape("distill_image_proj.weight")[0],
            reverse_depth=_count(state, "Reverse_Qformer.bert.encoder.layer") if reverse else cls.reverse_depth)


class _Shapes:
    """Shape of a named tensor, or a sentence that says which one is missing."""

    def __init__(self, state: Mapping[str, Tensor], source: str | Path) -> None:
        self.state, self.source = state, source

    def __call__(self, name: str) -> tuple[int, ...]:
        if name not in self.state:
            raise CheckpointError(f"{self.source}: not a SEED-2 tokenizer: it holds no {name!r} "
                                  f"(its first tensor is {next(iter(self.state), 'none')!r}).")
        return tuple(self.state[name].shape)


def _infer_vit(state: Mapping[str, Tensor], shape: _Shapes, source: str | Path) -> EvaConfig:
    width, _, patch, _ = shape("visual_encoder.patch_embed.proj.weight")
    depth = _count(state, "visual_encoder.blocks")
    if depth == RELEASED_VIT_FILE_DEPTH:
        depth -= 1
    grid = round((shape("visual_encoder.pos_embed")[1] - 1) ** 0.5)
    return EvaConfig(image_size=grid * patch, patch_size=patch, width=width, depth=depth,
                     heads=_heads("vit", width, source), mlp_width=shape("visual_encoder.blocks.0.mlp.fc1.weight")[0])


def _heads(part: str, width: int, source: str | Path) -> int:
    known = _RELEASED_HEADS[part]
    if width not in known:
        raise CheckpointError(
            f"{source}: weights do not show the number of attention heads, and the {part} width {width} is not the "
            f"released one ({next(iter(known))}): give config=Seed2Config(...) or put a config.json beside the file.")
    return known[width]


def _count(names: Iterable[str], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(found[1]) for found in map(pattern.match, names) if found), default=-1)


def _cross_freq(names: Iterable[str]) -> int:
    pattern = re.compile(r"Qformer\.bert\.encoder\.layer\.(\d+)\.crossattention\.")
    layers = sorted({int(found[1]) for found in map(pattern.match, names) if found})
    return layers[1] - layers[0] if len(layers) > 1 else QFormerConfig.cross_attention_freq


def _build(kind: type[Any], values: Mapping[str, object], source: str | Path) -> Any:
    known = [item.name for item in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"{source}: unknown setting {name!r}" + (f", did you mean {near[0]!r}?" if near else "."))
    return kind(**values)
