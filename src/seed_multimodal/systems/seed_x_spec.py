"""Finding the parts of a SEED-X system: one folder with `system.json` (`system_file`), or the released folders below
`pretrained/`.

`seed-x` is the pretrained model, `seed-x-i` the one that follows instructions, `seed-x-edit` the one that edits; they
share tower, tokenizer and SDXL. `agent/config.json` may give the resamplers' sizes (`AgentSizes`), and a tuning's
`agent.json` gives them with its LoRA; the released file has neither beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seed_multimodal.detokenizers.sdxl_resampler import ResamplerSizes
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import SEED_X, fetch, local_folder, locate, locate_system, or_take, where_shipped
from seed_multimodal.seed_x.modeling import AgentSettings
from seed_multimodal.seed_x.vision import INPUT_RESAMPLER, OUTPUT_RESAMPLER, QwenVitConfig, ResamplerConfig
from seed_multimodal.settings import read_settings
from seed_multimodal.systems.system_file import SeedXFile, read_system_json

HUB = SEED_X
SHARED = {"tokenizer": "cvlm_llama2_tokenizer_100img_and_224loc_addpatch", "vision": "QwenViT",
          "sdxl": "stable-diffusion-xl-base-1.0"}
FIRST, SECOND = "seed_detokenizer/first_stage", "seed_detokenizer/second_stage"
# Of the released models by their short names: folder, de-tokenizer, whether it follows instructions.
RELEASED = {"seed-x": ("seed_x", FIRST, False), "seed-x-i": ("seed_x_i", FIRST, True),
            "seed-x-edit": ("seed_x_edit", SECOND, True)}
OF_HUB = ("tokenizer", "llm", "agent", "detokenizer")
FROM = {"vision": "src/tools/reload_qwen_vit.py takes it out of Qwen/Qwen-VL-Chat",
        "sdxl": "unet/config.json, vae and scheduler of stabilityai/stable-diffusion-xl-base-1.0"}
PARTS = (*OF_HUB, *FROM)


@dataclass(frozen=True)
class AgentSizes:
    """`agent/config.json`: sizes of both resamplers, and `AgentSettings`; the defaults are the released ones."""

    input_resampler: ResamplerConfig = INPUT_RESAMPLER
    output_resampler: ResamplerConfig = OUTPUT_RESAMPLER
    settings: AgentSettings = AgentSettings()


@dataclass(frozen=True, kw_only=True)
class SeedXSpec(SeedXFile):
    """Everything `SeedX` needs to know before it loads a tensor, with the parts' own paths.

    Attributes:
        agent_sizes, tower_sizes, adapter_sizes: None: those beside the weights, or the released ones.
        lora: fields of the LoRA on the language model whose weights are in the agent's file.
    """

    name: str
    agent_sizes: AgentSizes | None = None
    tower_sizes: QwenVitConfig | None = None
    adapter_sizes: ResamplerSizes | None = None
    lora: Mapping[str, Any] | None = None


def find_seed_x(name: str | Path | None = None, **parts: str | Path | bool | None) -> SeedXSpec:
    """The parts of a SEED-X system, checked to be there.

    Args:
        name: `seed-x`, `seed-x-i`, `seed-x-edit`, a folder with `system.json`, a copy of the hub's repository or its
            name (SEED-X-I of it), or None with parts.
        parts: `llm`, `agent`, `tokenizer`, `vision`, `sdxl`, `detokenizer` (folders, files or hub names) replace single
            parts; `tuned`.

    Raises:
        CheckpointError: a part that is not there: what to put where. ConfigError: a damaged `system.json`, or nothing
            named.
    """
    given = {key: value if isinstance(value, bool) else Path(value)
             for key, value in parts.items() if value is not None}
    short = str(name).lower()
    folder = None if name is None or short in RELEASED else locate_system(name) or local_folder(name)
    if folder is not None and (folder / "system.json").is_file():
        spec = _of_folder(folder, given)
    elif short in RELEASED or folder is not None or (name is None and "llm" in given):
        spec = _released(short, folder, given)
    elif name is None:
        raise ConfigError(f"Name a system ({', '.join(RELEASED)} or a folder with system.json), or give llm=FOLDER.")
    else:
        raise CheckpointError(f"{name}: there is no such folder; give {', '.join(RELEASED)}, nano-x or a folder "
                              f"with system.json. {where_shipped(name or '')}".rstrip())
    return checked_parts(spec, [name for name in PARTS if name not in ("sdxl", "detokenizer")])  # needed to draw


def read_agent_sizes(spec: SeedXSpec) -> AgentSizes:
    """Sizes of a system's agent: given, beside its weights, or the released ones."""
    if spec.agent_sizes is not None:
        return spec.agent_sizes
    listed = (spec.agent if spec.agent.is_dir() else spec.agent.parent) / "config.json"
    if listed.is_file():
        return read_settings(AgentSizes, read_json_object(listed, ConfigError), str(listed))
    tuned = _tuned(spec.agent)
    given: dict[str, Any] = {key: tuned[key] for key in ("input_resampler", "output_resampler") if key in tuned}
    return read_settings(AgentSizes, {**given, "settings": tuned.get("losses", {})}, f"{spec.agent}/agent.json")


def read_lora(spec: SeedXSpec) -> Mapping[str, Any] | None:
    """Fields of the LoRA that the agent was tuned with; None for none."""
    found = spec.lora if spec.lora is not None else _tuned(spec.agent).get("lora")
    if found is not None and not isinstance(found, Mapping):
        raise ConfigError(f"{spec.agent}/agent.json: lora must hold the fields of a LoRA.")
    return found


def _tuned(agent: Path) -> dict[str, Any]:
    """The `agent.json` of a tuning's checkpoint; empty for other agents."""
    file = (agent if agent.is_dir() else agent.parent) / "agent.json"
    return read_json_object(file, ConfigError) if file.is_file() else {}


def _of_folder(folder: Path, given: dict[str, Any]) -> SeedXSpec:
    file = read_system_json(folder)
    if not isinstance(file, SeedXFile):
        raise ConfigError(f"{folder}: its system.json describes no SEED-X system; open it with SeedLlama.")
    own = {key: folder / value for key, value in vars(file).items() if isinstance(value, Path)}
    return SeedXSpec(**{**vars(file), **own, **given, "name": str(folder)})


def _released(short: str, home: Path | None, given: dict[str, Any]) -> SeedXSpec:
    """The released layout, below `pretrained/` or in a copy of the hub's repository (`home`); a merged agent (`home`
    with `llm` and `agent`) beside the released parts."""
    own, adapter, tuned = RELEASED.get(short, RELEASED["seed-x-i"])
    root = home or Path("pretrained")
    merged = home is not None and (home / "llm").is_dir()
    if not merged and locate(root / own) is None:
        root = _snapshot(own, adapter) or root
    inner = root if merged else root / own
    others = {**SHARED, "detokenizer": adapter}  # tower and SDXL are not in that repository
    parts = {key: root / value if (root / value).exists() else Path("pretrained") / value
             for key, value in others.items()}
    if merged and (inner / "llm" / "tokenizer.model").is_file():
        parts["tokenizer"] = inner / "llm"
    parts |= {"llm": inner / "llm", "agent": inner / "agent"}
    grids = {"grids": ("1x1",)} if short == "seed-x-edit" else {}  # it was tuned on pictures in one piece alone
    return SeedXSpec(**{**parts, **grids, "tuned": tuned, **given, "name": str(home or short or given["llm"])})


def _snapshot(own: str, adapter: str) -> Path | None:
    """The hub's repository in the hub client's cache, with the folders of one model; None: not there."""
    try:
        return fetch(HUB, [f"{own}/*", f"{adapter}/*", f"{SHARED['tokenizer']}/*"])
    except CheckpointError:
        return None


def checked_parts(spec: SeedXSpec, needed: Collection[str]) -> SeedXSpec:
    """With every part where it is on this disk.

    Args:
        needed: parts that must be there now.

    Raises:
        CheckpointError: parts that are not: all of them, and what to put where.
    """
    places = {key: getattr(spec, key) for key in PARTS if getattr(spec, key) is not None}
    found = {key: local_folder(place) for key, place in places.items()}
    missing = [key for key in places if found[key] is None and key in needed]
    if missing:
        kept = ", ".join(str(places[key]) for key in OF_HUB if key in missing)
        parts = ([f"{kept} (of {HUB})"] if kept else []) + [f"{places[key]} ({text})" for key, text in FROM.items()
                                                            if key in missing]
        other = or_take("nano-x", "nano")
        raise CheckpointError(f"{spec.name}: its weights are not on this disk: put there {'; '.join(parts)}"
                              f"{other}.")
    here: dict[str, Any] = {key: place or places[key] for key, place in found.items()}
    return replace(spec, **here)
