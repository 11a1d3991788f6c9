"""`merge_lora_weights.py`: base and adapter → a plain LLaMA folder; of a tuned SEED-X folders `llm` and `agent`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seed_multimodal.cli.common import program_parser
from seed_multimodal.entry import DONE, log_line, run_program
from seed_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from seed_multimodal.language.lora import TrainedWeights


def main(program: str, description: str, arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    parser = program_parser(program, description)
    parser.add_argument("--model_cfg", required=True, help="YAML of the model (base and peft_config), or a run's")
    parser.add_argument("--tokenizer_cfg", help="YAML of the tokenizer, or a run's; its files are saved, too")
    parser.add_argument("--base_model", help="folder of the base model, instead of the YAML's")
    parser.add_argument("--lora_model", required=True, help="adapter, whole trained model, or zero_to_fp32.py output")
    parser.add_argument("--agent_cfg", help="YAML of SEED-X's agent: sizes of the resamplers, where no agent.json is "
                                            "beside the weights (default: the original sizes)")
    parser.add_argument("--save_path", required=True, help="new folder for the merged model")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16", "base"), help="default: fp32")
    parser.add_argument("--max_shard_size", default="5GB", help="largest weights file (default: 5GB)")
    parser.add_argument("--force", action="store_true", help="replace a folder that is not empty")
    return run_program(parser, _merge, arguments)


def _merge(args: argparse.Namespace) -> int:
    from seed_multimodal.hub import locate
    from seed_multimodal.language.lora import merge_adapter
    from seed_multimodal.quiet import quiet_libraries

    quiet_libraries(args.debug)
    node = _read(args.model_cfg, "model")
    inner = node.get("model") if isinstance(node.get("model"), Mapping) else {}
    bases = (args.base_model, inner.get("pretrained_model_name_or_path"), node.get("path"),
             node.get("pretrained_model_name_or_path"))
    base = next((str(one) for one in bases if one not in (None, "", "???")), None)
    log_line(merge_adapter(
        (locate(base) or base) if base else None, locate(args.lora_model) or args.lora_model, args.save_path,
        tokenizer=_tokenizer(args.tokenizer_cfg), lora=node.get("peft_config") or node.get("lora"), dtype=args.dtype,
        max_shard_size=args.max_shard_size, force=args.force,
        agent=partial(_agent, args.agent_cfg)))
    return DONE


def _read(file: str | Path, part: str) -> Any:
    """A part's YAML, or that part of a run's configuration."""
    from omegaconf import OmegaConf

    from seed_multimodal.config import load_yaml

    values: Any = OmegaConf.to_container(load_yaml(file), resolve=True)
    return values.get(part) or {} if {"trainer", "data"} <= set(values) else values


def _tokenizer(file: str | None) -> Any:
    if file is None:
        return None
    from seed_multimodal.hub import locate
    from seed_multimodal.language.tokenizer import ADDED, MultimodalTokenizer
    from seed_multimodal.lavit.processing import LavitTokenizer

    name = _read(file, "tokenizer").get("pretrained_model_name_or_path")
    if name in (None, "", "???"):
        raise ConfigError(f"{file}: pretrained_model_name_or_path is needed: the tokenizer's folder.")
    folder = Path(locate(str(name)) or str(name))
    kind = MultimodalTokenizer if (folder / ADDED).is_file() else LavitTokenizer  # LaVIT's codes have no spelling
    return kind.from_pretrained(folder)


def _agent(file: str | None, trained: TrainedWeights) -> dict[str, Any]:
    """`agent/config.json` of a SEED-X agent: its sizes."""
    from seed_multimodal.seed_x.modeling import AgentSettings
    from seed_multimodal.seed_x.pipeline import AgentSizes
    from seed_multimodal.settings import read_settings

    values = _read(file, "agent") if file else trained.agent_config
    losses = {entry.name: values[entry.name] for entry in fields(AgentSettings) if entry.name in values}
    sizes = {"settings": {**losses, **(values.get("losses") or {})}} | {
        name: {key: value for key, value in values[name].items() if not key.startswith("_")}
        for name in ("input_resampler", "output_resampler") if name in values}
    return asdict(read_settings(AgentSizes, sizes, file or str(trained.source)))
