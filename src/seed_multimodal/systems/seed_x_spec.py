"""Finding the parts of a SEED-X system: one folder with `system.json` (`system_file`), or the released folders below
`pretrained/`.

`seed-x` is the pretrained model, `seed-x-i` the one that follows instructions, `seed-x-edit` the one that edits; they
share tower, tokenizer and SDXL. `agent/config.json` may give the resamplers' sizes (`AgentSizes`); the released file
has none beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import SDXL_ADAPTER_WHERE, SDXL_WHERE, SEED_X, fetch, local_folder, locate, locate_system
from seed_multimodal.language.continuous import AgentSettings
from seed_multimodal.settings import read_settings
from seed_multimodal.systems.system_file import SeedXFile, read_system_json
from seed_multimodal.vision.resampler import INPUT_RESAMPLER, OUTPUT_RESAMPLER, ResamplerConfig

HUB = SEED_X
SHARED = {"tokenizer": "cvlm_llama2_tokenizer_100img_and_224loc_addpatch", "vision": "QwenViT",
          "sdxl": "stable-diffusion-xl-base-1.0"}
FIRST, SECOND = "seed_detokenizer/first_stage", "seed_detokenizer/second_stage"
# Of the released models by their short names: folder, de-tokenizer, whether it follows instructions.
RELEASED = {"seed-x": ("seed_x", FIRST, False), "seed-x-i": ("seed_x_i", FIRST, True),
            "seed-x-edit": ("seed_x_edit", SECOND, True)}
WHERE = {
    "tokenizer": f"put {SHARED['tokenizer']} of {HUB} there",
    "llm": f"put the language model's folder of {HUB} there",
    "agent": f"put the agent's folder of {HUB} (agent/pytorch_model.bin) there",
    "vision": "its qwen_vit_G.pt is taken out of Qwen/Qwen-VL-Chat by src/tools/reload_qwen_vit.py",
    "sdxl": SDXL_WHERE,
    "detokenizer": SDXL_ADAPTER_WHERE,
}


@dataclass(frozen=True)
class AgentSizes:
    """`agent/config.json`: sizes of both resamplers, and `AgentSettings`; the defaults are the released ones."""

    input_resampler: ResamplerConfig = INPUT_RESAMPLER
    output_resampler: ResamplerConfig = OUTPUT_RESAMPLER
    settings: AgentSettings = AgentSettings()


@dataclass(frozen=True, kw_only=True)
class SeedXSpec(SeedXFile):
    """Everything `SeedX` needs to know before it loads a tensor, with the parts' own paths."""

    name: str


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
        raise CheckpointError(f"{name}: there is no such folder; give {', '.join(RELEASED)} or a folder with "
                              f"system.json.")
    return _checked(spec)


def read_agent_sizes(agent: Path) -> AgentSizes:
    """Sizes of an agent's file or folder; the released ones where no `config.json` is beside it."""
    listed = (agent if agent.is_dir() else agent.parent) / "config.json"
    return read_settings(AgentSizes, read_json_object(listed, ConfigError), str(listed)) if listed.is_file() else (
        AgentSizes())


def _of_folder(folder: Path, given: dict[str, Any]) -> SeedXSpec:
    file = read_system_json(folder)
    if not isinstance(file, SeedXFile):
        raise ConfigError(f"{folder}: its system.json describes no SEED-X system; open it with SeedLlama.")
    own = {key: folder / value for key, value in vars(file).items() if isinstance(value, Path)}
    return SeedXSpec(**{**vars(file), **own, **given, "name": str(folder)})


def _released(short: str, home: Path | None, given: dict[str, Any]) -> SeedXSpec:
    """The released layout, below `pretrained/` or in a copy of the hub's repository (`home`)."""
    own, adapter, tuned = RELEASED.get(short, RELEASED["seed-x-i"])
    root = home or Path("pretrained")
    if locate(root / own) is None:
        root = _snapshot(own, adapter) or root
    parts = {key: root / value for key, value in SHARED.items()}
    for key in parts:  # tower and SDXL are not in that repository
        if not parts[key].exists():
            parts[key] = Path("pretrained") / SHARED[key]
    parts |= {"llm": root / own / "llm", "agent": root / own / "agent", "detokenizer": root / adapter}
    grids = {"grids": ("1x1",)} if short == "seed-x-edit" else {}  # it was tuned on pictures in one piece alone
    return SeedXSpec(**{**parts, **grids, "tuned": tuned, **given, "name": str(home or short or given["llm"])})


def _snapshot(own: str, adapter: str) -> Path | None:
    """The hub's repository in the hub client's cache, with the folders of one model; None: not there."""
    try:
        return fetch(HUB, [f"{own}/*", f"{adapter}/*", f"{SHARED['tokenizer']}/*"])
    except CheckpointError:
        return None


def _checked(spec: SeedXSpec) -> SeedXSpec:
    """With every part where it is on this disk.

    Raises:
        CheckpointError: parts that are not: all of them, and what to put where.
    """
    places = {key: getattr(spec, key) for key in WHERE if getattr(spec, key) is not None}
    found = {key: local_folder(place) for key, place in places.items()}
    later = ("sdxl", "detokenizer")  # looked for when a picture is drawn
    missing = [key for key in places if found[key] is None and key not in later]
    if missing:
        advice = "; ".join(f"{places[key]} is missing ({WHERE[key]})" for key in missing)
        shipped = "nano-x" if locate_system("nano-x") else "nano"
        raise CheckpointError(f"{spec.name}: {advice}. The shipped model runs now, under the name {shipped}.")
    here: dict[str, Any] = {key: place or places[key] for key, place in found.items()}
    return replace(spec, **here)

