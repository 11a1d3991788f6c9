"""`merge_lora_weights.py`: base and adapter → a plain LLaMA folder. Flags as the original's, and a few more."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seed_multimodal.entry import DONE, log_line, run_program
from seed_multimodal.errors import ConfigError


def main(program: str, description: str, arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog=program, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_cfg", required=True, help="YAML of the model: base and peft configuration")
    parser.add_argument("--tokenizer_cfg", help="YAML of the tokenizer; its words are checked, its files written")
    parser.add_argument("--base_model", help="folder of the base model, instead of the YAML's")
    parser.add_argument("--lora_model", required=True,
                        help="folder of the adapter (or of a whole trained model, or a zero_to_fp32.py output)")
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
    report = merge_adapter(
        (locate(base) or Path(base)) if base else None, locate(options.lora_model) or Path(options.lora_model),
        options.save_path,
        tokenizer=_tokenizer(options.tokenizer_cfg), lora=lora, dtype=options.dtype,
        max_shard_size=options.max_shard_size, verify=options.verify, force=options.force, log=log_line)
    log_line(str(report))
    return DONE


def _plain(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from seed_multimodal.config import load_yaml

    values = OmegaConf.to_container(load_yaml(file), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _model(file: Path, base: str | None) -> tuple[str | None, Mapping[str, Any] | None]:
    """Base folder and LoRA fields of a model's YAML, ours or the original's."""
    node = _plain(file)
    inner = node.get("model")
    inner = inner if isinstance(inner, Mapping) else {}
    found = base or inner.get("pretrained_model_name_or_path") or node.get("path") or node.get(
        "pretrained_model_name_or_path")
    lora = node.get("peft_config") or node.get("lora")
    if lora is not None and not isinstance(lora, Mapping):
        raise ConfigError(f"{file}: peft_config (lora) must be a mapping.")
    return (str(found) if found not in (None, "???") else None), lora


def _tokenizer(file: str | None) -> Any:
    if file is None:
        return None
    from seed_multimodal.hub import locate
    from seed_multimodal.language.tokenizer import MultimodalTokenizer

    folder = _plain(Path(file)).get("pretrained_model_name_or_path")
    if folder in (None, "", "???"):
        raise ConfigError(f"{file}: pretrained_model_name_or_path is needed: the tokenizer's folder.")
    return MultimodalTokenizer.from_pretrained(locate(str(folder)) or Path(str(folder)))
