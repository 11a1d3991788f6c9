"""Opening a tokenizer for evaluation, with the resizing, decoder, and CLIP target that belong to it.

`model` is a system (`nano`, `released`, a folder with system.json) or a tokenizer alone (a folder that
`seed export-tokenizer` made, or a file). A tokenizer alone resizes as the released evaluation does: squash, bicubic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from seed_multimodal.detokenizers.unclip import UnclipDetokenizer
from seed_multimodal.device import Runtime
from seed_multimodal.errors import CheckpointError
from seed_multimodal.hub import PARTS, locate
from seed_multimodal.images.transforms import ImageTransform, get_transform
from seed_multimodal.systems.open_system import kind_of
from seed_multimodal.systems.pictures import PictureCodec
from seed_multimodal.systems.system_spec import PictureParts, find_pictures
from seed_multimodal.tokenizers.clip_weights import CLIP_FOLDER, load_clip_vision
from seed_multimodal.tokenizers.fast import FastTokenizer, optimise
from seed_multimodal.tokenizers.initial import check_unclip
from seed_multimodal.tokenizers.seed2 import Seed2Tokenizer

UNCLIP = PARTS["unclip"].folder
NONE = "none"
PartPath = str | Path | None
Log = Callable[[str], None] | None


@dataclass
class OpenedTokenizer:
    """A tokenizer ready to be measured.

    Attributes:
        folder: where it lies (its language tokenizer may lie there too).
        transform: picture → pixels the tokenizer reads.
        clip: frozen CLIP vision tower that gives the target embedding, and `clip_transform` for it; None if there is
            none; `clip_source`: its origin.
        fast: the tokenizer's encoder on packed weights, or None to encode with its own modules.
    """

    name: str
    folder: Path
    codec: PictureCodec
    transform: ImageTransform
    clip: Any | None
    clip_transform: ImageTransform
    clip_source: str
    fast: FastTokenizer | None = None

    @property
    def tokenizer(self) -> Seed2Tokenizer:
        """The tokenizer itself."""
        return self.codec.model


def open_tokenizer(model: str | Path, runtime: Runtime, *, decoder: PartPath = None, clip: PartPath = None,
                   interpolation: str | None = None, fast: bool = False,
                   log: Log = None) -> OpenedTokenizer:
    """Load what `model` names, and the parts found for it.

    Args:
        decoder: diffusers folder; default: the system's, the tokenizer folder's `diffusion_model`, or the released one
            where it is on this disk. "none": no pictures are rebuilt.
        clip: CLIP folder of the target embedding; default: the decoder's `image_encoder`, else the released one.
        interpolation: overrides how pictures are resized.
        fast: encode on packed weights; the same codes but for rounding, and the encoder's memory once more.

    Raises:
        CheckpointError: no such tokenizer, or a given part that is missing or does not fit it.
    """
    parts = _parts(str(model))
    source, settings = parts.tokenizer, parts.transform
    tokenizer = Seed2Tokenizer.from_pretrained(source, vision=parts.vision, device=runtime.device, dtype=runtime.dtype)
    size = tokenizer.config.vit.image_size
    if interpolation is not None:
        settings = {**settings, "interpolation": interpolation}
    transform = get_transform(**{**settings, "image_size": size})
    drawing = _given(decoder, parts.detokenizer)
    if drawing is not None:
        guessed = decoder is None and drawing == locate(UNCLIP)
        drawing = _fitting_decoder(drawing, tokenizer, required=not guessed, log=log)
    load = None
    if drawing is not None:
        load = partial(UnclipDetokenizer.from_pretrained, drawing, device=runtime.device, dtype=runtime.dtype)
    codec = PictureCodec(tokenizer, transform, load_decoder=load, device=runtime.device)
    target = _given(clip, _default_clip(drawing))
    tower = None
    if target is not None:
        tower = load_clip_vision(target, device=runtime.device, dtype=runtime.dtype, log=log)
        tower = _fitting(tower, target, tokenizer, required=clip is not None, log=log)
    clip_size = tower.config.image_size if tower is not None else size
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    return OpenedTokenizer(str(model), folder, codec, transform, tower,
                           get_transform(**{**settings, "image_size": clip_size}),
                           str(target) if tower is not None else "",
                           optimise(tokenizer) if fast else None)


def _parts(model: str) -> PictureParts:
    """The parts of what `model` names; `CheckpointError` for another system."""
    if (kind := kind_of(model)) != "seed_llama":
        raise CheckpointError(f"{model}: is a {kind}; this measures SEED-2's kind of tokenizer. How it rebuilds "
                              "pictures stands in its report: its report.md.")
    return find_pictures(model)


def _given(value: PartPath, default: Path | None) -> Path | None:
    if value is None:
        return default
    return None if str(value) == NONE else Path(value)


def _default_clip(drawing: Path | None) -> Path | None:
    inside = drawing / "image_encoder" if drawing is not None else None
    if inside is not None and (inside / "config.json").is_file():
        return inside
    return locate(f"pretrained/{CLIP_FOLDER}")


def _fitting_decoder(folder: Path, tokenizer: Seed2Tokenizer, required: bool, log: Log) -> Path | None:
    """The decoder, if it draws embeddings of this tokenizer's width; checked before the pass over the pictures."""
    try:
        check_unclip(folder, tokenizer.config.image_features_dim, None)
    except CheckpointError as error:
        if required:
            raise
        if log is not None:
            log(f"No pictures are rebuilt: {error}")
        return None
    return folder


def _fitting(tower: Any, source: Path, tokenizer: Seed2Tokenizer, required: bool, log: Log) -> Any | None:
    """The CLIP tower, if its embedding is as wide as what the tokenizer decodes to."""
    has, needs = tower.config.projection_dim, tokenizer.config.image_features_dim
    if has == needs:
        return tower
    sentence = f"{source}: gives image embeddings of width {has}, this tokenizer decodes to width {needs}"
    if required:
        raise CheckpointError(f"{sentence}: they do not belong together.")
    if log is not None:
        log(f"{sentence}, so it is not used.")
    return None
