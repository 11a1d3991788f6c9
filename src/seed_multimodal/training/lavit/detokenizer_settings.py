"""Typed settings of the pixel decoders' training, behind `MultiModalLLM/configs/lavit_detokenizer/`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seed_multimodal.data.stream.drawn_pairs import DrawnView
from seed_multimodal.diffusion.training import Trained
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import setting
from seed_multimodal.training.lavit.picture_codes import Mode
from seed_multimodal.training.llm.model_settings import find_folder
from seed_multimodal.training.pixel_decoder.settings import PictureData, PixelRun, read_pixel_run


@dataclass
class LavitPixelModel:
    """What is trained, and what it is trained with.

    Attributes:
        diffusion: a diffusers folder: U-Net (without `start`), autoencoder and noise schedule, of SDXL's kind or of
            Stable Diffusion 1's (which needs `uncond_embeddings.bin`, or text encoder and tokenizer to make it).
        tokenizer: the dynamic tokenizer, as `load_dynamic_tokenizer`.
        decoder: the code decoder, as `CodeDecoder.from_pretrained`; if its head is for the other kind of U-Net, the
            training begins with a new one.
        start: an earlier result to begin with: U-Net and code decoder; "": those of `diffusion` and `decoder`.
        trained: of the U-Net, `all` or `key_value`; the heads always are.
        selection, selection_seed: which patches are kept, see `PictureCodes`.
        dropout: see `LavitPixelLoss`.
        seed: of a new head.
    """

    diffusion: Path
    tokenizer: Path
    decoder: Path
    start: str = ""
    trained: Trained = "all"
    selection: Mode = "draw"
    selection_seed: int = setting(0, least=0)
    dropout: float = setting(0.1, least=0, most=1)
    gradient_checkpointing: bool = False
    seed: int = setting(0, least=0)


@dataclass
class LavitPictures(PictureData):
    """The pictures of a run; see `PictureData`."""

    tower_size: int = setting(224, least=1)

    @property
    def view(self) -> DrawnView:
        """What is drawn and seen of a picture."""
        return dataclasses.replace(super().view, seen_by="bicubic")


def read_lavit_pixel_run(config: Mapping[str, Any]) -> PixelRun[LavitPixelModel]:
    """Check a resolved configuration.

    Raises:
        ConfigError: as `read_pixel_run`, and values that do not go together.
    """
    run = read_pixel_run(config, LavitPixelModel, LavitPictures, configs="lavit_detokenizer", result="pixel decoder")
    edits = next((source.name for source in run.data.sources if source.condition_key), None)
    if edits is not None:
        raise ConfigError(f"data: source {edits!r} has a condition_key, but LaVIT reads no condition picture.")
    model = run.model
    model.diffusion, model.tokenizer = find_folder(model.diffusion), find_folder(model.tokenizer)
    model.decoder = find_folder(model.decoder)
    model.start = str(find_folder(model.start)) if model.start else ""
    return run
