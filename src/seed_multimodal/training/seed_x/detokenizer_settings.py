"""Typed settings of the de-tokenizer's training, behind `MultiModalLLM/configs/seed_x_detokenizer/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from seed_multimodal.diffusion.training import ConditionDropout, Trained
from seed_multimodal.errors import ConfigError
from seed_multimodal.seed_x.adapter import ResamplerSizes
from seed_multimodal.seed_x.vision import QwenVitConfig
from seed_multimodal.settings import setting
from seed_multimodal.training.llm.model_settings import find_folder
from seed_multimodal.training.pixel_decoder.settings import PixelRun, read_pixel_run


@dataclass
class DetokenizerModel:
    """What is trained, and what it is trained with.

    Attributes:
        stage: 1: drawing from embeddings; 2: beside a condition picture.
        sdxl: SDXL's diffusers folder: U-Net (without `start`), autoencoder and noise schedule.
        tower: the vision tower's weights, as `QwenVit.from_pretrained`; tower_sizes: None for the released ones, or
            those beside the weights.
        start: an adapter to begin with, for stage 2 the first stage's; "": SDXL's U-Net and a new resampler.
        resampler: sizes of the new resampler.
        trained: `key_value` (and the resampler; the paper's first stage) or `all` (the released second stage).
        tokens: embeddings of a picture after pooling, 64 by the paper; 0 or the tower's own number: no pooling.
        dropout: see `ConditionDropout`.
        seed: of the new resampler.
    """

    sdxl: Path
    tower: Path
    stage: Literal[1, 2] = 1
    tower_sizes: QwenVitConfig | None = None
    start: str = ""
    resampler: ResamplerSizes = setting(factory=ResamplerSizes)
    trained: Trained = "key_value"
    tokens: int = setting(64, least=0)
    dropout: ConditionDropout = setting(factory=ConditionDropout)
    gradient_checkpointing: bool = False
    seed: int = setting(0, least=0)


def read_detokenizer_run(config: Mapping[str, Any]) -> PixelRun[DetokenizerModel]:
    """Check a resolved configuration.

    Raises:
        ConfigError: as `read_pixel_run`, and values that do not go together.
    """
    run = read_pixel_run(config, DetokenizerModel, configs="seed_x_detokenizer", result="adapter")
    model = run.model
    edits = next((source.name for source in run.data.sources if source.condition_key), None)
    if model.stage == 1 and edits is not None:
        raise ConfigError(f"data: source {edits!r} has a condition_key, but the first stage reads no condition picture "
                          "(model.stage=2 does).")
    sizes = model.tower_sizes
    if sizes is not None and run.data.tower_size != sizes.image_size:
        raise ConfigError(f"data: tower_size is {run.data.tower_size}, but the tower of model.tower_sizes sees "
                          f"{sizes.image_size} pixels a side.")
    model.sdxl, model.tower = find_folder(model.sdxl), find_folder(model.tower)
    model.start = str(find_folder(model.start)) if model.start else ""
    return run
