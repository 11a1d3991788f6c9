"""Stages `recipe` and `tokenizer`: the LAVIS application's configurations of stages 1 and 2, and the join of their
results.

`recipe` writes `work/stage1.yaml` and `work/stage2.yaml` from the run's settings, so that sizes stand in one place.
Between the two stages, from the repository's folder:

    python SEED_Tokenizer/train.py --cfg-path WORK/stage1.yaml      then the same with stage2.yaml

Both read scenes as pairs of picture and caption, through the data set `nano`, as anybody's own pictures are read.
Their vision tower is that of stage `clip`, frozen, which also gives the target embedding, as the released recipe's
CLIP does. Different from the released recipe: pictures are neither cropped nor mirrored (left and right are told
apart); stage 1 also regresses the target embedding from the first k queries; stage 2 trains the Q-Former too, has a
decode side whose random start keeps the size of what goes through it (error after 75 steps of 64 scenes without
codes: 0.53 of the target's variance; with PyTorch's start 0.90), starts the codebook by k-means after a warm-up
without quantiser, restarts dead codes, corrupts up to 10 % of the codes, decodes half of the samples from their first
k codes only, weighs the error by a read-out of thumbnails, has the tower's label heads read from the decoded
embedding what they read from the target, and gives each position its own part of the codebook.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from seed_multimodal.disk import replace_copy, replace_text
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.tokenizers.clip_weights import load_clip_vision
from seed_multimodal.tokenizers.export import export_tokenizer
from seed_multimodal.tokenizers.seed2 import Seed2Tokenizer
from seed_multimodal.training.loop_settings import StageSettings
from seed_multimodal.training.stage import read_record
from seed_multimodal.vision.clip_towers import eva_from_clip
from seed_multimodal.weights import save_state_dict
from seed_nano.train.clip import HEADS_FILE, READOUT_FILE
from seed_nano.train.config import NanoConfig
from seed_nano.train.tokenizer import code_metrics, tokenizer_config
from seed_nano.train.workspace import Workspace

STAGE1, STAGE2 = "stage1", "stage2"
CHECKPOINT = "checkpoint_0.pth"  # a stage is one epoch, whose iterations are all its steps
TRAIN = "python SEED_Tokenizer/train.py --cfg-path"
CAPTION_PIECES = 32  # of a caption in stage 1


def write_recipes(space: Workspace) -> list[Path]:
    """Write both YAML files; returns their paths.

    Raises:
        ConfigError: `start` of a stage names no file.
    """
    work = space.work.absolute()
    found = []
    for name, model in ((STAGE1, stage1_model(space)), (STAGE2, stage2_model(space))):
        settings = _settings(space.config, name)
        content = {"model": {**model, **_start(name, settings)}, "datasets": {"nano": _data(space.config, settings)},
                   "run": _run(space.config, name, settings, work / name)}
        file = work / f"{name}.yaml"
        text = f"# Written from {work}/config.yaml for: {TRAIN} {file}\n{OmegaConf.to_yaml(OmegaConf.create(content))}"
        replace_text(file, text)
        found.append(file)
    return found


def recipe(space: Workspace) -> dict[str, Any]:
    """Stage `recipe`: both YAML files, and the words that stage 1 reads."""
    _ = space.words  # made here if they are not there
    return {"files": " ".join(map(str, write_recipes(space)))}


def stage1_model(space: Workspace) -> dict[str, Any]:
    """Section `model` of stage 1: the causal Q-Former, by contrast and by regression of the embedding."""
    return {"arch": "blip2_casual", **_sizes(space), **_tower(space, space.config.train_stage1),
            "embed_dim": 128, "lm_head": False, "text_tokenizer": str(space.tokenizer_folder.absolute()),
            "max_txt_len": CAPTION_PIECES, "itc_weight": 0.2, "embedding_weight": 2.0}


def stage2_model(space: Workspace) -> dict[str, Any]:
    """Section `model` of stage 2: codebook and decode head, and the Q-Former further."""
    config, work = space.config, space.work.absolute()
    sizes, settings = tokenizer_config(config), config.train_stage2
    warmup = 0 if settings.start else settings.steps // 5  # a codebook to start from needs none
    return {"arch": "blip2_codebook_all_image", **_sizes(space), **_tower(space, settings),
            "pretrained": str(work / STAGE1 / CHECKPOINT), "image_features_dim": sizes.image_features_dim,
            "n_embed": sizes.codebook_size, "codebook_embed_dim": sizes.codebook_dim,
            "codebook_sections": sizes.codebook_sections, "decode_depth": sizes.decode_depth,
            "decode_heads": sizes.decode_heads, "reverse_depth": sizes.reverse_depth,
            "recon_s": sizes.recon_s, "scaled_start": True, "freeze_qformer": False,
            "loss_weights": {"embed": 1.0, "recon_s": 0.1, "distil_image": 1.0, "readout": 1.0},
            "readout_weight": str(work / READOUT_FILE), "corrupt": 0.1, "nested": 0.5,
            "codebook_warmup": warmup * settings.accumulate, "kmeans_start": not settings.start,
            "kmeans_images": 1024, "restart_every": 100, "restart_until": 0.8,
            "label_weight": 2.0, "label_heads": str(work / HEADS_FILE)}


def _tower(space: Workspace, settings: StageSettings) -> dict[str, Any]:
    """The frozen vision tower and the target: one network, so it is computed once, in the stage's precision."""
    folder = str((space.decoder_folder / "image_encoder").absolute())
    return {"vit_weights": folder, "vit_precision": settings.precision, "clip_model": folder, "clip_precision": "fp32"}


def _data(config: NanoConfig, settings: StageSettings) -> dict[str, Any]:
    """A section of `datasets`: as many training scenes as the stage sees, as they are."""
    picture = {"name": "blip_image_eval", "image_size": config.image_size}
    return {"vis_processor": {"train": picture}, "text_processor": {"train": {"name": "blip_caption"}},
            "build_info": {"format": "nano", "splits": {"train": "train"}, "seed": config.seed,
                           "size": config.image_size,
                           "number": settings.steps * settings.accumulate * settings.batch_size}}


def _sizes(space: Workspace) -> dict[str, Any]:
    sizes = tokenizer_config(space.config)
    vit = dataclasses.asdict(sizes.vit)
    return {"model_type": "pretrain", "load_pretrained": True, "image_size": vit.pop("image_size"), "vit": vit,
            "qformer": dataclasses.asdict(sizes.qformer), "cross_attention_freq": sizes.qformer.cross_attention_freq,
            "num_query_token": sizes.num_query}


def _run(config: NanoConfig, name: str, settings: StageSettings, folder: Path) -> dict[str, Any]:
    """Section `run`: the loop's settings under LAVIS's names; one epoch of all iterations."""
    iterations = settings.steps * settings.accumulate
    if iterations < 1:
        raise ConfigError(f"train_{name}.steps must be at least 1, not {settings.steps}.")
    return {"task": "image_text_pretrain", "runner": "runner_seed", "lr_sched": "linear_warmup_cosine_steps",
            "init_lr": settings.lr, "min_lr": settings.lr * settings.min_lr_ratio,
            "warmup_steps": settings.warmup * settings.accumulate, "weight_decay": settings.weight_decay,
            "beta2": 0.99, "max_epoch": 1, "iters_per_epoch": iterations, "batch_size_train": settings.batch_size,
            "batch_size_eval": settings.batch_size, "num_workers": config.workers,
            "accum_grad_iters": settings.accumulate, "log_freq": settings.log_every,
            "seed": config.seed + settings.seed + {STAGE1: 2, STAGE2: 4}[name],
            "output_dir": str(folder), "device": config.device, "precision": settings.precision,
            "clip_grad": settings.clip, "ema": settings.ema, "tensorboard": settings.tensorboard,
            "save_seconds": settings.save_seconds, "save_every_steps": settings.save_every_steps,
            "keep_checkpoints": 1}


def _settings(config: NanoConfig, name: str) -> StageSettings:
    return config.train_stage1 if name == STAGE1 else config.train_stage2


def _start(name: str, settings: StageSettings) -> dict[str, Any]:
    """`start` of a stage as the application's option: an earlier run's checkpoint."""
    if not settings.start:
        return {}
    file = Path(settings.start).absolute()
    if not file.is_file():
        raise ConfigError(f"train_{name}.start: {file} is no file; give the {CHECKPOINT} of an earlier run's {name} "
                          "folder.")
    return {"load_finetuned": True, "finetuned": str(file)}


def join_stages(space: Workspace) -> dict[str, Any]:
    """Stage `tokenizer`: write the system's tokenizer from both stages' checkpoints; other files there are kept.

    Returns:
        The record, also `work/tokenizer.done.json`; an existing one that is younger than the checkpoints is kept if
        the system's folder has the tokenizer.

    Raises:
        CheckpointError: a stage was not trained, or its checkpoint is of other sizes.
    """
    done = space.work / "tokenizer.done.json"
    files = [_checkpoint(space.work, name) for name in (STAGE1, STAGE2)]
    there = (space.tokenizer_folder / "model.safetensors").is_file()
    if there and done.is_file() and all(done.stat().st_mtime_ns > file.stat().st_mtime_ns for file in files):
        record = read_record(done)
        print(f"[tokenizer] already done ({record.get('seconds', 0):.0f} s): {done}", flush=True)
        return record
    started = time.monotonic()
    encoder = space.decoder_folder / "image_encoder"
    space.need("clip", encoder / "model.safetensors", space.work / HEADS_FILE,
               space.work / READOUT_FILE)
    new, vision = space.work / "tokenizer", space.work / "tokenizer-vision.safetensors"
    sizes = tokenizer_config(space.config)
    save_state_dict(eva_from_clip(load_clip_vision(encoder, log=None).state_dict(), sizes.vit), vision)
    export_tokenizer(files[1], new, stage1=files[0], vision=vision, config=sizes, force=True)
    space.tokenizer_folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        replace_copy(new / name, space.tokenizer_folder)
    shutil.rmtree(new)
    vision.unlink()
    tokenizer = Seed2Tokenizer.from_pretrained(space.tokenizer_folder)
    record = {"stage": "tokenizer", "parameters": sum(p.numel() for p in tokenizer.parameters()),
              **code_metrics(tokenizer, space), "seconds": round(time.monotonic() - started, 1)}
    replace_text(done, json.dumps(record, indent=1))
    print(f"[tokenizer] done: {json.dumps(record)}", flush=True)
    return record


def _checkpoint(work: Path, name: str) -> Path:
    file = work / name / CHECKPOINT
    if not (work / name / f"{name}.done.json").is_file() or not file.is_file():
        raise CheckpointError(f"{work / name}: {name} is not trained to its end; train it with: {TRAIN} "
                              f"{work / name}.yaml (bash scripts/nano_speedrun.sh does it all).")
    return file
