"""From training to use: the checkpoints of the two stages and the vision tower become one tokenizer folder.

    stage 1         Qformer (its query path), query_tokens, ln_vision; visual_encoder if it was trained
    stage 2         quantize, task layers, blocks, position tables, decode head; encoder parts if they were trained on
    vision tower    eva_vit_g.pth, unless a stage holds it

Training checkpoints leave frozen parts out (`{"model": …, "optimizer": …}`, or our safetensors), so each part is taken
from the latest file that has it. The result is our folder (config.json + model.safetensors) and, if asked for, the
released files beside it (seed_quantizer.pt, eva_vit_g.pth).
Peculiar: a picture is encoded by the training modules themselves, filled from the stage files, and by what was written,
read back; other codes, and nothing is kept. The folder appears by one rename, complete or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.images.open import open_image
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.tokenizers.loading import (
    OURS,
    QUANTIZER_FILES,
    TOWER,
    VISION_FILES,
    VISION_URL,
    build,
    grouped,
    our_config,
    read_tower,
    save_folder,
)
from seed_multimodal.tokenizers.seed2 import Seed2Tokenizer
from seed_multimodal.tokenizers.seed2_config import Seed2Config
from seed_multimodal.tokenizers.stage1 import Stage1Model
from seed_multimodal.tokenizers.stage2 import ENCODER_PARTS, Stage2Model
from seed_multimodal.vision.eva import resize_positions
from seed_multimodal.weights import load_state_dict

State = dict[str, Tensor]
Log = Callable[[str], None] | None
RELEASED_QUANTIZER, RELEASED_TOWER = QUANTIZER_FILES[-1], VISION_FILES[-1]


@dataclass
class Export:
    """What an export wrote: the file each part came from, the names of each file that were left out, and the codes
    of the test picture, which every layout in `verified` gave as the training modules did."""

    folder: Path
    config: Seed2Config
    parts: dict[str, str]
    ignored: dict[str, list[str]]
    tensors: int
    codes: list[int] = field(default_factory=list)
    verified: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report, one sentence a line."""
        sources: dict[str, list[str]] = {}
        for part, file in self.parts.items():
            sources.setdefault(file, []).append(part)
        found = [f"{file}: gave {', '.join(parts)}." for file, parts in sources.items()]
        found += [f"{file}: {len(names)} tensors left out: {grouped(names)}."
                  for file, names in self.ignored.items() if names]
        return [*found, f"{self.folder}: {self.tensors} tensors; same codes as the training modules from "
                        f"{' and '.join(self.verified)}: {' '.join(map(str, self.codes))}"]


@dataclass
class _Merged:
    """Tensors of the tokenizer without its tower, the tower, and where each name came from."""

    state: State
    tower: State
    origin: dict[str, str]
    files: dict[str, list[str]]
    tower_file: Path


def export_tokenizer(
    stage2: str | Path, out: str | Path, *, stage1: str | Path | None = None, vision: str | Path | None = None,
    config: Seed2Config | str | Path | None = None, released: bool = False,
    picture: Image.Image | str | Path | None = None, beside: Sequence[str | Path] = (), force: bool = False,
    log: Log = None,
) -> Export:
    """Join stage checkpoints into a tokenizer folder and prove it by encoding a picture.

    Args:
        stage2, stage1, vision: checkpoint files; `stage1` may be left out if stage 2 trained (and holds) the encoder,
            `vision` if a stage holds the tower.
        config: sizes, or a config.json; default: ours beside a checkpoint, else read off tensors of released widths.
        released: also write `seed_quantizer.pt` and `eva_vit_g.pth`.
        picture: what is encoded to compare (default: a generated one).
        beside: further files to copy into the folder, for example a language tokenizer's.
        force: replace a folder that is not empty.

    Raises:
        CheckpointError: a part that no file holds, tensors of another size or model, codes that differ.
        ConfigError: `out` exists and is not empty, or cannot be written.
    """
    target = Path(out)
    _check_target(target, force)
    files = [Path(file) for file in (stage2, stage1) if file is not None]
    merged = _merge(files[1] if len(files) > 1 else None, files[0], Path(vision) if vision is not None else None)
    sizes = config if isinstance(config, Seed2Config) else _sizes(config, merged, files)
    model = build(sizes, merged.state, merged.tower, " and ".join(map(str, reversed(files))), merged.tower_file)
    pixels = _pixels(picture, sizes.vit.image_size)
    expected = source_codes(sizes, merged.state, merged.tower, pixels)
    report = _report(model, merged, target)
    report.codes = expected[0][0].tolist()
    del merged  # a billion numbers at released size
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _write(model, temporary, released, beside)
        del model
        report.verified = _verify(temporary, released, pixels, expected)
        _put(temporary, target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if log is not None:
        for line in report.lines():
            log(line)
    return report


# ---- which tensors


def _part(name: str) -> str:
    return name.split(".")[0]


def _merge(stage1: Path | None, stage2: Path, vision: Path | None) -> _Merged:
    late = load_state_dict(stage2)
    early = load_state_dict(stage1) if stage1 is not None else {}
    if "quantize.embedding.weight" not in late:
        swapped = "quantize.embedding.weight" in early
        advice = "; the two stages were swapped." if swapped else "."
        raise CheckpointError(f"{stage2}: not a stage-2 checkpoint: it holds no 'quantize.embedding.weight' (its first "
                              f"tensor is {next(iter(late))!r}){advice}")
    # Buffers survive the saving rule, so a lone position_ids does not mean that stage 2 holds the Q-Former.
    trained = {_part(name) for name in late if not name.endswith("position_ids")} & set(ENCODER_PARTS)
    state, origin = {}, {}
    for file, tensors in ((stage1, early), (stage2, late)):
        for name, value in tensors.items():
            part = _part(name)
            if part not in ENCODER_PARTS or (part in trained) == (file == stage2):
                state[name], origin[name] = value.float() if value.is_floating_point() else value, str(file)
    for part in ENCODER_PARTS[1:]:
        if not any(_part(name) == part for name in state):
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
        given = {name: v.float() if v.is_floating_point() else v for name, v in read_tower(vision).items()}
        _same_tower(tower, given, holder, vision)
        if not tower:
            tower, holder = given, vision
            origin |= dict.fromkeys((TOWER + name for name in tower), str(vision))
        files[str(vision)] = [TOWER + name for name in given]
    return _Merged(state, tower, origin, files, holder)


def _same_tower(trained: Mapping[str, Tensor], given: Mapping[str, Tensor], holder: Path, vision: Path) -> None:
    """Refuse a vision file that is not the tower a stage was trained with."""
    for name, value in trained.items():
        if name not in given or given[name].shape != value.shape or not torch.equal(given[name], value):
            raise CheckpointError(f"{vision}: not the vision tower that {holder} was trained with (first other tensor: "
                                  f"{name!r}); that file holds its own, so leave the vision file out.")


def _sizes(config: str | Path | None, merged: _Merged, files: Sequence[Path]) -> Seed2Config:
    if config is not None:
        return Seed2Config.read(Path(config))
    for file in files:
        beside = our_config(file.parent)
        if beside is not None:
            return Seed2Config.read(beside)
    whole = {**merged.state, **{TOWER + name: value for name, value in merged.tower.items()}}
    return Seed2Config.infer(whole, files[0])


def _report(model: Seed2Tokenizer, merged: _Merged, folder: Path) -> Export:
    assert model.load_report is not None
    used = set(model.load_report.loaded)
    origin = {name: file for name, file in merged.origin.items() if name in used}
    parts = {_part(name): file for name, file in origin.items()}
    ignored = {file: [name for name in names if origin.get(name) != file] for file, names in merged.files.items()}
    return Export(folder, model.config, parts, ignored, len(used))


# ---- proof


def source_codes(config: Seed2Config, state: Mapping[str, Tensor], tower: Mapping[str, Tensor],
                 pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[B, 32]` and decoded embeddings `[B, E]` of pixels `[B, 3, S, S]` by the training modules themselves."""
    fitted = {TOWER + name: value for name, value in tower.items()}
    fitted[f"{TOWER}pos_embed"] = resize_positions(tower["pos_embed"], config.vit.grid)
    with torch.device("meta"):
        first = Stage1Model(config, vocab_size=1, embed_dim=1, lm_head=False)
        second = Stage2Model(config)
    for model, tensors in ((first, {**state, **fitted}), (second, state)):
        own = model.state_dict()
        model.load_state_dict({name: value for name, value in tensors.items()
                               if name in own and own[name].shape == value.shape}, strict=False, assign=True)
        model.eval()
    with torch.no_grad():
        features = second.pre_quant_from_features(first.query_features(first.vit_features(pixels)))
        codes = second.quantize.nearest(features)
        return codes, second.decode_embedding(second.quantize.lookup(codes))


def _verify(folder: Path, released: bool, pixels: Tensor, expected: tuple[Tensor, Tensor]) -> list[str]:
    """Read back what was written; the layouts that gave the expected codes."""
    layouts: dict[str, tuple[Path, Path | None]] = {OURS: (folder, None)}
    if released:
        layouts[RELEASED_QUANTIZER] = (folder / RELEASED_QUANTIZER, folder / RELEASED_TOWER)
    for name, (source, vision) in layouts.items():
        model = Seed2Tokenizer.from_pretrained(source, vision=vision)
        codes = model.encode(pixels)
        if not torch.equal(codes, expected[0]):
            wrong = int((codes != expected[0]).sum())
            raise CheckpointError(f"{name}: read back, {wrong} of {codes.numel()} codes differ from the training "
                                  "modules'; nothing was kept.")
        if not torch.allclose(model.decode(codes), expected[1], rtol=1e-3, atol=1e-4):
            raise CheckpointError(f"{name}: read back it decodes to another embedding than the training modules; "
                                  "nothing was kept.")
    return list(layouts)


def _pixels(picture: Image.Image | str | Path | None, size: int) -> Tensor:
    if picture is None:
        ramp = Image.linear_gradient("L")
        picture = Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(45)))
    return seed_image_processor(size)(open_image(picture))[None]


# ---- files


def _check_target(target: Path, force: bool) -> None:
    if target.is_file():
        raise ConfigError(f"{target}: is a file; the tokenizer needs a folder.")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ConfigError(f"{target}: exists already and is not empty (--force replaces it).")


def _write(model: Seed2Tokenizer, folder: Path, released: bool, beside: Sequence[str | Path]) -> None:
    save_folder(model, folder)
    if released:
        state = model.state_dict()
        quantizer = {name: value for name, value in state.items() if not name.startswith(TOWER)}
        tower = {name.removeprefix(TOWER): value for name, value in state.items() if name.startswith(TOWER)}
        for tensors, name in ((quantizer, RELEASED_QUANTIZER), (tower, RELEASED_TOWER)):
            with open(folder / name, "wb") as handle:
                torch.save({key: value.clone() for key, value in tensors.items()}, handle)
                handle.flush()
                os.fsync(handle.fileno())
    for file in beside:
        shutil.copyfile(file, folder / Path(file).name)


def _put(temporary: Path, target: Path) -> None:
    """`temporary` becomes `target` by renaming; a folder that was there is removed last."""
    if not (target.is_dir() and any(target.iterdir())):
        os.replace(temporary, target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    os.replace(target, old)
    os.replace(temporary, target)
    shutil.rmtree(old)
