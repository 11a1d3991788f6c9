"""Sizes of a SEED-1 tokenizer: the defaults are the released model, anything smaller is the same code.

Written as `config.json` beside our weights; `infer` reads the sizes off a checkpoint of released width without one.
What the original decided by magic numbers stands here: the Q-Former is causal at `qformer.causal_queries` queries, the
Reverse Q-Former never is, and its depth is `reverse_depth`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from seed_multimodal.config import check_keys
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.vision.eva import EvaConfig

MODEL_TYPE = "seed1_tokenizer"
QUERY_LAYERS, REVERSE_LAYERS = "Qformer.bert.encoder.layer", "Reverse_Qformer.bert.encoder.layer"
_RELEASED_WIDTHS = {"vision": EvaConfig.width, "Q-Former": QFormerConfig.width}
_RELEASED_VIT_FILE_DEPTH = 40


@dataclass(frozen=True)
class Seed1Config:
    """All sizes: `text_tokens` embeddings of `text_features_dim` come out (77 of 768: what SD 1's text encoder gives).

    `normalize_codes` and `codebook_sections` are ours, as in `Seed2Config`: codes on the unit sphere (released: off),
    a part of the codebook for each position (released: 1, all from all).
    """

    vit: EvaConfig = field(default_factory=EvaConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    num_query: int = 32
    codebook_size: int = 8192
    codebook_dim: int = 32
    decode_depth: int = 4
    decode_heads: int = 12
    reverse_depth: int = 4
    text_tokens: int = 77
    text_features_dim: int = 768
    normalize_codes: bool = False
    codebook_sections: int = 1

    def __post_init__(self) -> None:
        if self.codebook_sections not in (1, self.num_query):
            raise ConfigError(f"codebook_sections must be 1 or num_query ({self.num_query}), "
                              f"got {self.codebook_sections}.")

    @property
    def reverse_qformer(self) -> QFormerConfig:
        """The Reverse Q-Former: as the Q-Former, but shallower and with full attention among its queries."""
        return dataclasses.replace(self.qformer, depth=self.reverse_depth, causal_queries=0)

    def with_image_size(self, size: int) -> Seed1Config:
        """The same tokenizer for images of another size (the position table must be resized with it)."""
        return dataclasses.replace(self, vit=dataclasses.replace(self.vit, image_size=size))

    def to_dict(self) -> dict[str, object]:
        """Plain values for `config.json`."""
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str | Path = "the tokenizer's config") -> Seed1Config:
        """Inverse of `to_dict`; an unknown key is a `ConfigError` that names the nearest known one."""
        values = dict(values)
        if values.pop("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise ConfigError(f"{source}: this is not the configuration of a SEED-1 tokenizer.")
        for name, part in (("vit", EvaConfig), ("qformer", QFormerConfig)):
            inner = values.get(name, {})
            if not isinstance(inner, Mapping):
                raise ConfigError(f"{source}: {name!r} must hold a mapping of sizes.")
            values[name] = _build(part, inner, f"{source}: in {name!r}")
        return _build(cls, values, source)

    @classmethod
    def read(cls, file: Path) -> Seed1Config:
        """Read `config.json`; raises `ConfigError` when it is damaged or describes another model."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: not a readable JSON file ({error}).") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: holds a {type(values).__name__}, not a mapping of sizes.")
        return cls.from_dict(values, file)

    @classmethod
    def infer(cls, state: Mapping[str, Tensor], source: str | Path) -> Seed1Config:
        """Sizes from the shapes in a flat checkpoint that holds `visual_encoder.*` too.

        Raises:
            CheckpointError: a tensor that shows a size is missing, or a width is not the released one (weights do not
                show the number of attention heads).
        """
        shape = _Shapes(state, source)
        vit_width, _, patch, _ = shape("visual_encoder.patch_embed.proj.weight")
        _, num_query, width = shape("query_tokens")
        _check_widths({"vision": vit_width, "Q-Former": width}, source)
        grid = round((shape("visual_encoder.pos_embed")[1] - 1) ** 0.5)
        vit = EvaConfig(
            image_size=grid * patch, patch_size=patch, width=vit_width, depth=_vit_depth(state),
            mlp_width=shape("visual_encoder.blocks.0.mlp.fc1.weight")[0])
        positions = state.get("Qformer.bert.embeddings.position_ids")
        qformer = QFormerConfig(
            width=width, depth=_count(state, QUERY_LAYERS), cross_attention_freq=_cross_freq(state),
            mlp_width=shape(f"{QUERY_LAYERS}.0.intermediate_query.dense.weight")[0],
            max_positions=QFormerConfig.max_positions if positions is None else positions.shape[1])
        codebook = shape("quantize.embedding.weight")
        return cls(vit=vit, qformer=qformer, num_query=num_query, codebook_size=codebook[0], codebook_dim=codebook[1],
                   decode_depth=_count(state, "blocks_text"), reverse_depth=_count(state, REVERSE_LAYERS),
                   text_tokens=shape("reverse_tokens")[1], text_features_dim=shape("distill_text_proj.weight")[0])


class _Shapes:
    """Shape of a named tensor, or a sentence that says which one is missing."""

    def __init__(self, state: Mapping[str, Tensor], source: str | Path) -> None:
        self.state, self.source = state, source

    def __call__(self, name: str) -> tuple[int, ...]:
        if name not in self.state:
            raise CheckpointError(f"{self.source}: not a complete SEED-1 tokenizer: it holds no {name!r} "
                                  f"(its first tensor is {next(iter(self.state), 'none')!r}).")
        return tuple(self.state[name].shape)


def _check_widths(widths: Mapping[str, int], source: str | Path) -> None:
    for part, width in widths.items():
        if width != _RELEASED_WIDTHS[part]:
            raise CheckpointError(
                f"{source}: weights do not show the number of attention heads, and the {part} width {width} is not "
                f"the released one ({_RELEASED_WIDTHS[part]}): give config=Seed1Config(...) or put a config.json "
                f"beside the file.")


def _vit_depth(names: Iterable[str]) -> int:
    """Blocks in use: the released tower's file holds 40, of which the models read the first 39."""
    depth = _count(names, "visual_encoder.blocks")
    return depth - 1 if depth == _RELEASED_VIT_FILE_DEPTH else depth


def _count(names: Iterable[str], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(found[1]) for found in map(pattern.match, names) if found), default=-1)


def _cross_freq(names: Iterable[str]) -> int:
    pattern = re.compile(re.escape(QUERY_LAYERS) + r"\.(\d+)\.crossattention\.")
    layers = sorted({int(found[1]) for found in map(pattern.match, names) if found})
    return layers[1] - layers[0] if len(layers) > 1 else QFormerConfig.cross_attention_freq


def _build(kind: type[Any], values: Mapping[str, Any], where: str | Path) -> Any:
    check_keys(values, [item.name for item in dataclasses.fields(kind)], str(where))
    return kind(**values)
