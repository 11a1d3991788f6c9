"""What the tokenizers' configurations share: `config.json`, and reading sizes off a checkpoint without one.

A tensor's shape shows every size but the number of attention heads, which is known for the released widths only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.settings import check_keys
from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.vision.eva import EvaConfig

QUERY_LAYERS = "Qformer.bert.encoder.layer"
RELEASED_VIT_FILE_DEPTH = 40
# How it is said what a field of this annotation holds.
_SAID = {"int": "a positive whole number", "float": "a number from 0", "bool": "true or false"}
_MAY_BE_ZERO = ("causal_queries", "decode_depth", "reverse_depth")
_RELEASED_HEADS = {"vit": {1408: 16}, "qformer": {768: 12}}


class TokenizerConfig:
    """Mixed into the configurations' dataclasses, which have the fields `vit`, `qformer`, `num_query` and
    `codebook_sections`; `name` is the model's in sentences."""

    model_type: ClassVar[str]
    name: ClassVar[str]

    def __post_init__(self) -> None:
        sections, positions = self.codebook_sections, self.num_query  # type: ignore[attr-defined]
        if sections not in (1, positions):
            raise ConfigError(f"codebook_sections must be 1 or num_query ({positions}), got {sections}.")

    def with_image_size(self, size: int) -> Self:
        """The same tokenizer for images of another size (the position table must be resized with it)."""
        vit = dataclasses.replace(self.vit, image_size=size)  # type: ignore[attr-defined]
        return dataclasses.replace(self, vit=vit)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, object]:
        """Plain values for `config.json`."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str | Path = "the tokenizer's config") -> Self:
        """Inverse of `to_dict`; an unknown key is a `ConfigError` that names the nearest known one."""
        values = dict(values)
        if values.pop("model_type", cls.model_type) != cls.model_type:
            raise ConfigError(f"{source}: this is not the configuration of a {cls.name} tokenizer.")
        for part, kind in (("vit", EvaConfig), ("qformer", QFormerConfig)):
            inner = values.get(part, {})
            if not isinstance(inner, Mapping):
                raise ConfigError(f"{source}: {part!r} must hold a mapping of sizes.")
            check_sizes(kind, inner, f"{source}: in {part!r}")
            values[part] = kind(**inner)
        check_sizes(cls, values, source)
        return cls(**values)

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read `config.json`; raises `ConfigError` when it is damaged or describes another model."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: not a readable JSON file ({error}).") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: holds a {type(values).__name__}, not a mapping of sizes.")
        return cls.from_dict(values, file)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Shape of a named tensor of a checkpoint, or a sentence that says which one is missing.

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

    def vit(self) -> EvaConfig:
        """The vision tower's sizes; a tower of 40 blocks is the released file, of which 39 are used."""
        width, _, patch, _ = self("visual_encoder.patch_embed.proj.weight")
        depth = count_layers(self.state, "visual_encoder.blocks")
        if depth == RELEASED_VIT_FILE_DEPTH:
            depth -= 1
        grid = round((self("visual_encoder.pos_embed")[1] - 1) ** 0.5)
        return EvaConfig(image_size=grid * patch, patch_size=patch, width=width, depth=depth,
                         heads=self._heads("vit", width), mlp_width=self("visual_encoder.blocks.0.mlp.fc1.weight")[0])

    def qformer(self) -> QFormerConfig:
        """The Q-Former's sizes."""
        width = self("query_tokens")[2]
        positions = self.state.get("Qformer.bert.embeddings.position_ids")
        return QFormerConfig(
            width=width, depth=count_layers(self.state, QUERY_LAYERS), heads=self._heads("qformer", width),
            mlp_width=self(f"{QUERY_LAYERS}.0.intermediate_query.dense.weight")[0],
            cross_attention_freq=_cross_frequency(self.state),
            max_positions=QFormerConfig.max_positions if positions is None else positions.shape[1])

    def _heads(self, part: str, width: int) -> int:
        known = _RELEASED_HEADS[part]
        if width not in known:
            raise CheckpointError(
                f"{self.source}: weights do not show the number of attention heads, and the {part} width {width} is "
                f"not the released one ({next(iter(known))}): give config={self.config.__name__}(...) or put a "
                "config.json beside the file.")
        return known[width]


def count_layers(names: Iterable[str], prefix: str) -> int:
    """How many layers `PREFIX.0.…`, `PREFIX.1.…` there are."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(found[1]) for found in map(pattern.match, names) if found), default=-1)


def _cross_frequency(names: Iterable[str]) -> int:
    pattern = re.compile(re.escape(QUERY_LAYERS) + r"\.(\d+)\.crossattention\.")
    layers = sorted({int(found[1]) for found in map(pattern.match, names) if found})
    return layers[1] - layers[0] if len(layers) > 1 else QFormerConfig.cross_attention_freq


def check_sizes(kind: type[Any], values: Mapping[str, Any], where: str | Path) -> None:
    """Refuse what no field of the dataclass `kind` may hold.

    Raises:
        ConfigError: an unknown key (the nearest is named), or a value of the wrong type or range.
    """
    known = {item.name: str(item.type) for item in dataclasses.fields(kind)}
    check_keys(values, known, str(where))
    for name, value in values.items():
        if not _holds(name, known[name], value):
            raise ConfigError(f"{where}: {name!r} must be {_SAID[known[name]]}, not {value!r}.")


def _holds(name: str, annotation: str, value: Any) -> bool:
    """Whether a field may have this value; sizes are at least 1, counts of what may be left out at least 0."""
    if annotation not in _SAID:
        return True
    if annotation == "bool" or isinstance(value, bool):
        return isinstance(value, bool) and annotation == "bool"
    if annotation == "float":
        return isinstance(value, int | float) and 0 <= value < math.inf
    return isinstance(value, int) and value >= (name not in _MAY_BE_ZERO)
