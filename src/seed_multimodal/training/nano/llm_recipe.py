"""Stages `records` and `llm`: the language model's training data and configurations, and the installation of the
result.

`records` writes shards of pre-tokenised records (`work/records/`) and two configurations of the application,
`work/llm_pretrain.yaml` (captions, both ways) and `work/llm_sft.yaml` (instructions). Between the two stages, from the
repository's folder:

    python MultiModalLLM/src/train/train.py --config-path WORK --config-name llm_pretrain       then the same, llm_sft

Different from the released recipe: every weight is trained, from a random start whose image words come from the
codebook; matrices by Muon; a text token weighs as much as four image tokens; pictures that are read come from any view,
and up to 35 % of their codes from another picture, because there are few pictures and many passes over them: without
such noise the model memorises them and confuses pictures in a style in which it has not seen the object. Pictures that
are written are the unaugmented ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from seed_multimodal.data.formats.writer import write_shard
from seed_multimodal.data.pretokenize.input_settings import InputSettings
from seed_multimodal.data.pretokenize.nano import nano_records
from seed_multimodal.disk import replace_copy, replace_text
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.training.loop_settings import StageSettings
from seed_multimodal.training.nano.config import NanoConfig
from seed_multimodal.training.nano.tokenizer import codes
from seed_multimodal.training.nano.workspace import Workspace
from seed_multimodal.weights import count_parameters

PRETRAIN, SFT = "llm_pretrain", "llm_sft"
NOISE = 0.35
TEXT_WEIGHT = 4.0  # an answer has eight tokens where a picture has 34; equal weights would teach mostly pictures
MEAN_LENGTH = 64  # tokens a sequence has about: turns `batch_size` sequences into packed rows
ROW = 256
TRAIN = "python MultiModalLLM/src/train/train.py --config-path"
# Sources of both mixtures: name -> (shard, decoder, options, share).
Sources = dict[str, tuple[str, str, dict[str, Any], float]]
Counts = dict[str, dict[str, int]]  # split -> shard -> records
READ: dict[str, Any] = {"code_noise": NOISE}
PRETRAIN_SOURCES: Sources = {
    "image_first": ("seen", "pretrain.caption", {"reverse_ratio": 1.0, "first_text": 0.5, **READ}, 0.5),
    "text_first": ("drawn", "pretrain.caption", {"reverse_ratio": 0.0, "first_text": 0.5}, 0.5)}
SFT_SOURCES: Sources = {
    "image_first": (*PRETRAIN_SOURCES["image_first"][:3], 0.05),
    "text_first": (*PRETRAIN_SOURCES["text_first"][:3], 0.10),
    "describe": ("describe", "chat", READ, 0.20), "qa": ("qa", "chat", READ, 0.25), "draw": ("draw", "chat", {}, 0.15),
    "edit": ("edits", "chat", READ, 0.17), "chat": ("conversations", "chat", {"answers": "one"}, 0.08)}


def records(space: Workspace) -> dict[str, Any]:
    """Stage `records`: shards and configurations; returns how many training records each shard holds."""
    counts = write_records(space, codes(space))
    return {"files": " ".join(map(str, write_llm_recipes(space, counts))), **counts["train"]}


def write_records(space: Workspace, codes: Tensor) -> Counts:
    """Write the shards of both splits; returns how many records each holds.

    Args:
        codes: int16 [N, V, 32] of every picture of the set; view 0 is the picture itself.
    """
    counts: Counts = {}
    for split, chosen in (("train", space.train), ("val", space.held_out)):
        keys = {space.nano.records[index].key for index in chosen}
        counts[split] = {name: write_shard(_shard(space, name, split), _numbered(name, records))
                         for name, records in _shards(space, split, keys, codes).items()}
    return counts


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
        CheckpointError: a stage was not trained to its end.
    """
    records = [_trained(space, "pretrain", PRETRAIN, space.config.train_pretrain),
               _trained(space, "sft", SFT, space.config.train_sft)]
    target = space.out / "seed_llama"
    target.mkdir(parents=True, exist_ok=True)
    trained = space.work / SFT / f"checkpoint-{space.config.train_sft.steps}"
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
    summary = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    if summary.get("steps") != settings.steps:
        raise CheckpointError(f"{folder}: {name} is not trained to its end; train it with: {TRAIN} {space.work} "
                              f"--config-name {name} (bash scripts/nano_speedrun.sh does it all).")
    held_out = {f"val_{key}_loss": round(float(summary["evaluation"][f"eval_{key}_loss"]), 4)
                for key in ("text", "image") if f"eval_{key}_loss" in summary.get("evaluation", {})}
    return {"stage": stage, "steps": settings.steps, "batch_size": f"{_rows(settings)} rows of {ROW}",
            "seconds": summary["seconds"], "tokens": int(summary["tokens"]), **held_out}


# ------------------------------------------------------------------------------------------------------- the records


def _shards(space: Workspace, split: str, keys: set[str], codes: Tensor) -> dict[str, Iterable[dict[str, Any]]]:
    every = {record.key: codes[index].tolist() for index, record in enumerate(space.nano.records)
             if record.split == split or record.key in keys}

    def views(key: str) -> list[list[int]]:
        return every[key]

    def itself(key: str) -> list[int]:
        return every[key][0]

    def references(content: str) -> Iterator[dict[str, Any]]:
        settings = InputSettings(format="nano", split=split, content=content, captions="list")
        for raw in nano_records(str(space.nano.folder), settings):
            if set(raw.members) <= keys:
                yield raw.fields

    captions = [{"image": fields["image"], "text": fields["caption"]} for fields in references("captions")]
    seen = ({"views": views(one["image"]), "text": one["text"]} for one in captions)
    drawn = ({"image_ids": itself(one["image"]), "text": one["text"]} for one in captions)
    return {"seen": seen, "drawn": drawn,
            **{content: _dialogues(references(content), views, itself, talk=content == "conversations")
               for content in ("describe", "qa", "draw", "edits", "conversations")}}


def _dialogues(found: Iterable[Mapping[str, Any]], views: Callable[[str], Any], itself: Callable[[str], Any],
               talk: bool) -> Iterator[dict[str, Any]]:
    """Pictures of the user's turns in all views (of a talk, where the model may have drawn them, themselves)."""
    for fields in found:
        yield {"messages": [
            {"role": message["role"],
             "content": [part if isinstance(part, str) else
                         {"codes": (views if message["role"] == "user" and not talk else itself)(part["image"])}
                         for part in message["content"]]} for message in fields["messages"]]}


def _numbered(name: str, records: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number, record in enumerate(records):
        yield f"{name}-{number:06d}", {"json": json.dumps(record, separators=(",", ":")).encode()}


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
    common = {"dtype": "fp32", "seed": space.config.seed + 5, "compile": sizes.compile}
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
