"""The typed keys of the sections `model` and `run`; a YAML file and `--options` → LAVIS's `Config`.

Defaults are the original training's; keys that the original did not have are marked "ours" and do
nothing by default.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from seed_lavis import log
from seed_multimodal.config import load_yaml
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.seed.configuration import AlignmentTarget
from seed_multimodal.nn.quantizer import QuantizerKind
from seed_multimodal.nn.vision.base import VisionConfig
from seed_multimodal.nn.vision.eva import EvaConfig
from seed_multimodal.nn.vision.registry import read_vision_config
from seed_multimodal.recipes.seed.losses import Stage1TrainingOptions, Stage2TrainingOptions
from seed_multimodal.settings import check_keys, read_settings, setting
from seed_multimodal.training.codebook import CodebookHealth
from seed_multimodal.training.config import DEFAULT_TIMEOUT_MINUTES, SCHEDULES, refuse_unread

APPLICATION = Path(__file__).resolve().parents[1]
REPOSITORY = APPLICATION.parent
SEARCHED_FOLDERS = (
    Path(),
    APPLICATION,
    REPOSITORY,
    Path("pretrained"),
    REPOSITORY / "pretrained",
)
PRECISIONS = ("fp16", "bf16", "fp32")
SECTIONS = ("model", "datasets", "run")
# Schedules by iteration, unlike LAVIS's own → the library's.
STEP_SCHEDULES = {"linear_warmup_cosine_steps": "cosine", **{kind: kind for kind in SCHEDULES}}


@dataclass
class ModelOptions:
    """Options of all models."""

    arch: str = ""
    model_type: str = setting("pretrain", choices=("pretrain",))
    load_pretrained: bool = True  # start from `pretrained`
    pretrained: str | None = None  # stage 1: BLIP-2's Q-Former; stage 2: stage 1's result
    load_finetuned: bool = False  # evaluate or continue from `finetuned`
    finetuned: str | None = None
    vit_model: str = setting("eva_clip_g", choices=("eva_clip_g",))
    image_size: int = 224
    drop_path_rate: float = setting(0.0, minimum=0, maximum=0)  # only 0
    use_grad_checkpoint: bool = False  # recompute activations: less memory, slower
    vit_precision: str = setting("fp16", choices=PRECISIONS)  # of the frozen vision encoder
    freeze_vit: bool = True  # False: stage 1 trains it, too
    num_query_token: int = setting(32, minimum=1)  # tokens of an image
    cross_attention_freq: int = 2  # every n-th layer reads image features
    max_txt_len: int = setting(32, minimum=2)  # tokens of a caption
    # ours
    vit_weights: str | None = None  # a file, or a CLIP folder
    vit: dict[str, Any] = setting(factory=dict)  # sizes of EVA, or `type: hub`
    qformer: dict[str, Any] = setting(factory=dict)  # overrides sizes of `QFormerConfig`
    clip_precision: str = setting("fp16", choices=PRECISIONS)  # of the model of target embeddings
    compile: bool = False  # torch.compile


@dataclass
class Stage1Options(Stage1TrainingOptions, ModelOptions):
    """`blip2_casual`: contrast with captions.

    Ours: with `embedding_weight` > 0 also regression of an image embedding: `clip_model`'s, or the
    vision encoder's (`alignment_target`).
    """

    # ours
    text_tokenizer: str = "bert-base-uncased"
    clip_model: str | None = None
    # As stage 2's; "encoder" also keeps the pooling head of a vision encoder that is trained.
    alignment_target: AlignmentTarget = "clip"


@dataclass
class CodebookOptions(Stage2TrainingOptions, CodebookHealth, ModelOptions):
    """Options of both stage-2 models, with those of the library's classes (ours)."""

    freeze_vit: bool = setting(True, choices=(True,))  # only stage 1 trains it
    codebook_embed_dim: int = setting(32, minimum=1)  # width of a code
    n_embed: int = setting(8192, minimum=1)  # codes
    # ours
    decode_depth: int = 4  # layers behind the codebook
    decode_heads: int = 12
    reverse_depth: int = 4  # layers of the reverse Q-Former
    # Default: `{embed: 5.0, recon_s: 2.0, distil_image: 0.5}`.
    loss_weights: dict[str, float] = setting(factory=dict)
    normalize_codes: bool = False  # cosine codes
    codebook_sections: int = 1  # a part of the codebook for each position
    quantizer: QuantizerKind = "vq"  # fsq, lfq: codes that are not learned
    fsq_levels: list[int] = setting(factory=list)  # numbers of values in fsq's dimensions


@dataclass
class Stage2Options(CodebookOptions):
    """`blip2_codebook_all_image`: both decode heads by `use_qformer_image`."""

    use_qformer_image: bool = False  # False: as the original weights; True: as the published code
    image_features_dim: int = 1024  # of the vision encoder: its own width
    clip_model: str | None = "pretrained/CLIP-ViT-H-14-laion2B-s32B-b79K"  # of the target embedding
    # ours
    # Of the image embedding: `clip_model`'s, or the vision encoder's own pooled feature.
    alignment_target: AlignmentTarget = "clip"
    recon_s: bool = True  # reconstruct the Q-Former output, too


@dataclass
class Seed1Options(CodebookOptions):
    """`seed1_codebook_text`: SEED-1's 77 text-like embeddings."""

    text_tokens: int = 77
    text_features_dim: int = 768
    text_encoder: str = "pretrained/stable-diffusion-v1-4"  # Stable Diffusion 1


@dataclass
class LavitOptions(CodebookHealth, ModelOptions):
    """`lavit_tokenizer`: LaVIT's stage 1; see `LavitStage1`.

    merger: overrides fields of `LavitTokenizerConfig`.
    decoder: overrides fields of `LavitDecoderConfig`.
    loss_weights: overrides fields of `LavitLossWeights`.
    """

    freeze_vit: bool = setting(True, choices=(True,))
    n_embed: int = setting(16384, minimum=1)
    codebook_embed_dim: int = setting(32, minimum=1)
    merger: dict[str, Any] = setting(factory=dict)
    decoder: dict[str, Any] = setting(factory=dict)
    loss_weights: dict[str, float] = setting(factory=dict)
    ema_decay: float = setting(0.99, minimum=0, maximum=0.999999)
    freeze_selector: bool = False  # the token selector stays as it starts
    # Factor of the token selector's learning rate.
    selector_lr_scale: float = setting(1.0, minimum=1e-6, maximum=1e6)


@dataclass
class RunOptions:
    """The section `run`, read by our runner, LAVIS's runner and LAVIS's schedules."""

    task: str = "image_text_pretrain"
    runner: str = setting("runner_seed", choices=("runner_seed",))  # LAVIS's own needs CUDA
    # by iteration: linear_warmup_cosine_steps, linear, constant …
    lr_sched: str = "linear_warmup_cosine_lr"
    # LAVIS's AdamW, or Muon with AdamW.
    optimizer: str = setting("adamw", choices=("adamw", "muon"))
    init_lr: float = setting(1e-4, minimum=0)
    min_lr: float = setting(1e-5, minimum=0)
    warmup_lr: float = -1.0
    warmup_steps: int = setting(0, minimum=0)
    lr_decay_rate: float | None = None
    weight_decay: float = 0.05
    beta2: float = setting(0.999, minimum=0, maximum=0.999999)
    max_epoch: int = setting(1, minimum=1)  # epochs of `iters_per_epoch` iterations
    batch_size_train: int = setting(64, minimum=1)  # images of each process in an iteration
    batch_size_eval: int = setting(16, minimum=1)
    num_workers: int = setting(4, minimum=0)
    accum_grad_iters: int = setting(1, minimum=1)
    log_freq: int = 50
    seed: int = 42
    output_dir: str = "log/run"
    amp: bool = False  # mixed precision on a GPU where `precision` is auto
    resume_ckpt_path: str | None = None  # a LAVIS checkpoint to start a new folder from
    evaluate: bool = False
    train_splits: list[str] = setting(factory=lambda: ["train"])
    valid_splits: list[str] = setting(factory=list)  # measured after every epoch
    test_splits: list[str] = setting(factory=list)
    device: str = "auto"
    world_size: int = 1
    dist_url: str = "env://"
    distributed: bool = True
    # How often each data set is sampled.
    train_dataset_ratios: dict[str, float] = setting(factory=dict)
    # ours
    iters_per_epoch: int = setting(5000, minimum=1)  # whatever the data set's size
    precision: str = setting("auto", choices=("auto", *PRECISIONS))
    clip_grad: float = setting(0.0, minimum=0)  # largest gradient norm (0: none)
    # Decay of the averaged weights (0: none).
    ema: float = 0.0
    tensorboard: bool = False
    curves: bool = True  # plot `curves.png` at the end
    save_seconds: float = 300.0  # between checkpoints for resuming
    save_every_steps: int = 0
    # How many of the newest `.pth` files stay, with the first (0: all).
    keep_checkpoints: int = setting(0, minimum=0)
    max_bad_in_a_row: int = setting(20, minimum=1)  # unusable samples that end the run
    # How long a step waits for another process.
    timeout_minutes: float = setting(DEFAULT_TIMEOUT_MINUTES, above=0)


def load_config(cfg_path: str, options: Sequence[str]) -> Any:
    """The checked configuration of a run. Raises ConfigError."""
    from seed_lavis.compat import Config

    # 1. What the user wrote; LAVIS must know the names.
    file = locate(cfg_path)
    overrides = OmegaConf.from_dotlist(list(options))
    check_keys(map(str, overrides), SECTIONS, "--options KEY=VALUE")
    merged = OmegaConf.merge(load_yaml(file), overrides)
    for section in SECTIONS:
        if not merged.get(section):
            raise ConfigError(f"{file}: has no section {section!r}.")
    model_class = lavis_class("model", merged.model.get("arch"), f"{file}: model.arch")
    for dataset in merged.datasets:
        lavis_class("builder", dataset, f"{file}: datasets")

    # 2. LAVIS's configuration, with its defaults for models and data sets. Of `--options`, a `vit`
    #    with a `type` replaces the YAML's, whose weights are those of its own encoder.
    config = Config(argparse.Namespace(cfg_path=file, options=list(options)))
    override = overrides.get("model") or {}
    vit = override.get("vit") or {}
    if "type" in vit:
        config.model_cfg.vit = vit
        if vit.type != "eva" and "vit_weights" not in override:
            config.model_cfg.vit_weights = None
    model = read_settings(model_class.options_type, config.model_cfg, f"{file}: model")
    run = read_settings(RunOptions, config.run_cfg, f"{file}: run")
    lavis_class("task", run.task, f"{file}: run.task")
    if run.lr_sched not in STEP_SCHEDULES:
        lavis_class("lr_scheduler", run.lr_sched, f"{file}: run.lr_sched")
    unread = unread_schedule_keys(run.lr_sched)
    refuse_unread(run, unread, f"{file}: run", f"by lr_sched {run.lr_sched}")
    if run.iters_per_epoch % run.accum_grad_iters:
        raise ConfigError(
            f"{file}: run.iters_per_epoch ({run.iters_per_epoch}) must be a multiple of "
            f"run.accum_grad_iters ({run.accum_grad_iters}), so that epochs end after a whole step."
        )
    check_keys(
        run.train_dataset_ratios, list(config.datasets_cfg), f"{file}: run.train_dataset_ratios"
    )

    # 3. Images as the vision encoder reads them; of EVA's only the size, since the YAML resizes.
    vision = vit_sizes(model)
    values = asdict(vision.preprocessing)
    if isinstance(vision, EvaConfig):
        values = {"image_size": vision.image_size}
    for name, dataset in config.datasets_cfg.items():
        _prepare_processors(dataset, values, f"{file}: datasets.{name}")
    log(f"Images are prepared for the vision encoder: {values}.")

    # 4. Our defaults of the run, so that LAVIS's own code gets them, too.
    run.output_dir = os.path.abspath(run.output_dir)
    config.run_cfg.update(vars(run))
    return config


def unread_schedule_keys(schedule: str) -> list[str]:
    """Keys of the section `run` that a schedule does not read."""
    if schedule == "linear_warmup_step_lr":
        return []
    if schedule not in STEP_SCHEDULES:
        return ["lr_decay_rate"]
    names = {"warmup_steps": "warmup_steps", "min_lr_ratio": "min_lr"}
    unread = set(SCHEDULES[STEP_SCHEDULES[schedule]])
    return ["warmup_lr", "lr_decay_rate", *(names[key] for key in names.keys() & unread)]


def _prepare_processors(dataset: Any, values: dict[str, Any], key: str) -> None:
    """Set values of the image processors; their augmentation stays the YAML's."""
    images = dataset.get("vis_processor") or {}
    if not images.get("train"):
        raise ConfigError(f"{key}.vis_processor.train is not given (blip2_image_train).")
    if not images.get("eval"):
        images.eval = {"name": "blip_image_eval"}
    for kind in ("vis_processor", "text_processor"):
        for split, processor in (dataset.get(kind) or {}).items():
            make = lavis_class("processor", processor.name, f"{key}.{kind}.{split}.name").make
            keys = values.keys() & inspect.signature(make).parameters
            processor.update({key: values[key] for key in keys})


def lavis_class(kind: str, name: str, key: str) -> Any:
    """The class of a name in LAVIS's registry. Raises ConfigError, with its key in the YAML."""
    from seed_lavis.compat import registry

    classes = registry.mapping[f"{kind}_name_mapping"]
    check_keys([name], classes, key)
    return classes[name]


def vit_sizes(options: ModelOptions, **eva_sizes: int) -> VisionConfig:
    """The vision encoder's configuration: `vit` of the YAML, of EVA only what differs.

    eva_sizes: defaults of EVA.
    """
    if "path" in options.vit:
        options.vit["path"] = locate(options.vit["path"])
    values = options.vit
    if values.get("type", "eva") == "eva":
        values = {"image_size": options.image_size, **eva_sizes, **values}
    return read_vision_config(values, "model.vit")


def with_derived(values: dict[str, Any], derived: dict[str, Any], key: str) -> dict[str, Any]:
    """A section of the YAML with the sizes that follow from others.

    Raises ConfigError: it has another value of one.
    """
    for name, value in derived.items():
        if values.get(name, value) != value:
            raise ConfigError(
                f"{key}.{name} is {values[name]}, but other keys give {value}: leave it out."
            )
    return {**values, **derived}


def locate(path: str) -> str:
    """The absolute path of a file, folder or pattern of the YAML.

    It may be relative to the current folder, SEED_Tokenizer, the repository or its `pretrained`;
    the first in which it exists is used. Others (a hub id, a missing file) stay as they are.
    """
    # A pattern exists if the folder before it does.
    before_pattern = re.sub(r"[^/]*[{*?\[].*", "", path)
    for folder in SEARCHED_FOLDERS:
        if before_pattern and (folder / before_pattern).exists():
            return os.path.abspath(folder / path)
    return path
