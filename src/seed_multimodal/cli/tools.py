"""`seed convert | export-tokenizer | export-gguf | assemble | plot`, `merge_lora_weights.py`,
`reload_qwen_vit.py`."""

from __future__ import annotations

import pkgutil
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from seed_multimodal.cli.common import add_json, cat_image, emit, program_parser
from seed_multimodal.config import load_yaml
from seed_multimodal.disk import JsonObject, read_json_object, writing
from seed_multimodal.entry import DONE, log_line, run_program
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import first_file, locate
from seed_multimodal.models.registry import families, find_family, tokenizer_exports
from seed_multimodal.progress import quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor

    from seed_multimodal.cli.common import Commands
    from seed_multimodal.language.lora import TrainedWeights
    from seed_multimodal.language.text_tokenizer import TextTokenizer


def add_commands(commands: Commands) -> None:
    """The commands with their flags."""
    # convert and plot
    converter = commands.add_parser("convert", help="old .pt/.pth/.bin weights → safetensors")
    converter.add_argument("source")
    converter.add_argument("target", nargs="?", help="default: the same name with .safetensors")
    converter.add_argument("--force", action="store_true", help="write over an existing file")
    converter.set_defaults(work=convert)
    plotter = commands.add_parser("plot", help="curves of training runs, over each other")
    plotter.add_argument(
        "runs", nargs="+", help="output folders of training runs, or their NAME.log.jsonl"
    )
    plotter.add_argument(
        "--out", default="curves.png", help="figure: .png, .pdf or .svg (default: %(default)s)"
    )
    plotter.set_defaults(work=plot)

    # export-tokenizer and export-gguf
    exporter = commands.add_parser("export-tokenizer", help="trained stages → a tokenizer folder")
    _add_export(exporter)
    gguf = commands.add_parser(
        "export-gguf", help="SEED-LLaMA's language model → a file for --engine llama.cpp"
    )
    gguf.add_argument(
        "--model", default="nano", help="nano, 8b, 14b or a folder (default: %(default)s)"
    )
    gguf.add_argument(
        "--quant", choices=("q4_k_m", "q8_0", "f16"), default="q4_k_m", help="default: %(default)s"
    )
    gguf.add_argument("--out", metavar="FILE", help="default: in the language model's folder")
    gguf.set_defaults(work=export_llm)
    for command in (converter, plotter, exporter, gguf):
        add_json(command)

    # assemble, with the parts of each system
    kinds = commands.add_parser(
        "assemble", help="parts of trainings → a system folder"
    ).add_subparsers(required=True)
    for spec in families():
        parts = {key: part for key, part in spec.config.parts().items() if part.flag}
        command = kinds.add_parser(spec.name.replace("_", "-"), help=f"of {', '.join(parts)}")
        for key, part in parts.items():
            command.add_argument(f"--{key}", metavar="DIR", required=part.required, help=part.flag)
        command.add_argument(
            "--settings", help="JSON file with keys of system.json (generation, tasks …)"
        )
        command.add_argument("--out", required=True, help="folder to make")
        command.add_argument(
            "--force", action="store_true", help="replace that folder if it is not empty"
        )
        add_json(command)
        command.set_defaults(work=assemble, kind=spec.name)


def _add_export(parser: ArgumentParser) -> None:
    # Checkpoints.
    stages = parser.add_mutually_exclusive_group(required=True)
    for flag, exported in tokenizer_exports().items():
        stages.add_argument(f"--{flag}", metavar="CKPT", help=exported.help)
    parser.add_argument(
        "--stage1", metavar="CKPT", help="not needed if stage 2 trained the Q-Former too"
    )
    parser.add_argument(
        "--vision", metavar="CKPT", help="vision encoder, unless a stage trained it"
    )
    parser.add_argument(
        "--kind", choices=("auto", "seed2", "seed1"), default="auto", help="what stage 2 trained"
    )
    parser.add_argument(
        "--config", metavar="JSON", help="sizes (default: next to the checkpoint, else original)"
    )
    # The folder, and what else it holds.
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument(
        "--released", action="store_true", help="also write the original file layout"
    )
    parser.add_argument(
        "--image", help="to compare with the training modules (default: images/cat.jpg)"
    )
    parser.add_argument(
        "--text-tokenizer", metavar="DIR", help="copy the language tokenizer's files from here"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the folder if it is not empty"
    )
    parser.set_defaults(work=export)


def convert(args: Namespace) -> int:
    """Read `args.source` (.pt, .pth, .bin), write `args.target`."""
    from seed_multimodal.weights import load_state_dict, save_state_dict

    # Read and write.
    source = Path(args.source)
    target = Path(args.target) if args.target else source.with_suffix(".safetensors")
    if target.exists() and not args.force:
        raise ConfigError(f"{target}: exists already (--force writes over it).")
    tensors = load_state_dict(source)
    with writing(target):
        save_state_dict(tensors, target, {"converted_from": source.name})

    # What was converted.
    n_parameters = sum(tensor.numel() for tensor in tensors.values())
    record = {
        "source": str(source),
        "target": str(target),
        "tensors": len(tensors),
        "parameters": n_parameters,
    }
    emit(args, record, f"{target}: {len(tensors)} tensors, {n_parameters:,} numbers")
    return DONE


def plot(args: Namespace) -> int:
    """Draw the figure and print its name."""
    from seed_multimodal.training.plots import draw_runs

    logs = draw_runs(args.runs, args.out)
    emit(args, {"figure": args.out, "logs": [str(log) for log in logs]}, args.out)
    return DONE


def export(args: Namespace) -> int:
    """Join, write, read back, compare; print which part came from where."""
    if args.image is None and cat_image().is_file():
        args.image = cat_image()
    for flag, exported in tokenizer_exports().items():
        checkpoint = getattr(args, flag)
        if checkpoint is not None:
            record, text = pkgutil.resolve_name(exported.function)(checkpoint, args)
            emit(args, record, text)
    return DONE


def export_llm(args: Namespace) -> int:
    """Write the file; print its size, and the command that answers by it."""
    from seed_multimodal.inference.gguf import export_gguf
    from seed_multimodal.pipelines.config import CodeSystemConfig

    config = CodeSystemConfig.find(args.model).require("llm", "tokenizer")
    # By default next to the weights.
    llm = config.path("llm")
    out = Path(args.out or llm / f"{llm.name}-{args.quant}.gguf")
    size = export_gguf(llm, config.path("tokenizer"), out, args.quant).stat().st_size
    emit(
        args,
        {"file": str(out), "bytes": size},
        f"{out}: {size / 1e6:,.1f} MB. Next: seed chat --model {args.model} "
        f"--engine llama.cpp --gguf {out}",
    )
    return DONE


def assemble(args: Namespace) -> int:
    """Make the folder and print its path."""
    from seed_multimodal.pipelines.assemble import assemble_system

    # The flags that were given name the parts.
    parts = {}
    for name in find_family(args.kind).config.parts():
        path = getattr(args, name, None)
        if path is not None:
            parts[name] = path
    settings = read_json_object(Path(args.settings), ConfigError) if args.settings else {}
    folder = assemble_system(args.kind, args.out, parts, settings, force=args.force)
    emit(args, {"folder": str(folder)}, f"{folder}: open it with --model {folder}")
    return DONE


# ---- the originals' programs


def merge_script(program: str, description: str, arguments: Sequence[str] | None = None) -> int:
    """`merge_lora_weights.py`: base and adapter → a LLaMA folder; of a tuned SEED-X folders `llm`
    and `agent`."""
    # What is merged.
    parser = program_parser(program, description)
    parser.add_argument(
        "--model_cfg", required=True, help="YAML of the model (base and peft_config), or a run's"
    )
    parser.add_argument(
        "--tokenizer_cfg", help="YAML of the tokenizer, or a run's; its files are saved, too"
    )
    parser.add_argument("--base_model", help="folder of the base model, instead of the YAML's")
    parser.add_argument(
        "--lora_model",
        required=True,
        help="adapter, whole trained model, or zero_to_fp32.py output",
    )
    parser.add_argument(
        "--agent_cfg", help="YAML of SEED-X's agent (default: agent.json, else the original sizes)"
    )
    # The result.
    parser.add_argument("--save_path", required=True, help="new folder for the merged model")
    parser.add_argument(
        "--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="default: fp32"
    )
    parser.add_argument(
        "--max_shard_size", default="5GB", help="largest weights file (default: 5GB)"
    )
    parser.add_argument("--force", action="store_true", help="replace a folder that is not empty")
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
    base: str | Path | None = None
    for candidate in candidates:
        if candidate not in (None, "", "???"):
            base = locate(str(candidate)) or str(candidate)
            break

    # 2. The merged folder.
    summary = merge_adapter(
        base,
        locate(args.lora_model) or args.lora_model,
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
    folder = Path(locate(str(name)) or str(name))
    # LaVIT's codes have no spelling, so its tokenizer adds none.
    if (folder / ADDED).is_file() or (folder / IMAGE_TOKENS).is_file():
        return load_text_tokenizer(folder)
    return LavitTokenizer.from_pretrained(folder)


def _agent_config(file: str | None, trained: TrainedWeights) -> JsonObject:
    """`agent/config.json` of a SEED-X agent: its sizes."""
    from seed_multimodal.models.seed_x.modeling import AgentSettings
    from seed_multimodal.models.seed_x.pipeline import AgentConfig
    from seed_multimodal.settings import read_settings

    values = _read_part(file, "agent") if file else trained.agent_config

    # The original has the settings at the top, a run's configuration below `losses`.
    settings: JsonObject = {}
    for field in fields(AgentSettings):
        if field.name in values:
            settings[field.name] = values[field.name]
    settings |= values.get("losses") or {}

    # Sizes of the resamplers, without keys such as `_target_`.
    sizes: JsonObject = {"settings": settings}
    for name in ("input_resampler", "output_resampler"):
        if name in values:
            resampler = values[name].items()
            sizes[name] = {key: value for key, value in resampler if not key.startswith("_")}
    return asdict(read_settings(AgentConfig, sizes, file or str(trained.source)))


def reload_script(argv: Sequence[str] | None = None) -> int:
    """`reload_qwen_vit.py`: Qwen-VL-Chat's shards → the file of the vision encoder that SEED-X's
    YAML files name."""
    parser = ArgumentParser(
        prog="reload_qwen_vit.py",
        description="The vision encoder of Qwen-VL-Chat as a file of its own.",
    )
    parser.add_argument(
        "--source", default="pretrained/Qwen-VL-Chat", help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--out", default="pretrained/QwenViT/qwen_vit_G.pt", help="default: %(default)s"
    )
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    return run_program(parser, _reload, argv)


def _reload(args: Namespace) -> int:
    from seed_multimodal.nn.vision.qwen import IN_QWEN_VL
    from seed_multimodal.weights import INDEX_FILES, load_state_dict, save_torch

    # 1. The shards of Qwen-VL-Chat.
    target = Path(args.out)
    source = locate(args.source) or Path(args.source)
    if target.exists() and not args.force:
        raise ConfigError(f"{target}: exists already (--force writes over it).")
    index = first_file(source, INDEX_FILES)
    if index is None:
        raise CheckpointError(
            f"{source}: there is no {' or '.join(INDEX_FILES)}; download Qwen/Qwen-VL-Chat to "
            "pretrained/Qwen-VL-Chat, or name its folder with --source."
        )

    # 2. The names of the vision encoder's tensors in each shard that holds some.
    names_of: dict[str, list[str]] = {}
    for name, file in read_json_object(index)["weight_map"].items():
        if IN_QWEN_VL in name:
            names_of.setdefault(file, []).append(name)

    # 3. The tensors; shards are memory-mapped, so that the language model's are not read.
    tensors: dict[str, Tensor] = {}
    for file in sorted(names_of):
        shard = load_state_dict(source / file, mapped=True)
        for name in names_of[file]:
            tensors[name.removeprefix(IN_QWEN_VL)] = shard[name]
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        save_torch(tensors, target)
    log_line(f"{target}: {len(tensors)} tensors")
    return DONE
