"""`merge_lora_weights.py`: base and adapter → a plain LLaMA folder; of a tuned SEED-X a folder with `llm` and `agent`,
which `SeedX.from_pretrained` loads. Flags as the original's, and a few more."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seed_multimodal.entry import DONE, log_line, run_program
from seed_multimodal.errors import ConfigError

RESAMPLERS = ("input_resampler", "output_resampler")

if TYPE_CHECKING:
    from seed_multimodal.language.adapters import TrainedTensors


def main(program: str, description: str, arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog=program, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_cfg", required=True, help="YAML of the model (base and peft configuration), or the "
                                                             "run's own config.yaml")
    parser.add_argument("--tokenizer_cfg", help="YAML of the tokenizer, or the run's config.yaml; its words are "
                                                  "checked, its files written")
    parser.add_argument("--base_model", help="folder of the base model, instead of the YAML's")
    parser.add_argument("--lora_model", required=True,
                        help="folder of the adapter (or of a whole trained model, or a zero_to_fp32.py output)")
    parser.add_argument("--agent_cfg", help="YAML of SEED-X's agent: sizes of the resamplers, where no agent.json is "
                                            "beside the weights (default: the released sizes)")
    parser.add_argument("--save_path", required=True, help="new folder for the merged model")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16", "base"),
                        help="precision of the written weights (default: fp32, as released)")
    parser.add_argument("--max_shard_size", default="5GB", help="largest weights file (default: 5GB)")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True,
                        help="compare logits before and after (default: yes)")
    parser.add_argument("--force", action="store_true", help="replace a folder that is not empty")
    return run_program(parser, _merge, arguments)


def _merge(options: argparse.Namespace) -> int:
    from seed_multimodal.hub import locate
    from seed_multimodal.language.merge import merge_adapter
    from seed_multimodal.quiet import quiet_libraries

    quiet_libraries(options.debug)
    base, lora = _model(Path(options.model_cfg), options.base_model)
    trained = locate(options.lora_model) or Path(options.lora_model)
    report = merge_adapter(
        (locate(base) or Path(base)) if base else None, trained, options.save_path,
        agent=partial(_agent, options.agent_cfg), tokenizer=_tokenizer(options.tokenizer_cfg), lora=lora,
        dtype=options.dtype, max_shard_size=options.max_shard_size, verify=options.verify, force=options.force,
        log=log_line)
    log_line(str(report))
    return DONE


def _plain(file: Path, part: str) -> dict[str, Any]:
    """A part's YAML; or that part of the configuration that a run keeps."""
    from omegaconf import OmegaConf

    from seed_multimodal.config import load_yaml

    values = OmegaConf.to_container(load_yaml(file), resolve=True)
    assert isinstance(values, dict)
    if {"trainer", "data"} <= set(values):
        values = values.get(part)
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: the run's configuration has no {part}.")
    return {str(key): value for key, value in values.items()}


def _model(file: Path, base: str | None) -> tuple[str | None, Mapping[str, Any] | None]:
    """Base folder and LoRA fields of a model's YAML, ours or the original's."""
    node = _plain(file, "model")
    inner = node.get("model")
    inner = inner if isinstance(inner, Mapping) else {}
    found = base or inner.get("pretrained_model_name_or_path") or node.get("path") or node.get(
        "pretrained_model_name_or_path")
    lora = node.get("peft_config") or node.get("lora")
    if lora is not None and not isinstance(lora, Mapping):
        raise ConfigError(f"{file}: peft_config (lora) must be a mapping.")
    return (str(found) if found not in (None, "???") else None), lora


def _agent(file: str | None, found: TrainedTensors) -> dict[str, Any]:
    """`agent/config.json` of a SEED-X agent: its sizes, checked against its tensors."""
    from dataclasses import asdict, fields

    import torch

    from seed_multimodal.errors import CheckpointError
    from seed_multimodal.seed_x.modeling import AgentSettings
    from seed_multimodal.seed_x.vision import Resampler
    from seed_multimodal.settings import read_settings
    from seed_multimodal.systems.seed_x_parts import AgentSizes

    where, values = str(found.source), _plain(Path(file), "agent") if file else found.agent
    losses = {one.name: values[one.name] for one in fields(AgentSettings) if one.name in values}
    own: dict[str, Any] = {"settings": {**losses, **(values.get("losses") or {})}}
    for name in RESAMPLERS:
        if isinstance(node := values.get(name), Mapping):
            own[name] = {key: value for key, value in node.items() if not str(key).startswith("_")}
    sizes = read_settings(AgentSizes, own, file or where)
    for name in RESAMPLERS:
        with torch.device("meta"):
            expected = {f"{name}.{key}": tuple(value.shape) for key, value in Resampler(
                getattr(sizes, name)).state_dict().items() if key != "pos_embed"}
        for key, shape in expected.items():
            there = found.shape(found.beside[key]) if key in found.beside else "missing"
            if there != shape:
                raise CheckpointError(f"{where}: {key!r} is {there}, but {file or 'the released agent'} has {shape}; "
                                      f"give the agent's YAML (--agent_cfg) that it was trained with.")
    return asdict(sizes)


def _tokenizer(file: str | None) -> Any:
    if file is None:
        return None
    from seed_multimodal.hub import locate
    from seed_multimodal.language.lavit import LavitTokenizer
    from seed_multimodal.language.tokenizer import MultimodalTokenizer
    from seed_multimodal.language.tokenizer_files import ADDED

    folder = _plain(Path(file), "tokenizer").get("pretrained_model_name_or_path")
    if folder in (None, "", "???"):
        raise ConfigError(f"{file}: pretrained_model_name_or_path is needed: the tokenizer's folder.")
    place = Path(locate(str(folder)) or str(folder))
    kind = MultimodalTokenizer if (place / ADDED).is_file() else LavitTokenizer  # LaVIT's image words have no spelling
    return kind.from_pretrained(place)
