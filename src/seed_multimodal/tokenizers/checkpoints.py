"""Reading and writing tokenizers: our folder, a released layout (`released`), or single files.

    our folder        config.json + model.safetensors
    released folder   its files; the vision tower apart, as eva_vit_g.pth, or cached by the original programs
    a file            model.safetensors with config.json beside it; the last file of a released layout with the others
                      beside it; or everything but the vision tower in one file, which `vision=` completes
    a hub id          `owner/name` (SEED-2), downloaded with huggingface_hub, then a released or our folder

`PretrainedTokenizer` gives a model class `from_pretrained`. Every tensor of every file is accounted for: training-only
names on a list are ignored and reported, unlisted ones too, with a warning; a needed one that is missing is refused.
Files are mapped into memory: weights on the CPU in the file's precision stay views of the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.errors import CheckpointError
from seed_multimodal.hub import fetch, first_file, is_hub_name
from seed_multimodal.nn.eva import EvaVit, resize_positions
from seed_multimodal.tokenizers.released import (
    IGNORED_IN_TOWER,
    LAYOUTS,
    OURS,
    TOWER,
    VISION_FILES,
    VISION_URL,
    ReleasedLayout,
)
from seed_multimodal.tokenizers.tokenizer_config import TokenizerConfig
from seed_multimodal.weights import LoadReport, assign_strictly, load_state_dict, save_state_dict

State = dict[str, Tensor]


class PretrainedTokenizer:
    """Mixed into a tokenizer's class: loading and saving.

    Attributes:
        layout: the model's released files. config_class: its sizes.
        load_report: what the loader read into the model.
    """

    layout: ClassVar[ReleasedLayout]
    config_class: ClassVar[type[TokenizerConfig]]
    config: Any
    load_report: LoadReport | None

    @classmethod
    def ignored_names(cls, config: Any) -> Sequence[str]:
        """Patterns of names that checkpoints may hold beside this configuration's own."""
        raise NotImplementedError

    @classmethod
    def released_names(cls, state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
        """A training checkpoint's names → the released ones, and the names left out."""
        return dict(state), []

    @classmethod
    def from_pretrained(cls, source: str | Path, *, vision: str | Path | None = None, config: Any | None = None,
                        image_size: int | None = None, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32, log: Callable[[str], None] | None = None) -> Self:
        """Load a tokenizer in eval mode, its parameters frozen, its `load_report` filled.

        Args:
            source: folder, file or hub id, see the module's docstring.
            vision: file of the vision tower, if it is not in or beside `source`.
            config: a `config_class`, where no config.json gives the sizes and the widths are not the released ones.
            image_size: resize the position table (bicubic) so that images of this size can be encoded.
            log: receives one line about what was loaded and ignored.

        Raises:
            CheckpointError: nothing there, damaged or unsafe file, another model's weights, missing tensors: one
                sentence that names them and what to put where.
        """
        files = find_files(source, cls.layout, cls.config_class.model_type, vision)
        states = [load_state_dict(file, mapped=True) for file in files.weights]
        state: State = {name: value for tensors in states for name, value in tensors.items()}
        replaced = sum(map(len, states)) - len(state)
        del states
        if replaced and log is not None:
            log(f"{files.weights[-1]}: {replaced} of its tensors are in {files.weights[0].name} too; its own are used.")
        state, left_out = cls.released_names(state)
        tower, tower_source = _tower_of(state, files, cls.layout)
        state = {name: value for name, value in state.items() if not name.startswith(TOWER)}
        if config is None:
            whole = {**state, **{TOWER + name: value for name, value in tower.items()}}
            config = cls.config_class.read(files.config) if files.config else cls.config_class.infer(whole, str(files))
        if image_size is not None:
            config = config.with_image_size(image_size)
        model = cls.from_tensors(config, state, tower, str(files), tower_source, device=device, dtype=dtype)
        assert model.load_report is not None
        model.load_report.ignored += left_out
        if log is not None:
            log(model.load_report.describe())
        return model

    @classmethod
    def from_tensors(cls, config: Any, state: Mapping[str, Tensor], tower: Mapping[str, Tensor], source: str | Path,
                     tower_source: str | Path, *, device: str | torch.device = "cpu",
                     dtype: torch.dtype = torch.float32) -> Self:
        """A tokenizer in eval mode from tensors, every name of which is accounted for in its `load_report`.

        The given tensors become its own where they are on `device` and of `dtype` already.

        Args:
            state: everything but the vision tower; training-only tensors are ignored by name.
            tower: the vision tower's tensors by their names in the tower.

        Raises:
            CheckpointError: another size, or a tensor missing.
        """
        with torch.device("meta"):
            model = cls(config)  # type: ignore[call-arg]
        model = model.to(dtype)  # type: ignore[attr-defined]
        rest = [name for name in model.state_dict() if name.startswith(TOWER)]
        report = assign_strictly(model, state, source, allow_missing=[*rest, "*position_ids"],
                                 allow_unexpected=cls.ignored_names(config), foreign=True, device=device)
        seen = fill_tower(model.visual_encoder, tower, tower_source, device)
        report.loaded += [TOWER + name for name in seen.loaded]
        report.missing = [name for name in report.missing if not name.startswith(TOWER)]
        report.ignored += [TOWER + name for name in seen.ignored]
        report.unlisted += [TOWER + name for name in seen.unlisted]
        if str(tower_source) != str(source):
            report.source = f"{source} and {tower_source}"
        model.load_report = report
        return with_buffers(model, device)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json` and `model.safetensors` (weights in their present dtype); each appears whole or not."""
        assert isinstance(self, nn.Module)
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        save_state_dict(self.state_dict(), place / OURS)
        replace_text(place / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")
        return place


def empty_model(kind: type[Any], config: Any, device: str | torch.device, dtype: torch.dtype) -> Any:
    """A `kind` with memory for its weights but no start values: a billion random numbers take long."""
    with torch.device("meta"):
        model = kind(config)
    model = model.to(dtype).to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(_start(name, buffer))
    return model.requires_grad_(False).eval()


def with_buffers(model: Any, device: str | torch.device) -> Any:
    """A model in eval mode whose weights are there; buffers still on the meta device get their start values."""
    for path, part in model.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = _start(f"{path}.{name}", buffer).to(device)
    return model.requires_grad_(False).eval()


def _start(name: str, buffer: Tensor) -> Tensor:
    """A buffer's start value on the CPU: positions count, all others are zero."""
    if name.endswith("position_ids"):
        return torch.arange(buffer.shape[1], dtype=buffer.dtype)[None]
    return torch.zeros(buffer.shape, dtype=buffer.dtype)


# ---- which files


@dataclass(frozen=True)
class TokenizerFiles:
    """Files to read, later ones over earlier ones; `vision`, `config`: None where there is none."""

    weights: tuple[Path, ...]
    vision: Path | None
    config: Path | None

    def __str__(self) -> str:
        return " and ".join(map(str, self.weights))


def find_files(source: str | Path, layout: ReleasedLayout, model_type: str,
               vision: str | Path | None = None) -> TokenizerFiles:
    """The files a source stands for; `CheckpointError` names missing ones and their place."""
    place = Path(source).expanduser()
    if vision is not None and not os.path.isfile(vision):
        raise CheckpointError(f"{vision}: there is no such vision-tower file; download it from {VISION_URL}.")
    if not os.path.exists(place):  # Path.exists raises for a name too long
        advice = layout.advice(place, missing=True)
        if not (layout.on_hub and is_hub_name(source)):
            raise CheckpointError(f"{place}: there is no such {layout.noun}; {advice}.")
        wanted = ("config.json", OURS, *(name for names in layout.files for name in names), *VISION_FILES)
        place = fetch(str(source), wanted, advice)
    folder = place if place.is_dir() else place.parent
    config = our_config(folder, model_type)
    found = [first_file(folder, names) for names in layout.files]
    if place.is_file():
        before = found[:-1] if place.name in layout.files[-1] else []
        weights = (*(file for file in before if file is not None), place)
    elif (folder / OURS).is_file() and (config is not None or None in found):
        weights = (folder / OURS,)
    else:
        weights = tuple(file for file in found if file is not None)
        if len(weights) < len(found):
            _refuse_folder(folder, layout, [names[-1] for names, file in zip(layout.files, found, strict=True)
                                            if file is None])
    cached = Path(torch.hub.get_dir()) / "checkpoints"  # of the original programs' download
    tower = Path(vision) if vision is not None else first_file(folder, VISION_FILES) or first_file(cached, VISION_FILES)
    return TokenizerFiles(weights, tower, config)


def our_config(folder: Path, model_type: str) -> Path | None:
    """`config.json` if it is this model's: a released folder may hold the text tokenizer's or the LLM's."""
    file = folder / "config.json"
    return file if file.is_file() and read_json_object(file).get("model_type") == model_type else None


def _refuse_folder(folder: Path, layout: ReleasedLayout, missing: Sequence[str]) -> None:
    for other in LAYOUTS if len(missing) == len(layout.files) else ():
        names = [file.name for names in other.files if (file := first_file(folder, names)) is not None]
        if names:
            also = f", or {other.also} {folder}" if other.also else ""
            raise CheckpointError(f"{folder}: this is a {other.name} tokenizer ({' and '.join(names)}); load it with "
                                  f"{other.loader}{also}.")
    raise CheckpointError(f"{folder}: holds no {layout.noun} weights ({' and '.join(missing)} missing); "
                          f"{layout.advice(folder)}.")


# ---- which tensors


def _tower_of(state: Mapping[str, Tensor], files: TokenizerFiles, layout: ReleasedLayout) -> tuple[State, str]:
    """Vision-tower tensors by their names in the tower, and where they come from: bundled ones win over a separate
    file. Refuses another model's checkpoint."""
    missing = [name for name in layout.needed if name not in state]
    other = next((other for other in LAYOUTS if other is not layout and other.needed[0] in state), None)
    if layout.needed[0] in missing and other is not None:
        raise CheckpointError(f"{files}: this is a {other.name} tokenizer (it ends in "
                              f"{other.needed[0].removesuffix('.weight')!r}, {other.ends_in}); load it with "
                              f"{other.loader}.")
    if missing and "patch_embed.proj.weight" in state:
        raise CheckpointError(f"{files}: this is the vision tower alone; give it as vision= and the tokenizer's own "
                              f"weights ({layout.main}) as the source.")
    if missing:
        raise CheckpointError(f"{files}: not a complete {layout.name} tokenizer: it holds no {missing[0]!r} "
                              f"(its first tensor is {next(iter(state))!r}).")
    bundled = {name.removeprefix(TOWER): value for name, value in state.items() if name.startswith(TOWER)}
    if bundled:
        return bundled, str(files)
    if files.vision is None:
        raise CheckpointError(f"{files}: the vision tower is stored apart and missing; download {VISION_URL} to "
                              f"{files.weights[-1].parent / VISION_FILES[-1]}, or give vision=FILE.")
    return read_tower(files.vision), str(files.vision)


def read_tower(file: Path) -> State:
    """Vision-tower tensors of a file by their names in the tower; of a whole checkpoint, its `visual_encoder.*`.

    Raises:
        CheckpointError: not an EVA tower, or a damaged file.
    """
    state = load_state_dict(file, mapped=True)
    tower = {name.removeprefix(TOWER): value for name, value in state.items() if name.startswith(TOWER)} or state
    if "patch_embed.proj.weight" not in tower:
        raise CheckpointError(f"{file}: not an EVA vision tower: it holds no 'patch_embed.proj.weight' "
                              f"(its first tensor is {next(iter(state))!r}).")
    return tower


def fill_tower(vit: EvaVit, tower: Mapping[str, Tensor], source: str | Path,
               device: str | torch.device = "cpu") -> LoadReport:
    """Put tower tensors into `vit` (on `device`, if it is on the meta device): positions resized to its grid, a file's
    block after the last used one left out.

    Raises:
        CheckpointError: another size, or a tensor missing.
    """
    fitted, before = dict(tower), tower.get("pos_embed")
    if before is not None and before.ndim == 3:
        fitted["pos_embed"] = resize_positions(before, vit.config.grid)
    report = assign_strictly(vit, fitted, source,
                             allow_unexpected=[*IGNORED_IN_TOWER, f"blocks.{vit.config.depth}.*"], foreign=True,
                             device=device)
    if before is not None and before.shape != vit.pos_embed.shape:
        report.fitted["pos_embed"] = f"resized from {tuple(before.shape)} to {tuple(vit.pos_embed.shape)}"
    return report
