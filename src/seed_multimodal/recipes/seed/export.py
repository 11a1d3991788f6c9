"""Export: joins checkpoints of both stages and the vision encoder into one tokenizer folder.

    stage 1           Qformer (query path), query_tokens, ln_vision, and a trained visual_encoder
    stage 2           quantize, task layers, blocks, positions, decoder, and trained encoder parts
    vision encoder    eva_vit_g.pth, unless a stage holds it

Training checkpoints omit frozen parts, so each part is taken from the latest file that has it.
Stage 2's decoder determines SEED-2 or SEED-1; checkpoints of the published training code have both
and are exported as SEED-2 unless `seed1` is set.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.disk import JsonObject, atomic_folder, output_folder
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.images.io import open_image
from seed_multimodal.language.hub_tokenizer import load_text_tokenizer
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.models.seed.checkpoints import ENCODER_PARTS, VISION, VISION_FILES
from seed_multimodal.models.seed.configuration import TokenizerConfig
from seed_multimodal.models.seed.modeling import Seed1Tokenizer, Seed2Tokenizer, SeedTokenizer
from seed_multimodal.nn.vision.eva import EvaConfig
from seed_multimodal.state_dicts import load_state_dict, save_torch
from seed_multimodal.weights.catalogue import download_advice

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
        """The report as lines, one for each file and one for the codes."""
        parts_by_file: dict[str, list[str]] = {}
        for part, file in self.parts.items():
            parts_by_file.setdefault(file, []).append(part)
        lines = [f"{file}: gave {', '.join(parts)}." for file, parts in parts_by_file.items()]
        return [*lines, f"{self.folder}: codes of the test image: {' '.join(map(str, self.codes))}"]


def export_tokenizer(
    stage2: str | Path,
    out: str | Path,
    *,
    stage1: str | Path | None = None,
    vision: str | Path | None = None,
    config: TokenizerConfig | str | Path | None = None,
    kind: str = AUTO,
    write_original: bool = False,
    image: Image.Image | str | Path | None = None,
    text_tokenizer: TextTokenizer | None = None,
    force: bool = False,
) -> Export:
    """Join stage checkpoints into a tokenizer folder.

    The codes of a test image are compared before and after writing.

    stage1: may be None if stage 2 trained the encoder.
    vision: file or folder of the vision encoder, if no stage holds it and its sizes name none.
    config: sizes, or a config.json; None: ours next to a checkpoint, else the original ones.
    kind: `seed2`, `seed1` or `auto`.
    write_original: also write the files of the original layout.
    image: the test image; None: a gradient.
    text_tokenizer: of the language model, written to the folder, too.
    force: replace a folder that is not empty.

    Raises:
        CheckpointError: a part that no file holds, tensors of another size, codes that differ, or
            another number of codes than the text tokenizer has tokens for.
        ConfigError: `out` exists and is not empty, holds an input, or cannot be written.
    """
    output = Path(out)
    target = output_folder(out, force=force, label="the tokenizer", inputs=[stage1, stage2, vision])

    # 1. Checkpoints and sizes: given ones, those next to a checkpoint, or the original ones.
    stage2_file = str(stage2)
    files = {str(file): load_state_dict(file) for file in (stage1, stage2) if file is not None}
    kind = _choose(kind, files[stage2_file], stage2)
    tokenizer_class = KINDS[kind]
    files[stage2_file] = tokenizer_class.original_names(files[stage2_file])
    sizes: TokenizerConfig | None
    sizes = tokenizer_class.read_config(config) if isinstance(config, (str, Path)) else config
    for file in reversed(files):  # stage 2's count first
        sizes = sizes or tokenizer_class.layout.saved_config(Path(file).parent)
    sizes = sizes or tokenizer_class.config_class.of_original(files[stage2_file])
    if text_tokenizer is not None:
        vocabulary = text_tokenizer.vocabulary
        n_codes = vocabulary.n_codes
        length = vocabulary.tokens_per_image
        if (n_codes, length) != (sizes.codebook_size, sizes.num_query):
            raise CheckpointError(
                f"{stage2}: has {sizes.codebook_size} codes, {sizes.num_query} to an image, but "
                f"the text tokenizer has tokens for {n_codes}, {length} to an image."
            )

    # 2. Each tensor's file.
    origin = _latest(files, stage2_file)
    if not any(name.startswith(VISION) for name in origin):
        vision_file = str(vision or sizes.vit.default_weights or "")
        if not vision_file:
            raise CheckpointError(
                f"{stage2}: no stage holds the frozen vision encoder; give its file as the "
                f"vision file ({download_advice('tokenizer')})."
            )
        vision_tensors = sizes.vit.read_weights(vision_file)
        files[vision_file] = {VISION + key: value for key, value in vision_tensors.items()}
        origin |= dict.fromkeys(files[vision_file], vision_file)

    # 3. The tokenizer, and the codes of the test image.
    state = {name: files[file][name] for name, file in origin.items()}
    model = tokenizer_class.from_original(sizes, state, " and ".join(files))
    test_image = Image.linear_gradient("L") if image is None else open_image(image).image
    pixels = model.visual_encoder.preprocessing(test_image.convert("RGB"))
    codes = model.encode(pixels)

    # 4. The folder, which is only kept if its tokenizer computes the same codes.
    with atomic_folder(target, output, ConfigError) as folder:
        model.save_pretrained(folder)
        if write_original:
            _write_original(model, folder)
        if text_tokenizer is not None:
            text_tokenizer.save_pretrained(folder)
        if not torch.equal(tokenizer_class.from_pretrained(folder).encode(pixels), codes):
            raise CheckpointError(
                f"{output}: the written tokenizer gives other codes; nothing was kept."
            )
    parts = {part_of(key): origin[key] for key in model.state_dict() if key in origin}
    return Export(output, kind, parts, codes[0].tolist())


def part_of(name: str) -> str:
    """The first part of a tensor's name."""
    return name.split(".")[0]


def _choose(kind: str, state: Mapping[str, Tensor], file: str | Path) -> str:
    """The kind of a stage-2 checkpoint's tokenizer."""
    # A file has the decoder of one tokenizer, or of both.
    kinds = [name for name, tokenizer in KINDS.items() if tokenizer.layout.decoder in state]
    if "quantize.embedding.weight" not in state or not kinds:
        raise CheckpointError(
            f"{file}: not a stage-2 checkpoint: it holds no codebook with a decoder (its first "
            f"tensor is {next(iter(state))!r})."
        )
    if kind not in (AUTO, *kinds):
        raise CheckpointError(
            f"{file}: a stage-2 checkpoint of {kinds[0]}; export it as {kinds[0]} or {AUTO}."
        )
    return kinds[0] if kind == AUTO else kind


def _latest(files: Mapping[str, Mapping[str, Tensor]], stage2: str) -> dict[str, str]:
    """The file of each tensor; parts of the encoder are stage 2's only if it trained them."""
    # 1. Buffers are always saved, so position_ids do not mean that stage 2 trained the Q-Former.
    trained = {part_of(name) for name in files[stage2] if not name.endswith("position_ids")}

    # 2. Later files override earlier ones.
    origin: dict[str, str] = {}
    for file, tensors in files.items():
        for name in tensors:
            part = part_of(name)
            is_of_stage2 = part in trained
            if part not in ENCODER_PARTS or is_of_stage2 == (file == stage2):
                origin[name] = file

    # 3. Only the vision encoder may be missing.
    parts = {part_of(name) for name in origin}
    for part in ENCODER_PARTS[1:]:
        if part not in parts:
            raise CheckpointError(
                f"{' and '.join(files)}: no file holds {part!r}; give the stage-1 checkpoint that "
                "stage 2 started from."
            )
    return origin


def _write_original(model: SeedTokenizer, folder: Path) -> None:
    """Write the files of a tokenizer's original layout, which is EVA's."""
    if not isinstance(model.config.vit, EvaConfig):
        raise ConfigError("The original layout has no place for another vision encoder than EVA.")
    # SEED-2's encoder and decoder are in one file.
    files: dict[str, dict[str, Tensor]] = {}
    for name, value in model.state_dict().items():
        file = model.layout.files[-1]
        if name.startswith(VISION):
            file = VISION_FILES[-1]
        elif part_of(name) in ENCODER_PARTS:
            file = model.layout.files[0]
        files.setdefault(file, {})[name.removeprefix(VISION)] = value.clone()
    for file, tensors in files.items():
        is_wrapped = model.layout.wrapped and file in model.layout.files
        save_torch({"model": tensors} if is_wrapped else tensors, folder / file)


def export_command(checkpoint: str, args: Namespace) -> tuple[JsonObject, str]:
    """`seed export-tokenizer --stage2`: compared with the training modules on an image."""
    # With the text tokenizer's files the folder is complete for a language model.
    text_tokenizer = load_text_tokenizer(args.text_tokenizer) if args.text_tokenizer else None
    report = export_tokenizer(
        checkpoint,
        args.out,
        stage1=args.stage1,
        vision=args.vision,
        config=args.config,
        kind=args.kind,
        write_original=args.released,
        image=args.image,
        text_tokenizer=text_tokenizer,
        force=args.force,
    )
    record = {
        "folder": str(report.folder),
        "kind": report.kind,
        "parts": report.parts,
        "image": str(args.image or "generated"),
        "codes": report.codes,
    }
    return record, "\n".join(report.lines())
