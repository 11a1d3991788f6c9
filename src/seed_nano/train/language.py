"""nano's records as shards of pre-tokenised data, and the trained language models as parts of their systems."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from seed_multimodal.data.formats.writer import write_shard
from seed_multimodal.disk import read_json_object, replace_copy, replace_text
from seed_multimodal.language.continuous import AgentSettings, ContinuousLVLM
from seed_multimodal.vision.resampler import Resampler, ResamplerConfig
from seed_multimodal.weights import count_parameters, save_state_dict
from seed_nano.train.tokenizer import encode_scenes, load_tokenizer
from seed_nano.train.workspace import Workspace
from seed_nano.world.records import Record, record_at, scenes_of, with_pictures
from seed_nano.world.scene import Scene

ENCODED_AT_ONCE = 8192
HELD_OUT_SHARE = 0.02  # of the records of a kind, made of scenes of the val split for the held-out loss


def records(space: Workspace) -> dict[str, Any]:
    """Stage `records`: the shards; returns how many training records each kind has."""
    def encode(scenes: Sequence[Scene]) -> Tensor:
        def make() -> Tensor:
            tokenizer, parts = load_tokenizer(space), []
            for start in range(0, len(scenes), ENCODED_AT_ONCE):
                parts.append(encode_scenes(tokenizer, scenes[start:start + ENCODED_AT_ONCE], space.config.image_size))
                print(f"[records] {start + len(parts[-1])} of {len(scenes)} images encoded", flush=True)
            return torch.cat(parts)

        return space.cached("record_codes", "tokenizer", make, gate_scenes=space.config.gate_scenes,
                            **asdict(space.config.records))

    return write_records(space, encode)


def write_records(space: Workspace, encode: Callable[[Sequence[Scene]], Tensor]) -> dict[str, int]:
    """Write `work/records/SPLIT/KIND.tar`; every image is encoded once, however many records show it.

    Args:
        encode: N scenes → their codes int16 `[N, 32]`.
    """
    config = space.config
    amounts: dict[str, int] = asdict(config.records)
    few = {kind: max(1, round(number * HELD_OUT_SHARE)) for kind, number in amounts.items()}
    made = {split: {kind: [record_at(kind, config.seed, index, split, pool) for index in range(number)]
                    for kind, number in numbers.items()}
            for split, numbers, pool in (("train", amounts, config.pool), ("val", few, config.gate_scenes))}
    scenes = list(dict.fromkeys(scene for kinds in made.values() for records in kinds.values()
                                for record in records for scene in scenes_of(record)))
    rows = dict(zip(scenes, encode(scenes).tolist(), strict=True))

    def written(kind: str, records: Sequence[Record]) -> Iterator[tuple[str, dict[str, bytes]]]:
        for number, record in enumerate(records):
            picture = (lambda scene: {"codes": rows[scene]}) if "messages" in record else rows.__getitem__
            content = json.dumps(with_pictures(record, picture), separators=(",", ":"))
            yield f"{kind}-{number:06d}", {"json": content.encode()}

    for split, kinds in made.items():
        for kind, records in kinds.items():
            write_shard(space.work.absolute() / "records" / split / f"{kind}.tar", written(kind, records))
    return {"pictures": len(scenes), **amounts}


def install_llm(space: Workspace) -> dict[str, Any]:
    """Stage `llm` of nano: the tuned model as `{out}/seed_llama`; also the records `pretrain` and `sft`."""
    target = space.out / "seed_llama"
    target.mkdir(parents=True, exist_ok=True)
    trained = space.work / "llm_sft" / f"checkpoint-{read_json_object(space.record('llm_sft'))['steps']}"
    for file in (*trained.glob("model*.safetensors"), trained / "config.json", trained / "generation_config.json"):
        replace_copy(file, target)
    parameters = sum(map(count_parameters, target.glob("model*.safetensors")))
    found: dict[str, Any] = {}
    for stage in ("pretrain", "sft"):
        record = _trained(space, stage)
        replace_text(space.work / f"{stage}.done.json", json.dumps({**record, "parameters": parameters}, indent=1))
        found |= {f"{stage}_{key}": value for key, value in record.items() if key.startswith("val_")}
    return found


def _trained(space: Workspace, stage: str) -> dict[str, Any]:
    """The card's record of an application's stage of nano."""
    summary, recipe = read_json_object(space.record(f"llm_{stage}")), OmegaConf.load(space.work / f"llm_{stage}.yaml")
    held_out = {f"val_{key}_loss": round(float(summary["evaluation"][f"eval_{key}_loss"]), 4)
                for key in ("text", "image") if f"eval_{key}_loss" in summary.get("evaluation", {})}
    return {"stage": stage, "steps": summary["steps"], "seconds": summary["seconds"],
            "batch_size": f"{recipe.data.rows} rows of {recipe.data.length}", "tokens": int(summary["tokens"]),
            **held_out}


def install_agent(space: Workspace) -> dict[str, Any]:
    """Stage `agent` of nano-x: the tuned model as `{out}/llm` and `{out}/agent`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    record, words = read_json_object(space.record("sft")), space.words
    recipe: Any = OmegaConf.to_container(OmegaConf.load(space.work / "sft.yaml"))
    parts = {name: recipe["agent"][name] for name in ("input_resampler", "output_resampler")}
    losses = recipe["agent"]["losses"]
    sizes = recipe["model"].get("sizes") or LlamaConfig.from_pretrained(recipe["model"]["path"]).to_dict()
    llm = LlamaForCausalLM(LlamaConfig(**sizes | {
        "vocab_size": words.vocabulary.size, "bos_token_id": words.bos_id, "eos_token_id": words.eos_id,
        "pad_token_id": words.pad_id}))
    before, behind = (Resampler(ResamplerConfig(**part)) for part in parts.values())
    agent = ContinuousLVLM.from_pretrained(llm, before, behind, space.work / "sft" / f"checkpoint-{record['steps']}",
                                           **asdict(AgentSettings(**losses)))
    llm.save_pretrained(space.out / "llm")
    save_state_dict({name: value for name, value in agent.state_dict().items() if not name.startswith("llm.")},
                    space.out / "agent" / "model.safetensors")
    replace_text(space.out / "agent" / "config.json", json.dumps({**parts, "settings": losses}, indent=1))
    return {"tokens": int(record.get("tokens", 0))}


def install_lavit_llm(space: Workspace) -> dict[str, Any]:
    """Stage `llm` of nano-lavit: the trained model as `{out}/llm`, merger and projector with the tokenizer."""
    record = read_json_object(space.record("language"))
    trained = space.work / "language" / f"checkpoint-{record['steps']}"
    (space.out / "llm").mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        if (trained / name).is_file():
            shutil.copyfile(trained / name, space.out / "llm" / name)
    shutil.copyfile(trained / "visual_weight.safetensors", space.out / "tokenizer" / "visual_weight.safetensors")
    return {"tokens": int(record.get("tokens", 0))}
