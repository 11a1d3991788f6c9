"""Export: joins checkpoints of both stages and the vision encoder into one tokenizer folder.

    stage 1           Qformer (its query path), query_tokens, ln_vision; visual_encoder if it was trained
    stage 2           quantize, task layers, blocks, positions, decoder; parts of the encoder if they were trained on
    vision encoder    eva_vit_g.pth, unless a stage holds it

Training checkpoints omit frozen parts, so each part is taken from the latest file that has it. Stage 2's decoder
determines SEED-2 or SEED-1; checkpoints of the published training code have both and are exported as SEED-2 unless
`seed1` is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.disk import atomic_folder, output_folder
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.seed.checkpoints import (
    ENCODER_PARTS,
    VISION,
    VISION_FILES,
    VISION_URL,
    read_vision,
    saved_config,
)
from seed_multimodal.seed.configuration import TokenizerConfig
from seed_multimodal.seed.modeling import Seed1Tokenizer, Seed2Tokenizer, SeedTokenizer
from seed_multimodal.weights import load_state_dict, save_torch

AUTO = "auto"
KINDS: dict[str, type[SeedTokenizer]] = {"seed2": Seed2Tokenizer, "seed1": Seed1Tokenizer}


@dataclass(frozen=True)
class Export:
    """Report of an export: source file of each part, and codes of the test image."""

    folder: Path
    kind: str
    parts: dict[str, str]
    codes: list[int]

    def lines(self) -> list[str]:
        """The report as lines."""
        lines = [
            f"{file}: gave {', '.join(part for part, source in self.parts.items() if source == file)}."
            for file in dict.fromkeys(self.parts.values())
        ]
        return [*lines, f"{self.folder}: codes of the test image: {' '.join(map(str, self.codes))}"]


def export_tokenizer(
    stage2: str | Path,
    out: str | Path,
    *,
    stage1: str | Path | None = None,
    vision: str | Path | None = None,
    config: TokenizerConfig | str | Path | None = None,
    kind: str = AUTO,
    released: bool = False,
    image: Image.Image | str | Path | None = None,
    further: Mapping[str, bytes] | None = None,
    words: ImageVocabulary | None = None,
    force: bool = False,
) -> Export:
    """Join stage checkpoints into a tokenizer folder and compare the codes of an image before and after writing.

    Args:
        stage1: may be left out if stage 2 trained the encoder. vision: file or CLIP folder of the vision encoder, if no
            stage holds it.
        config: sizes, or a config.json; default: ours next to a checkpoint, else the original ones.
        kind: `seed2`, `seed1` or `auto`. released: also write the files of the original layout.
        further: files for the folder; words: the vocabulary in them.
        force: replace a folder that is not empty.

    Raises:
        CheckpointError: a part that no file holds, tensors of another size, codes that differ, `words` of others.
        ConfigError: `out` exists and is not empty, holds what is read, or cannot be written.
    """
    shown, target = (
        Path(out),
        output_folder(out, force=force, label="the tokenizer", inputs=[stage1, stage2, vision]),
    )
    files = {str(file): load_state_dict(file) for file in (stage1, stage2) if file is not None}
    name, tokenizer = _choose(kind, files[str(stage2)], stage2)
    if config is None:
        config = next(
            filter(None, (saved_config(tokenizer, Path(file).parent) for file in reversed(files))),
            None,
        )
    sizes: Any = tokenizer.read_config(config) if isinstance(config, str | Path) else config
    files[str(stage2)] = tokenizer.original_names(files[str(stage2)])
    origin = _latest(files, str(stage2))
    if not any(part.startswith(VISION) for part in origin):
        if vision is None:
            raise CheckpointError(
                f"{stage2}: no stage holds the frozen vision encoder; download it from {VISION_URL} "
                "and give it as the vision file."
            )
        tensors = read_vision(vision, None if sizes is None else sizes.vit)
        files[str(vision)] = {VISION + part: value for part, value in tensors.items()}
        origin |= dict.fromkeys(files[str(vision)], str(vision))
    state = {part: files[file][part] for part, file in origin.items()}
    sizes = sizes or tokenizer.config_class.of_original(state)
    if words is not None and (words.n_codes, words.tokens_per_image) != (
        sizes.codebook_size,
        sizes.num_query,
    ):
        raise CheckpointError(
            f"{stage2}: has {sizes.codebook_size} codes, {sizes.num_query} to an image, but the text "
            f"tokenizer has words for {words.n_codes}, {words.tokens_per_image} to an image."
        )
    model = tokenizer.from_original(sizes, state, " and ".join(files))
    test_image = Image.linear_gradient("L").convert("RGB") if image is None else open_image(image)
    pixels = seed_image_processor(sizes.vit.image_size)(test_image)[None]
    codes = model.encode(pixels)
    with atomic_folder(target, shown, ConfigError) as folder:
        model.save_pretrained(folder)
        for file, saved in original_files(model).items() if released else ():
            save_torch(saved, folder / file)
        for file, content in (further or {}).items():
            (folder / file).write_bytes(content)
        if not torch.equal(tokenizer.from_pretrained(folder).encode(pixels), codes):
            raise CheckpointError(
                f"{shown}: the written tokenizer gives other codes; nothing was kept."
            )
    parts = {part_of(part): origin[part] for part in model.state_dict() if part in origin}
    return Export(shown, name, parts, codes[0].tolist())


def part_of(name: str) -> str:
    """The first part of a tensor's name."""
    return name.split(".")[0]


def _choose(
    kind: str, state: Mapping[str, Tensor], file: str | Path
) -> tuple[str, type[SeedTokenizer]]:
    """Name and class of a stage-2 checkpoint's tokenizer."""
    held = [name for name, tokenizer in KINDS.items() if tokenizer.layout.decoder in state]
    if "quantize.embedding.weight" not in state or not held:
        raise CheckpointError(
            f"{file}: not a stage-2 checkpoint: it holds no codebook with a decoder (its first "
            f"tensor is {next(iter(state))!r})."
        )
    if kind not in (AUTO, *held):
        raise CheckpointError(
            f"{file}: a stage-2 checkpoint of {held[0]}; export it as {held[0]} or {AUTO}."
        )
    name = held[0] if kind == AUTO else kind
    return name, KINDS[name]


def _latest(files: Mapping[str, Mapping[str, Tensor]], stage2: str) -> dict[str, str]:
    """Tensor → the file that it is taken from: parts of the encoder from stage 2 if that trained them."""
    # Buffers are always saved, so a position_ids alone does not mean that stage 2 holds the Q-Former.
    trained = {part_of(name) for name in files[stage2] if not name.endswith("position_ids")} & {
        *ENCODER_PARTS
    }
    origin = {
        name: file
        for file, tensors in files.items()
        for name in tensors
        if part_of(name) not in ENCODER_PARTS or (part_of(name) in trained) == (file == stage2)
    }
    missing = [part for part in ENCODER_PARTS[1:] if part not in {part_of(name) for name in origin}]
    if missing:
        raise CheckpointError(
            f"{' and '.join(files)}: no file holds {missing[0]!r}; give the stage-1 checkpoint that "
            "stage 2 started from."
        )
    return origin


def original_files(model: SeedTokenizer) -> dict[str, dict[str, Any]]:
    """The content of each file of a tokenizer's original layout, the vision encoder's last."""
    layout = model.layout
    files: dict[str, dict[str, Any]] = {name: {} for name in (*layout.files, VISION_FILES[-1])}
    for name, value in model.state_dict().items():
        if name.startswith(VISION):
            files[VISION_FILES[-1]][name.removeprefix(VISION)] = value.clone()
        else:
            files[layout.files[0 if part_of(name) in ENCODER_PARTS else -1]][name] = value.clone()
    if layout.wrapped:
        files |= {name: {"model": files[name]} for name in layout.files}
    return files
