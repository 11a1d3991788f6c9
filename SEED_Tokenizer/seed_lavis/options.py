"""Every key that the YAML files may hold, with its default: the sections `model` and `run`, typed.

A key that is not here is refused by name with the nearest one that is. Defaults are the released training's; keys
that the original did not have are marked "ours" and do nothing by default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import setting
from seed_multimodal.training.codebook import CodebookHealth
from seed_multimodal.training.config import WAIT_MINUTES

APPLICATION = Path(__file__).resolve().parents[1]
REPOSITORY = APPLICATION.parent
PRECISIONS = ("fp16", "bf16", "fp32")


@dataclass
class ModelOptions:
    """Options of all models. `vit` and `qformer` (ours) override single sizes of `EvaConfig` and `QFormerConfig`."""

    arch: str = ""
    model_type: str = "pretrain"
    load_pretrained: bool = True
    pretrained: str | None = None
    load_finetuned: bool = False
    finetuned: str | None = None
    vit_model: str = setting("eva_clip_g", choices=("eva_clip_g",))
    image_size: int = 224
    drop_path_rate: float = 0.0
    use_grad_checkpoint: bool = False
    vit_precision: str = setting("fp16", choices=PRECISIONS)
    freeze_vit: bool = True
    num_query_token: int = setting(32, least=1)
    cross_attention_freq: int = setting(2, least=1)
    max_txt_len: int = setting(32, least=2)
    # ours
    vit_weights: str | None = None
    vit: dict[str, Any] = setting(factory=dict)
    qformer: dict[str, Any] = setting(factory=dict)
    compile: bool = False


@dataclass
class Stage1Options(ModelOptions):
    """`blip2_casual`: contrast with captions, and (ours) regression of an image embedding if `embedding_weight` > 0.

    That target is the samples' `target` with `embedding_dim` given, else `clip_model`'s embedding of the image.
    """

    embed_dim: int = setting(256, least=1)
    # ours
    text_tokenizer: str | None = "bert-base-uncased"
    vocab_size: int = setting(30523, least=1)
    temperature: float = setting(0.07, least=1e-6)
    label_smoothing: float = setting(0.1, least=0, most=1)
    lm_head: bool = True
    gather_gradient: bool | None = None
    itc_weight: float = 1.0
    embedding_weight: float = 0.0
    embedding_dim: int | None = None
    clip_model: str | None = None
    clip_precision: str = setting("fp16", choices=PRECISIONS)


@dataclass
class CodebookOptions(CodebookHealth, ModelOptions):
    """Options of both stage-2 models, with those of `CodebookHealth` (ours)."""

    codebook_embed_dim: int = setting(32, least=1)
    n_embed: int = setting(8192, least=1)
    # ours: sizes and losses
    decode_depth: int = setting(4, least=0)
    decode_heads: int = setting(12, least=1)
    reverse_depth: int = setting(4, least=0)
    loss_weights: dict[str, float] = setting(factory=dict)
    freeze_qformer: bool = True
    frozen_dropout: bool = True
    corrupt: float = setting(0.0, least=0, most=1)
    nested: float = setting(0.0, least=0, most=1)
    # ours: the codebook
    ema_decay: float | None = setting(None, least=0, most=0.999999)
    normalize_codes: bool = False
    codebook_sections: int = 1

    def __post_init__(self) -> None:
        if not self.freeze_vit:
            raise ConfigError("model.freeze_vit is false, but stage 2 never trains the vision tower: train it in stage "
                              "1.")


@dataclass
class Stage2Options(CodebookOptions):
    """`blip2_codebook_all_image`: both decode heads by `use_qformer_image`."""

    use_qformer_image: bool = False
    image_features_dim: int = setting(1024, least=1)
    clip_model: str | None = "pretrained/CLIP-ViT-H-14-laion2B-s32B-b79K"
    # ours
    clip_precision: str = setting("fp16", choices=PRECISIONS)
    recon_s: bool = True
    scaled_start: bool = False
    readout_weight: str | None = None
    label_weight: float = setting(0.0, least=0)
    label_heads: str | None = None


@dataclass
class Seed1Options(CodebookOptions):
    """`seed1_codebook_text`: SEED-1's 77 text-like embeddings."""

    text_tokens: int = setting(77, least=1)
    text_features_dim: int = setting(768, least=1)
    text_encoder: str | None = "pretrained/stable-diffusion-v1-4"
    clip_precision: str = setting("fp16", choices=PRECISIONS)


@dataclass
class LavitOptions(CodebookHealth, ModelOptions):
    """`lavit_tokenizer`: LaVIT's stage 1. `merger` and `decoder` override single sizes of `LavitTokenizerConfig` and
    `LavitDecoderConfig`, `loss_weights` factors of `LavitStage1Weights`; see `LavitStage1` for the rest."""

    n_embed: int = setting(16384, least=1)
    codebook_embed_dim: int = setting(32, least=1)
    merger: dict[str, Any] = setting(factory=dict)
    decoder: dict[str, Any] = setting(factory=dict)
    loss_weights: dict[str, float] = setting(factory=dict)
    ema_decay: float = setting(0.99, least=0, most=0.999999)
    freeze_selector: bool = False
    selector_lr_scale: float = setting(1.0, least=1e-6, most=1e6)


@dataclass
class RunOptions:
    """The section `run`, read by our runner, LAVIS's runner and LAVIS's schedules."""

    task: str = "image_text_pretrain"
    runner: str = "runner_seed"
    lr_sched: str = "linear_warmup_cosine_lr"
    init_lr: float = setting(1e-4, least=0)
    min_lr: float = setting(1e-5, least=0)
    warmup_lr: float = -1.0
    warmup_steps: int = setting(0, least=0)
    lr_decay_rate: float | None = None
    weight_decay: float = setting(0.05, least=0)
    beta2: float = setting(0.999, least=0, most=0.999999)
    max_epoch: int = setting(1, least=1)
    batch_size_train: int = setting(64, least=1)
    batch_size_eval: int = setting(16, least=1)
    num_workers: int = setting(4, least=0)
    accum_grad_iters: int = setting(1, least=1)
    log_freq: int = setting(50, least=1)
    seed: int = setting(42, least=0, most=2**32 - 1)
    output_dir: str = "log/run"
    amp: bool = False
    resume_ckpt_path: str | None = None
    evaluate: bool = False
    train_splits: list[str] = setting(factory=lambda: ["train"])
    valid_splits: list[str] = setting(factory=list)
    test_splits: list[str] = setting(factory=list)
    device: str = "auto"
    world_size: int = 1
    dist_url: str = "env://"
    distributed: bool = True
    use_dist_eval_sampler: bool = False
    train_dataset_ratios: dict[str, float] = setting(factory=dict)
    # ours
    lr_scheduler_kwargs: dict[str, Any] = setting(factory=dict)
    valid_every_epochs: int = setting(1, least=1)
    valid_batches: int = setting(0, least=0)
    iters_per_epoch: int = setting(5000, least=1)
    resume: str = setting("auto", choices=("auto", "never"))
    precision: str = setting("auto", choices=("auto", *PRECISIONS))
    clip_grad: float = setting(0.0, least=0, most=math.inf)
    ema: float = setting(0.0, least=0, most=0.999999)
    tensorboard: bool = False
    save_seconds: float = setting(300.0, least=0, most=math.inf)
    save_every_steps: int = setting(0, least=0)
    keep_checkpoints: int = setting(0, least=0)
    max_bad_in_a_row: int = setting(20, least=1)
    timeout_minutes: float = setting(WAIT_MINUTES, least=0)
    # set while running
    rank: int = 0
    gpu: int = 0


def section_at(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """`values[key]`, which must be a section of keys; an empty one if it is not given."""
    section = values.get(key)
    if section is None:
        return {}
    if not isinstance(section, Mapping | DictConfig):
        raise ConfigError(f"{where}.{key} must be a section of keys, not {section!r}.")
    return section


def locate(path: str) -> str:
    """A path of the YAML as it can be opened: absolute, or found from the current folder, SEED_Tokenizer or the
    repository, in this order. A path found nowhere (a hub id, a pattern, a missing file) is returned as it is."""
    if Path(path).is_absolute():
        return path
    for folder in (Path(), APPLICATION, REPOSITORY):
        # Patterns (braces, wildcards) exist if the folder before their first special character does.
        plain = Path(path)
        while any(mark in str(plain) for mark in "{*?["):
            plain = plain.parent
        if str(plain) != "." and (folder / plain).exists():
            return str(folder / path)
    return path
