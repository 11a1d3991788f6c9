"""From training to use: the checkpoints of the two stages and the vision tower become one tokenizer folder.

    stage 1         Qformer (its query path), query_tokens, ln_vision; visual_encoder if it was trained
    stage 2         quantize, task layers, blocks, position tables, decode side; encoder parts if they were trained on
    vision tower    eva_vit_g.pth, unless a stage holds it

Training checkpoints leave frozen parts out (`{"model": …, "optimizer": …}`, or our safetensors), so each part is taken
from the latest file that has it. Stage 2's decode side decides between SEED-2 and SEED-1. The result is our folder
(config.json + model.safetensors) and, if asked for, the files of the released layout beside it.
Note: a picture is encoded by the training modules themselves, filled from the stage files, and by what was written,
read back; other codes, and nothing is kept. The folder appears by one rename, complete or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.disk import making_folder, output_folder
from seed_multimodal.errors import CheckpointError, ConfigError, counted
from seed_multimodal.finite import refuse_diverged
from seed_multimodal.images.open import open_image
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.nn.eva import resize_positions
from seed_multimodal.tokenizers.encoder import CodeTokenizer
from seed_multimodal.tokenizers.export_merge import AUTO, Merged, merge, part_of
from seed_multimodal.tokenizers.released import ENCODER_PARTS, OURS, TOWER, VISION_FILES, ReleasedLayout
from seed_multimodal.tokenizers.stage1 import Stage1Model
from seed_multimodal.tokenizers.tokenizer_config import TokenizerConfig
from seed_multimodal.weights import grouped, save_torch

Log = Callable[[str], None] | None


@dataclass
class Export:
    """What an export wrote: the file each part came from, the names of each file that were left out, and the codes
    of the test picture, which every layout in `verified` gave as the training modules did."""

    folder: Path
    kind: str
    config: TokenizerConfig
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
        found += [f"{file}: {counted(len(names), 'tensor')} left out: {grouped(names)}."
                  for file, names in self.ignored.items() if names]
        return [*found, f"{self.folder}: {self.tensors} tensors; same codes as the training modules from "
                        f"{' and '.join(self.verified)}: {' '.join(map(str, self.codes))}"]


def export_tokenizer(
    stage2: str | Path, out: str | Path, *, stage1: str | Path | None = None, vision: str | Path | None = None,
    config: TokenizerConfig | str | Path | None = None, kind: str = AUTO, released: bool = False,
    picture: Image.Image | str | Path | None = None, beside: Mapping[str, bytes] | None = None,
    check: Callable[[int, int, str | Path], None] | None = None, force: bool = False, log: Log = None,
) -> Export:
    """Join stage checkpoints into a tokenizer folder and verify it by encoding a picture.

    Args:
        stage2, stage1, vision: checkpoint files (the tower's may be a CLIP folder); `stage1` may be left out if stage 2
            trained (and holds) the encoder, `vision` if a stage holds the tower.
        config: sizes, or a config.json; default: ours beside a checkpoint, else read off tensors of released widths.
        kind: `seed2`, `seed1`, or `auto`: what stage 2's decode side is (see `export_merge`).
        released: also write the files of that kind's released layout.
        picture: what is encoded to compare (default: a generated one).
        beside: further files for the folder, for example a language tokenizer's; check: gets the number of codes, that
            of a picture's, and the checkpoint, and refuses them if those files do not fit.
        force: replace a folder that is not empty.

    Raises:
        CheckpointError: a part that no file holds, tensors of another size or model or with numbers that are not
            finite, codes that differ.
        ConfigError: `out` exists and is not empty, holds what is read, or cannot be written.
    """
    files = [Path(file) for file in (stage2, stage1) if file is not None]
    read = [stage1, stage2, vision, picture if isinstance(picture, str | Path) else None]
    shown, target = Path(out), output_folder(out, force=force, what="the tokenizer", read=read)
    merged = merge(files[1] if len(files) > 1 else None, files[0], Path(vision) if vision is not None else None, kind,
                   config)
    sizes = merged.sizes
    if check is not None:
        check(sizes.codebook_size, sizes.num_query, stage2)
    model = merged.tokenizer.from_tensors(sizes, merged.state, merged.tower, " and ".join(map(str, reversed(files))),
                                          merged.tower_file)
    pixels = _pixels(picture, sizes.vit.image_size)
    refuse_diverged(model, merged.origin, "the weights")
    expected = source_codes(merged, sizes, pixels)
    report = _report(model, merged, shown)
    report.codes = expected[0][0].tolist()
    tokenizer = merged.tokenizer
    del merged  # a billion numbers at released size
    with making_folder(target, shown, ConfigError) as folder:
        _write(model, folder, released)
        for name, content in (beside or {}).items():
            (folder / name).write_bytes(content)
        del model
        report.verified = _verify(folder, tokenizer, released, pixels, expected)
    if log is not None:
        for line in report.lines():
            log(line)
    return report


def _report(model: CodeTokenizer, merged: Merged, folder: Path) -> Export:
    assert model.load_report is not None
    used = set(model.load_report.loaded)
    origin = {name: file for name, file in merged.origin.items() if name in used}
    parts = {part_of(name): file for name, file in origin.items()}
    ignored = {file: [name for name in names if origin.get(name) != file] + merged.left_out.get(file, [])
               for file, names in merged.files.items()}
    return Export(folder, merged.kind, model.config, parts, ignored, len(used))


# ---- proof


def source_codes(merged: Merged, config: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[B, 32]` and decoded embeddings `[B, …]` of pixels `[B, 3, S, S]` by the training modules themselves."""
    state = merged.state
    fitted = {TOWER + name: value for name, value in merged.tower.items()}
    fitted[f"{TOWER}pos_embed"] = resize_positions(merged.tower["pos_embed"], config.vit.grid)
    with torch.device("meta"):
        first = Stage1Model(config, vocab_size=1, embed_dim=1, lm_head=False)
        second: Any = merged.stage2(config)  # type: ignore[call-arg]
    for model, tensors in ((first, {**state, **fitted}), (second, state)):
        own = model.state_dict()
        model.load_state_dict({name: value for name, value in tensors.items()
                               if name in own and own[name].shape == value.shape}, strict=False, assign=True)
        model.eval()
    with torch.no_grad():
        features = second.pre_quant_from_features(first.query_features(first.vit_features(pixels)))
        codes = second.quantize.nearest(features)
        return codes, second.decode(codes)


def _verify(folder: Path, tokenizer: type[CodeTokenizer], released: bool, pixels: Tensor,
            expected: tuple[Tensor, Tensor]) -> list[str]:
    """Read the written files back; returns the layouts that gave the expected codes."""
    layouts: dict[str, tuple[Path, Path | None]] = {OURS: (folder, None)}
    if released:
        main = tokenizer.layout.main
        layouts[main] = (folder / main, folder / VISION_FILES[-1])
    for name, (source, vision) in layouts.items():
        model = tokenizer.from_pretrained(source, vision=vision)
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


def _write(model: CodeTokenizer, folder: Path, released: bool) -> None:
    model.save_pretrained(folder)
    for name, content in released_files(model.layout, model.state_dict()).items() if released else ():
        save_torch(content, folder / name)


def released_files(layout: ReleasedLayout, state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """A tokenizer's tensors → the content of each file of its released layout, the vision tower's last."""
    files: dict[str, dict[str, Tensor]] = {names[-1]: {} for names in (*layout.files, VISION_FILES)}
    first, last = layout.files[0][-1], layout.main
    for name, value in state.items():
        if name.startswith(TOWER):
            files[VISION_FILES[-1]][name.removeprefix(TOWER)] = value.clone()
        else:
            files[first if part_of(name) in ENCODER_PARTS else last][name] = value.clone()
    return {name: {"model": tensors} if layout.wrapped and name not in VISION_FILES else tensors
            for name, tensors in files.items()}
