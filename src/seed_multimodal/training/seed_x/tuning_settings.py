"""Typed settings of SEED-X's agent and vision tower in instruction tuning, from a YAML of ours or one of the
original's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from seed_multimodal.errors import ConfigError
from seed_multimodal.seed_x.modeling import AgentSettings
from seed_multimodal.seed_x.vision import INPUT_RESAMPLER, OUTPUT_RESAMPLER, QwenVitConfig, ResamplerConfig
from seed_multimodal.settings import nearest, read_settings, setting

AGENT_TARGETS = ("src.models.mllm.seed_x.ContinuousLVLM.from_pretrained", "src.models.mllm.seed_x.ContinuousLVLM")
TOWER_TARGETS = ("src.models.tokenizer.qwen_visual.VisionTransformerWithAttnPool.from_pretrained",)
_RESAMPLERS = ("input_resampler", "output_resampler")
_META = ("_target_", "_recursive_", "_convert_")
_PATH = "pretrained_model_path"


@dataclass
class AgentModel:
    """The resamplers and the losses.

    Attributes:
        path: weights to start from, as `load_agent` reads them (also with a language model's or a LoRA's
            among them); None: new ones.
        losses: weights of the two losses and the like.
        seed: of new weights.
    """

    path: str | None = None
    input_resampler: ResamplerConfig = field(default=INPUT_RESAMPLER)
    output_resampler: ResamplerConfig = field(default=OUTPUT_RESAMPLER)
    losses: AgentSettings = field(default_factory=AgentSettings)
    seed: int = setting(0, least=0)


@dataclass
class TowerModel:
    """The frozen vision tower.

    Attributes:
        path: its weights, as `QwenVit.from_pretrained`; sizes: None for those beside the weights, or the released ones.
        at_once: views that it takes at a time.
    """

    path: str
    sizes: QwenVitConfig | None = None
    at_once: int = setting(16, least=1)


def read_agent(config: Mapping[str, Any], where: str = "agent") -> AgentModel:
    """Settings of a mapping: ours, or the original's with its `_target_`.

    Raises:
        ConfigError: an unknown key, value or `_target_`.
    """
    given = {str(key): value for key, value in config.items()}
    if "_target_" in given:
        _check_target(given["_target_"], AGENT_TARGETS, where)
        losses = {one.name: given.pop(one.name) for one in fields(AgentSettings) if one.name in given}
        parts = {name: _plain(given.pop(name)) for name in _RESAMPLERS if isinstance(given.get(name), Mapping)}
        path = {"path": given.pop(_PATH)} if given.get(_PATH) else {}
        given = {**{key: value for key, value in _plain(given).items() if key != _PATH}, **parts, **path,
                 "losses": {**losses, **(given.get("losses") or {})}}
    return read_settings(AgentModel, given, where)


def read_tower(config: Mapping[str, Any], where: str = "visual_encoder") -> TowerModel:
    """Settings of a mapping: ours, or the original's with its `_target_`, in which keys without a meaning are ignored
    (the released file has one with a stray quotation mark).

    Raises:
        ConfigError: as `read_agent`; no path.
    """
    given = {str(key): value for key, value in config.items()}
    if "_target_" in given:
        _check_target(given["_target_"], TOWER_TARGETS, where)
        own = {key: value for key, value in given.items() if key == "at_once"}
        sizes = {one.name: given[one.name] for one in fields(QwenVitConfig) if one.name in given}
        given = {"path": given.get(_PATH), "sizes": sizes, **own}
    if not given.get("path"):
        raise ConfigError(f"{where}: path (in the original's files {_PATH}) is needed: the vision tower's weights.")
    return read_settings(TowerModel, given, where)


def _plain(node: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in node.items() if key not in _META}


def _check_target(target: Any, known: tuple[str, ...], where: str) -> None:
    if target not in known:
        raise ConfigError(f"{where}: _target_ {target!r} is not allowed{nearest(str(target), known)}; known are "
                          f"{', '.join(known)}.")
