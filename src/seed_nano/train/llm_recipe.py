"""Stages `records` and `llm`: the language model's training data and configurations, and the installation of the
result.

`records` writes shards of pre-tokenised records (`work/records/`) and two configurations of the application,
`work/llm_pretrain.yaml` (captions both ways, documents) and `work/llm_sft.yaml` (everything). Between the two stages,
from the repository's folder:

    python MultiModalLLM/src/train/train.py --config-path WORK --config-name llm_pretrain       then the same, llm_sft

Different from the released recipe: every weight is trained, from a random start whose image words come from the
codebook; matrices by Muon; a text token weighs as much as four image tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from seed_multimodal.data.formats.writer import write_shard
from seed_multimodal.disk import replace_copy, replace_text
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.training.checkpoint_folders import fault_of
from seed_multimodal.training.loop_settings import StageSettings
from seed_multimodal.training.stage import read_record
from seed_multimodal.weights import count_parameters
from seed_nano.train.config import NanoConfig
from seed_nano.train.tokenizer import encode_scenes, load_tokenizer
from seed_nano.train.workspace import Workspace
from seed_nano.world.records import Record, record_at, scenes_of, with_pictures
from seed_nano.world.scene import Scene

PRETRAIN, SFT = "llm_pretrain", "llm_sft"
TEXT_WEIGHT = 4.0  # an answer has eight tokens where a picture has 34; equal weights would teach mostly pictures
MEAN_LENGTH = 64  # tokens a sequence has about: turns `batch_size` sequences into packed rows
ROW = 512  # a conversation of six turns has up to 400 tokens
ENCODED_AT_ONCE = 8192
CODES = "record_codes"  # the file in the work folder
HELD_OUT_SHARE = 0.02  # of the records of a kind, made of scenes of the val split for the held-out loss
TRAIN = "python MultiModalLLM/src/train/train.py --config-path"
# Sources of both mixtures: name -> (kind of records, decoder, options, share of the sequences).
Sources = dict[str, tuple[str, str, dict[str, Any], float]]
Counts = dict[str, dict[str, int]]  # split -> kind -> records
PRETRAIN_SOURCES: Sources = {
    "image_first": ("captions", "pretrain.caption", {"reverse_ratio": 1.0, "first_text": 0.5}, 0.55),
    "text_first": ("captions", "pretrain.caption", {"reverse_ratio": 0.0, "first_text": 0.5}, 0.40),
    "documents": ("documents", "pretrain.interleaved", {"reverse_ratio": 0.0}, 0.05)}
SFT_SOURCES: Sources = {
    "image_first": (*PRETRAIN_SOURCES["image_first"][:3], 0.035),
    "text_first": (*PRETRAIN_SOURCES["text_first"][:3], 0.035),
    "describe": ("describe", "chat", {}, 0.13), "questions": ("questions", "chat", {}, 0.22),
    "draw": ("draw", "chat", {}, 0.11), "edits": ("edits", "chat", {}, 0.21),
    "conversations": ("conversations", "chat", {}, 0.13), "in_context": ("in_context", "chat", {}, 0.06),
    "stories": ("stories", "chat", {}, 0.02), "continued": ("continued", "chat", {}, 0.03),
    "talk": ("talk", "chat", {}, 0.01), "asides": ("asides", "chat", {}, 0.01)}


def records(space: Workspace) -> dict[str, Any]:
    """Stage `records`: shards and configurations; returns how many training records each kind has."""
    counts, pictures = write_records(space, partial(_codes, space))
    return {"files": " ".join(map(str, write_llm_recipes(space, counts))), "pictures": pictures, **counts["train"]}


def write_records(space: Workspace, encode: Callable[[Sequence[Scene]], Tensor]) -> tuple[Counts, int]:
    """Write the shards of both splits; returns how many records each holds, and how many pictures there are in them.

    Args:
        encode: N scenes -> their codes int16 [N, 32]; every picture is encoded once, however many records show it.
    """
    amounts = asdict(space.config.records)
    few = {kind: max(1, round(number * HELD_OUT_SHARE)) for kind, number in amounts.items()}
    made = {split: {kind: [record_at(kind, space.config.seed, index, split, pool) for index in range(number)]
                    for kind, number in numbers.items()}
            for split, numbers, pool in (("train", amounts, space.config.pool),
                                         ("val", few, space.config.gate_scenes))}
    scenes = list(dict.fromkeys(scene for kinds in made.values() for records in kinds.values()
                                for record in records for scene in scenes_of(record)))
    codes, rows = encode(scenes), {scene: row for row, scene in enumerate(scenes)}
    if len(codes) != len(scenes):
        raise ConfigError(f"{space.work}: the codes kept there are of {len(codes)} pictures, the records show "
                          f"{len(scenes)}; delete {CODES}.safetensors.")

    def codes_of(scene: Scene) -> list[int]:
        return list(codes[rows[scene]].tolist())

    counts = {split: {kind: write_shard(_shard(space, kind, split), _written(kind, records, codes_of))
                      for kind, records in kinds.items()} for split, kinds in made.items()}
    return counts, len(scenes)


def write_llm_recipes(space: Workspace, counts: Counts) -> list[Path]:
    """Write both configurations; sources without records (of a small set) are left out."""
    first = space.work / PRETRAIN / f"checkpoint-{space.config.train_pretrain.steps}"
    files = []
    for name, sources, settings, start in (
            (PRETRAIN, PRETRAIN_SOURCES, space.config.train_pretrain, None),
            (SFT, SFT_SOURCES, space.config.train_sft, first)):
        recipe = {
            "output_dir": str((space.work / name).absolute()),
            "tokenizer": {"pretrained_model_name_or_path": str(space.tokenizer_folder.absolute())},
            "model": _model(space, settings, start),
            "data": _data(space, sources, counts, "train", settings), "optim": _optim(settings),
            "trainer": _trainer(space.config, settings),
            "eval_data": _data(space, sources, counts, "val", settings)}
        file = space.work / f"{name}.yaml"
        replace_text(file, f"# Written from {space.work.absolute()}/config.yaml for:\n# {TRAIN} {file.parent} "
                           f"--config-name {name}\n{OmegaConf.to_yaml(OmegaConf.create(recipe))}")
        files.append(file)
    return files


def install_llm(space: Workspace) -> dict[str, Any]:
    """Stage `llm`: copy the tuned model into the system's folder; returns its training record.

    Writes `pretrain.done.json` and `sft.done.json` beside the other stages' records.

    Raises:
        CheckpointError: a stage was not trained to its end, or its checkpoint is damaged.
    """
    records = [_trained(space, "pretrain", PRETRAIN, space.config.train_pretrain),
               _trained(space, "sft", SFT, space.config.train_sft)]
    target = space.out / "seed_llama"
    trained = space.work / SFT / f"checkpoint-{space.config.train_sft.steps}"
    fault = fault_of(trained)
    if fault:
        raise CheckpointError(f"{trained}: cannot be installed: {fault}; delete {trained.parent} and train it with: "
                              f"{TRAIN} {space.work} --config-name {SFT}.")
    target.mkdir(parents=True, exist_ok=True)
    for file in (*trained.glob("model*.safetensors"), trained / "config.json", trained / "generation_config.json"):
        replace_copy(file, target)
    parameters = sum(map(count_parameters, target.glob("model*.safetensors")))
    for record in records:
        content = json.dumps({**record, "parameters": parameters}, indent=1)
        replace_text(space.work / f"{record['stage']}.done.json", content)
    losses = {f"{record['stage']}_{key}": value for record in records for key, value in record.items()
            if key.startswith("val_")}
    return {"stage": "llm", "seconds": sum(record["seconds"] for record in records), **losses}


def _trained(space: Workspace, stage: str, name: str, settings: StageSettings) -> dict[str, Any]:
    """The record of one of the application's stages."""
    folder = space.work / name
    done = folder / "summary.json"
    summary = read_record(done) if done.is_file() else {}
    if summary.get("steps") != settings.steps:
        raise CheckpointError(f"{folder}: {name} is not trained to its end; train it with: {TRAIN} {space.work} "
                              f"--config-name {name} (bash scripts/nano_speedrun.sh does it all).")
    held_out = {f"val_{key}_loss": round(float(summary["evaluation"][f"eval_{key}_loss"]), 4)
                for key in ("text", "image") if f"eval_{key}_loss" in summary.get("evaluation", {})}
    return {"stage": stage, "steps": settings.steps, "batch_size": f"{_rows(settings)} rows of {ROW}",
            "seconds": summary["seconds"], "tokens": int(summary["tokens"]), **held_out}


# ------------------------------------------------------------------------------------------------------- the records


def _codes(space: Workspace, scenes: Sequence[Scene]) -> Tensor:
    """Codes int16 [N, 32], kept in the work folder."""
    def make() -> Tensor:
        tokenizer, parts = load_tokenizer(space), []
        for start in range(0, len(scenes), ENCODED_AT_ONCE):
            parts.append(encode_scenes(tokenizer, scenes[start:start + ENCODED_AT_ONCE], space.config.image_size))
            print(f"[records] {start + len(parts[-1])} of {len(scenes)} pictures encoded", flush=True)
        return torch.cat(parts)

    return space.cached(CODES, "tokenizer", make, gate_scenes=space.config.gate_scenes,
                        **asdict(space.config.records))


def _written(kind: str, records: Sequence[Record],
             codes: Callable[[Scene], list[int]]) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number, record in enumerate(records):
        picture = (lambda scene: {"codes": codes(scene)}) if "messages" in record else codes
        content = json.dumps(with_pictures(record, picture), separators=(",", ":"))
        yield f"{kind}-{number:06d}", {"json": content.encode()}


def _shard(space: Workspace, name: str, split: str) -> Path:
    return space.work.absolute() / "records" / split / f"{name}.tar"


# ------------------------------------------------------------------------------------------------ the configurations


def _data(space: Workspace, sources: Sources, counts: Counts, split: str, settings: StageSettings) -> dict[str, Any]:
    chosen = [{"name": name, "files": str(_shard(space, shard, split)), "decoder": decoder, "options": dict(options),
               "weight": weight}
              for name, (shard, decoder, options, weight) in sources.items()
              if counts[split][shard]]
    return {"packing": True, "length": ROW, "rows": _rows(settings), "seed": space.config.seed + settings.seed,
            "too_long": "skip", "sources": chosen}


def _rows(settings: StageSettings) -> int:
    return max(1, settings.batch_size * MEAN_LENGTH // ROW)


def _model(space: Workspace, settings: StageSettings, start: Path | None) -> dict[str, Any]:
    """A random start at the configured size, or the folder of an earlier model."""
    if settings.start:
        start = Path(settings.start)
        if not (start / "config.json").is_file():
            raise ConfigError(f"{settings.start}: start of a language model's stage must be the folder of a LLaMA, "
                              "such as the checkpoint-N of an earlier run.")
    sizes = space.config.llm
    common = {"dtype": "fp32", "seed": space.config.seed + 5,
              "compile": bool(shutil.which("g++")) if sizes.compile is None else sizes.compile}
    if start is not None:
        return {"path": str(start.absolute()), **common}
    return {"sizes": {"hidden_size": sizes.width, "intermediate_size": sizes.ffn, "num_hidden_layers": sizes.layers,
                      "num_attention_heads": sizes.heads, "max_position_embeddings": sizes.positions,
                      "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
            "codebook_start": str(space.tokenizer_folder.absolute()), **common}


def _optim(settings: StageSettings) -> dict[str, Any]:
    return {"name": "muon", "learning_rate": settings.lr, "weight_decay": settings.weight_decay,
            "lr_scheduler_type": "cosine", "warmup_steps": settings.warmup, "min_lr_ratio": settings.min_lr_ratio}


def _trainer(config: NanoConfig, settings: StageSettings) -> dict[str, Any]:
    every = max(1, settings.steps // 5)
    return {"max_steps": settings.steps, "gradient_accumulation_steps": settings.accumulate,
            "precision": settings.precision, "max_grad_norm": settings.clip, "seed": config.seed + settings.seed,
            "device": config.device, "dataloader_num_workers": 0, "logging_steps": settings.log_every,
            "text_weight": TEXT_WEIGHT, "eval_steps": settings.steps, "eval_batches": 4,
            "save_steps": settings.save_every_steps or every, "save_total_limit": 1,
            "report_to": ["tensorboard"] if settings.tensorboard else []}
