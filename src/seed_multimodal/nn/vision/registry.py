"""Registry of vision encoders: models ask their configuration's `type` for the class.

    config = read_vision_config({"type": "hub", "path": "pretrained/dinov2-base"}, "vision encoder")
    encoder = config.build()  # with random weights

Without `type` a configuration is EVA's. Another kind is a file with a `VisionConfig` that builds
its `VisionEncoder`, and a row in `VISION_CONFIGS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import PlainValidator

from seed_multimodal.nn.vision.base import VisionConfig
from seed_multimodal.nn.vision.eva import EvaConfig
from seed_multimodal.nn.vision.hub import HubVisionConfig
from seed_multimodal.nn.vision.qwen import QwenEncoderConfig
from seed_multimodal.settings import adapter, find_entry, read_settings

VISION_CONFIGS: dict[str, type[VisionConfig]] = {
    "eva": EvaConfig,
    "hub": HubVisionConfig,
    "qwen_vit": QwenEncoderConfig,
}


def read_vision_config(values: Mapping[str, Any], label: str) -> VisionConfig:
    """The configuration of any vision encoder from plain values.

    Raises ConfigError: an unknown type (with the nearest), or as `read_settings`.
    """
    return read_settings(*_by_type(values), label)


def _by_type(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class of a configuration, and its values; EVA's have no type."""
    values = dict(values)
    name = str(values.get("type", "eva"))
    if name == "eva":
        values.pop("type", None)
    return find_entry(VISION_CONFIGS, name, "vision encoder"), values


def _parse(values: Any) -> VisionConfig:
    """As `read_vision_config`, inside of pydantic, which adds the label to its errors."""
    if isinstance(values, VisionConfig):
        return values
    config_class, values = _by_type(values)
    return cast(VisionConfig, adapter(config_class).validate_python(values))


AnyVisionConfig = Annotated[VisionConfig, PlainValidator(_parse)]  # a field of a model's sizes
