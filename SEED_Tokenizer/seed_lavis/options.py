"""Every key that the YAML files may hold, with its default: the sections `model` and `run`, typed.

A key that is not here is refused by name with the nearest one that is. Defaults are the released training's; keys
that the original did not have are marked "ours" and do nothing by default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.settings import check_keys
from seed_multimodal.tokenizers.tokenizer_config import check_sizes

APPLICATION = Path(__file__).resolve().parents[1]
REPOSITORY = APPLICATION.parent
PRECISIONS = ("fp16", "bf16", "fp32")
Options = TypeVar("Options")


@dataclass
class ModelOptions:
    """What all models share. `vit` and `qformer` (ours) override single sizes of `EvaConfig` and `QFormerConfig`."""

    arch: str = ""
    model_type: str = "pretrain"
    load_pretrained: bool = True
    pretrained: str | None = None
    load_finetuned: bool = False
    finetuned: str | None = None
    vit_model: str = "eva_clip_g"
    image_size: int = 224
    drop_path_rate: float = 0.0
    use_grad_checkpoint: bool = False
    vit_precision: str = "fp16"
    freeze_vit: bool = True
    num_query_token: int = 32
    cross_attention_freq: int = 2
    max_txt_len: int = 32
    # ours
    vit_weights: str | None = None
    vit: dict[str, Any] = field(default_factory=dict)
    qformer: dict[str, Any] = field(default_factory=dict)
    compile: bool = False


@dataclass
class Stage1Options(ModelOptions):
    """`blip2_casual`: contrast with captions, and (ours) regression of an image embedding if `embedding_weight` > 0.

    That target is the samples' `target` with `embedding_dim` given, else `clip_model`'s embedding of the image.
    """

    embed_dim: int = 256
    # ours
    text_tokenizer: str | None = "bert-base-uncased"
    vocab_size: int = 30523
    temperature: float = 0.07
    label_smoothing: float = 0.1
    lm_head: bool = True
    gather_gradient: bool | None = None
    itc_weight: float = 1.0
    embedding_weight: float = 0.0
    embedding_dim: int | None = None
    clip_model: str | None = None
    clip_precision: str = "fp16"


@dataclass
class CodebookOptions(ModelOptions):
    """What both stage-2 models share."""

    codebook_embed_dim: int = 32
    n_embed: int = 8192
    # ours: sizes and losses
    decode_depth: int = 4
    decode_heads: int = 12
    reverse_depth: int = 4
    loss_weights: dict[str, float] = field(default_factory=dict)
    freeze_qformer: bool = True
    frozen_dropout: bool = True
    corrupt: float = 0.0
    nested: float = 0.0
    # ours: speed
    fast_tower: bool = False
    # ours: codebook health
    ema_decay: float | None = None
    normalize_codes: bool = False
    codebook_sections: int = 1
    codebook_warmup: int = 0
    kmeans_start: bool = False
    kmeans_images: int = 2048
    restart_every: int = 0
    restart_until: float = 0.8


@dataclass
class Stage2Options(CodebookOptions):
    """`blip2_codebook_all_image`: both decode heads by `use_qformer_image`."""

    use_qformer_image: bool = False
    image_features_dim: int = 1024
    clip_model: str | None = "pretrained/CLIP-ViT-H-14-laion2B-s32B-b79K"
    # ours
    clip_precision: str = "fp16"
    recon_s: bool = True
    readout_weight: str | None = None
    cache_vision: bool = False
    naming_weight: float = 0.0
    naming_tower: str | None = None
    text_tokenizer: str | None = None


@dataclass
class Seed1Options(CodebookOptions):
    """`seed1_codebook_text`: SEED-1's 77 text-like embeddings."""

    text_tokens: int = 77
    text_features_dim: int = 768
    text_encoder: str | None = "pretrained/stable-diffusion-v1-4"
    clip_precision: str = "fp16"


@dataclass
class RunOptions:
    """The section `run`, read by our runner, LAVIS's runner and LAVIS's schedules."""

    task: str = "image_text_pretrain"
    runner: str = "runner_seed"
    lr_sched: str = "linear_warmup_cosine_lr"
    init_lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_lr: float = -1.0
    warmup_steps: int = 0
    lr_decay_rate: float | None = None
    weight_decay: float = 0.05
    beta2: float = 0.999
    max_epoch: int = 1
    batch_size_train: int = 64
    batch_size_eval: int = 16
    num_workers: int = 4
    accum_grad_iters: int = 1
    log_freq: int = 50
    seed: int = 42
    output_dir: str = "log/run"
    amp: bool = False
    resume_ckpt_path: str | None = None
    evaluate: bool = False
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    valid_splits: list[str] = field(default_factory=list)
    test_splits: list[str] = field(default_factory=list)
    device: str = "auto"
    world_size: int = 1
    dist_url: str = "env://"
    distributed: bool = True
    use_dist_eval_sampler: bool = False
    train_dataset_ratios: dict[str, float] = field(default_factory=dict)
    # ours
    valid_every_epochs: int = 1
    valid_batches: int = 0
    peak_tflops: float = 0.0
    iters_per_epoch: int = 5000
    resume: str = "auto"
    precision: str = "auto"
    clip_grad: float = 0.0
    ema: float = 0.0
    tensorboard: bool = False
    save_seconds: float = 300.0
    save_every_steps: int = 0
    keep_checkpoints: int = 0
    max_bad_in_a_row: int = 20
    # set while running
    rank: int = 0
    gpu: int = 0


LARGEST = 3.4e38  # finite in fp32
RANGES: tuple[tuple[tuple[str, ...], float, float], ...] = (
    # run
    (("max_epoch", "iters_per_epoch", "batch_size_train", "batch_size_eval", "accum_grad_iters", "log_freq",
      "valid_every_epochs", "max_bad_in_a_row"), 1, float("inf")),
    (("warmup_steps", "keep_checkpoints", "num_workers", "valid_batches", "save_every_steps"), 0, float("inf")),
    (("peak_tflops", "init_lr", "min_lr", "weight_decay"), 0, LARGEST),
    (("clip_grad", "save_seconds"), 0, float("inf")),  # infinity: no clipping, no saving by time
    (("beta2", "ema"), 0, 0.999999),
    (("seed",), 0, 2**32 - 1),  # what numpy takes
    # model
    (("num_query_token", "cross_attention_freq", "embed_dim", "vocab_size", "n_embed", "codebook_embed_dim",
      "decode_heads", "kmeans_images", "text_tokens", "text_features_dim", "image_features_dim"), 1, float("inf")),
    (("max_txt_len",), 2, float("inf")),  # the marks at both ends
    (("codebook_warmup", "restart_every", "decode_depth", "reverse_depth"), 0, float("inf")),
    (("label_smoothing", "restart_until", "corrupt", "nested"), 0, 1),
    (("ema_decay",), 0, 0.999999),
    (("temperature",), 1e-6, LARGEST),
)


def read_options(kind: type[Options], section: Mapping[str, Any] | DictConfig, where: str) -> Options:
    """A section of the YAML as its typed object.

    Raises:
        ConfigError: an unknown key (the nearest is named) or a value of the wrong type.
    """
    try:
        values = OmegaConf.to_container(section, resolve=True) if isinstance(section, DictConfig) else dict(section)
        assert isinstance(values, dict)
        check_keys(map(str, values), [item.name for item in dataclasses.fields(kind)], where)  # type: ignore[arg-type]
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {first_line(error)} (key {getattr(error, 'full_key', '?')}).") from error


def check_ranges(options: Any, where: str) -> None:
    """Refuse numbers that no run can use, before anything is built; keys that `options` lacks or leaves null pass.

    Raises:
        ConfigError: naming the key, its limits and its value.
    """
    for keys, low, high in RANGES:
        for key in keys:
            value = getattr(options, key, None)
            if value is not None and not low <= value <= high:  # also NaN
                most = "" if high >= LARGEST else f" and at most {high}"
                wrong = f"must be at least {low}{most}, not {value}."
                if not abs(value) < LARGEST:
                    wrong = f"must be a finite number, not {value}."
                elif low == 0 > value:
                    wrong = f"must not be negative, it is {value}."
                raise ConfigError(f"{where}.{key} {wrong}")


def sizes(kind: type[Options], start: Options, changes: Mapping[str, Any], where: str) -> Options:
    """`start` with some fields changed; an unknown field or a value it cannot hold is refused by name."""
    check_sizes(kind, changes, where)  # type: ignore[arg-type]
    return dataclasses.replace(start, **changes)  # type: ignore[type-var]


def section_at(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """`values[key]`, which must be a section of keys; an empty one if it is not given."""
    section = values.get(key)
    if section is None:
        return {}
    if not isinstance(section, Mapping | DictConfig):
        raise ConfigError(f"{where}.{key} must be a section of keys, not {section!r}.")
    return section


def one_of(value: str, allowed: tuple[str, ...], where: str) -> str:
    """`value`, if it is allowed; a `ConfigError` that lists what is otherwise."""
    if value not in allowed:
        raise ConfigError(f"{where} must be {', '.join(allowed[:-1])} or {allowed[-1]}, not {value!r}.")
    return value


def locate(path: str) -> str:
    """A path of the YAML as it can be opened: absolute, or found from the current folder, SEED_Tokenizer or the
    repository, in this order. What is nowhere (a hub id, a pattern, a file that is missing) is returned as it is."""
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
