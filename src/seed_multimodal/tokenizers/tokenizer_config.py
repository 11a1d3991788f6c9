"""Base of the tokenizers' configurations: sizes, `config.json`, and reading sizes off a checkpoint without one.

A tensor's shape shows every size but the number of attention heads, which is known for the released widths only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.nn.eva import EvaConfig
from seed_multimodal.settings import read_settings, setting
from seed_multimodal.tokenizers.qformer import QFormerConfig

QUERY_LAYERS = "Qformer.bert.encoder.layer"
REVERSE_LAYERS = f"Reverse_{QUERY_LAYERS}"
RELEASED_VIT_FILE_DEPTH = 40
_RELEASED_HEADS = {"vit": {1408: 16}, "qformer": {768: 12}}


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes that every tokenizer has; `name` is the model's name in messages.

    `normalize_codes` and `codebook_sections` are ours: codes compared and decoded on the unit sphere (released: off);
    each of the `num_query` positions chooses from its own part of the codebook (released: 1, all from all).
    """

    model_type: ClassVar[str]
    name: ClassVar[str]

    vit: EvaConfig = field(default_factory=EvaConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    num_query: int = setting(32, least=1)
    codebook_size: int = setting(8192, least=1)
    codebook_dim: int = setting(32, least=1)
    decode_depth: int = setting(4, least=0)
    decode_heads: int = setting(12, least=1)
    reverse_depth: int = setting(4, least=0)
    normalize_codes: bool = False
    codebook_sections: int = setting(1, least=1)

    def __post_init__(self) -> None:
        if self.codebook_sections not in (1, self.num_query):
            raise ConfigError(f"codebook_sections must be 1 or num_query ({self.num_query}), got "
                              f"{self.codebook_sections}.")

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        """Shape of what an image's codes decode to."""
        raise NotImplementedError

    @classmethod
    def decoder_sizes(cls, shape: Shapes) -> dict[str, Any]:
        """The fields that depend on the decode side, read off a checkpoint."""
        raise NotImplementedError

    def with_image_size(self, size: int) -> Self:
        """The same tokenizer for images of another size (the position table must be resized with it)."""
        return dataclasses.replace(self, vit=dataclasses.replace(self.vit, image_size=size))

    def to_dict(self) -> dict[str, object]:
        """Plain values for `config.json`."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str | Path = "the tokenizer's config") -> Self:
        """Inverse of `to_dict`; an unknown key is a `ConfigError` that names the nearest known one."""
        values = dict(values)
        if values.pop("model_type", cls.model_type) != cls.model_type:
            raise ConfigError(f"{source}: this is not the configuration of a {cls.name} tokenizer.")
        return read_settings(cls, values, str(source))

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read `config.json`; raises `ConfigError` when it is damaged or describes another model."""
        return cls.from_dict(read_json_object(file, ConfigError), file)

    @classmethod
    def infer(cls, state: Mapping[str, Tensor], source: str | Path) -> Self:
        """Sizes from the shapes in a flat checkpoint that holds `visual_encoder.*` too.

        Raises:
            CheckpointError: a tensor that shows a size is missing, or a width is not the released one (weights do not
                show the number of attention heads).
        """
        shape = Shapes(state, source, cls)
        codebook = shape("quantize.embedding.weight")
        return cls(vit=shape.vit(), qformer=shape.qformer(), num_query=shape("query_tokens")[1],
                   codebook_size=codebook[0], codebook_dim=codebook[1], **cls.decoder_sizes(shape))


@dataclass(frozen=True)
class Shapes:
    """Shapes of a checkpoint's tensors by name; a missing one is refused by name.

    Args:
        config: the configuration that is being read off the checkpoint.
    """

    state: Mapping[str, Tensor]
    source: str | Path
    config: type[TokenizerConfig]

    def __call__(self, name: str) -> tuple[int, ...]:
        if name not in self.state:
            raise CheckpointError(f"{self.source}: not a complete {self.config.name} tokenizer: it holds no {name!r} "
                                  f"(its first tensor is {next(iter(self.state), 'none')!r}).")
        return tuple(self.state[name].shape)

    def layers(self, prefix: str) -> int:
        """How many layers `PREFIX.0.…`, `PREFIX.1.…` there are."""
        return 1 + max(_numbers(self.state, prefix, ""), default=-1)

    def vit(self) -> EvaConfig:
        """The vision tower's sizes; a tower of 40 blocks is the released file, of which 39 are used."""
        width, _, patch, _ = self("visual_encoder.patch_embed.proj.weight")
        depth = self.layers("visual_encoder.blocks")
        if depth == RELEASED_VIT_FILE_DEPTH:
            depth -= 1
        grid = round((self("visual_encoder.pos_embed")[1] - 1) ** 0.5)
        return EvaConfig(image_size=grid * patch, patch_size=patch, width=width, depth=depth,
                         pre_norm="visual_encoder.norm_pre.weight" in self.state,
                         heads=self._heads("vit", width), mlp_width=self("visual_encoder.blocks.0.mlp.fc1.weight")[0])

    def qformer(self) -> QFormerConfig:
        """The Q-Former's sizes."""
        width = self("query_tokens")[2]
        positions = self.state.get("Qformer.bert.embeddings.position_ids")
        crossing = sorted(_numbers(self.state, QUERY_LAYERS, r"crossattention\."))
        return QFormerConfig(
            width=width, depth=self.layers(QUERY_LAYERS), heads=self._heads("qformer", width),
            mlp_width=self(f"{QUERY_LAYERS}.0.intermediate_query.dense.weight")[0],
            cross_attention_freq=crossing[1] - crossing[0] if len(crossing) > 1 else QFormerConfig.cross_attention_freq,
            max_positions=QFormerConfig.max_positions if positions is None else positions.shape[1])

    def _heads(self, part: str, width: int) -> int:
        known = _RELEASED_HEADS[part]
        if width not in known:
            raise CheckpointError(
                f"{self.source}: weights do not show the number of attention heads, and the {part} width {width} is "
                f"not the released one ({next(iter(known))}): give config={self.config.__name__}(...) or put a "
                "config.json beside the file.")
        return known[width]


def _numbers(names: Iterable[str], prefix: str, rest: str) -> set[int]:
    """Every N of the names that begin with `PREFIX.N.REST`."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.{rest}")
    return {int(found[1]) for found in map(pattern.match, names) if found}
