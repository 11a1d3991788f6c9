"""The originals' programs `merge_lora_weights.py` and `reload_qwen_vit.py`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from seed_multimodal.cli.common import add_flags, program_parser
from seed_multimodal.config import load_yaml
from seed_multimodal.disk import JsonObject
from seed_multimodal.entry import DONE, log_line, run_program
from seed_multimodal.errors import ConfigError
from seed_multimodal.progress import quiet_libraries
from seed_multimodal.weights.find import locate_or_same

if TYPE_CHECKING:
    from seed_multimodal.language.lora import TrainedWeights
    from seed_multimodal.language.text_tokenizer import TextTokenizer


def merge_script(program: str, description: str, arguments: Sequence[str] | None = None) -> int:
    """`merge_lora_weights.py`: base and adapter → a LLaMA folder; of a tuned SEED-X folders `llm`
    and `agent`."""
    parser = program_parser(program, description)
    add_flags(parser, "merge_lora_weights.py")
    return run_program(parser, _merge, arguments)


def _merge(args: Namespace) -> int:
    from seed_multimodal.language.lora import merge_adapter

    quiet_libraries(args.debug)
    node = _read_part(args.model_cfg, "model")

    # 1. The base model: by flag, or in one of the places of the original's and our YAML files.
    inner_node = node.get("model")
    if not isinstance(inner_node, Mapping):
        inner_node = {}
    candidates = (
        args.base_model,
        inner_node.get("pretrained_model_name_or_path"),
        node.get("path"),
        node.get("pretrained_model_name_or_path"),
    )
    names = [name for name in candidates if name not in (None, "", "???")]
    base = locate_or_same(names[0]) if names else None

    # 2. The merged folder.
    summary = merge_adapter(
        base,
        locate_or_same(args.lora_model),
        args.save_path,
        tokenizer=_load_tokenizer(args.tokenizer_cfg) if args.tokenizer_cfg else None,
        lora=node.get("peft_config") or node.get("lora"),
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        force=args.force,
        agent=partial(_agent_config, args.agent_cfg),
    )
    log_line(summary)
    return DONE


def _read_part(file: str | Path, part: str) -> JsonObject:
    """A part's YAML, or that part of a run's configuration."""
    from omegaconf import OmegaConf

    values = cast("JsonObject", OmegaConf.to_container(load_yaml(file), resolve=True))
    is_run = {"trainer", "data"} <= set(values)
    return values.get(part) or {} if is_run else values


def _load_tokenizer(file: str) -> TextTokenizer:
    """The tokenizer that a YAML file names."""
    from seed_multimodal.language.hub_tokenizer import IMAGE_TOKENS, load_text_tokenizer
    from seed_multimodal.language.tokenizer import ADDED
    from seed_multimodal.models.lavit.processing import LavitTokenizer

    name = _read_part(file, "tokenizer").get("pretrained_model_name_or_path")
    if name in (None, "", "???"):
        raise ConfigError(
            f"{file}: pretrained_model_name_or_path is needed: the tokenizer's folder."
        )
    folder = locate_or_same(name)
    # LaVIT's codes have no spelling, so its tokenizer adds none.
    if (folder / ADDED).is_file() or (folder / IMAGE_TOKENS).is_file():
        return load_text_tokenizer(folder)
    return LavitTokenizer.from_pretrained(folder)


def _agent_config(file: str | None, trained: TrainedWeights) -> JsonObject:
    """`agent/config.json` of a SEED-X agent: its sizes."""
    from seed_multimodal.compat.part_files import split_agent
    from seed_multimodal.models.seed_x.pipeline import AgentConfig
    from seed_multimodal.settings import read_settings

    values = _read_part(file, "agent") if file else trained.agent_config

    losses, others = split_agent(values)
    sizes: JsonObject = {"settings": losses}
    for name in ("input_resampler", "output_resampler"):
        if name in others:
            sizes[name] = others[name]
    return asdict(read_settings(AgentConfig, sizes, file or str(trained.source)))


def reload_script(argv: Sequence[str] | None = None) -> int:
    """`reload_qwen_vit.py`: Qwen-VL-Chat's shards → the file of the vision encoder that SEED-X's
    YAML files name."""
    parser = ArgumentParser(
        prog="reload_qwen_vit.py",
        description="The vision encoder of Qwen-VL-Chat as a file of its own.",
    )
    add_flags(parser, "reload_qwen_vit.py")
    return run_program(parser, _reload, argv)


def _reload(args: Namespace) -> int:
    from seed_multimodal.nn.vision.qwen import extract

    target = Path(args.out)
    if target.exists() and not args.force:
        raise ConfigError(f"{target}: exists already (--force writes over it).")
    n_tensors = extract(target, locate_or_same(args.source))
    log_line(f"{target}: {n_tensors} tensors")
    return DONE
