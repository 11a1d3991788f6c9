"""`seed convert | export-tokenizer | export-gguf | check-llm | assemble | plot | study`."""

from __future__ import annotations

import pkgutil
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from seed_multimodal.cli.common import add_command, add_flags, cat_image, emit, values_of
from seed_multimodal.config import project_path
from seed_multimodal.disk import output_folder, read_json_object, text_stem, writing
from seed_multimodal.entry import DONE, SOME_FAILED
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.registry import families, find_family, tokenizer_exports

if TYPE_CHECKING:
    from seed_multimodal.cli.common import Commands


def add_commands(commands: Commands) -> None:
    """The commands with their flags."""
    # Weights and logs.
    add_command(commands, convert, help="old .pt/.pth/.bin weights → safetensors")
    add_command(commands, plot, help="curves of training runs, over each other")
    add_command(commands, study)

    # Parts of a system in other forms.
    exporter = add_command(
        commands, export, "export-tokenizer", "trained stages → a tokenizer folder"
    )
    stages = exporter.add_mutually_exclusive_group(required=True)
    for flag, exported in tokenizer_exports().items():
        stages.add_argument(f"--{flag}", metavar="CKPT", help=exported.help)
    add_command(
        commands,
        export_llm,
        "export-gguf",
        "SEED-LLaMA's language model → a file for --engine llama.cpp",
    )
    add_command(
        commands,
        check_language_model,
        "check-llm",
        "whether vLLM or SGLang can read SEED-LLaMA's language model",
    )

    # A folder of the parts of each system.
    kinds = commands.add_parser(
        "assemble", help="parts of trainings → a system folder"
    ).add_subparsers(required=True)
    for spec in families():
        parts = {key: part for key, part in spec.config.parts().items() if part.flag}
        name = spec.name.replace("_", "-")
        command = add_command(kinds, assemble, name, f"of {', '.join(parts)}")
        add_flags(command, "assemble")
        for key, part in parts.items():
            command.add_argument(f"--{key}", metavar="DIR", required=part.required, help=part.flag)
        command.set_defaults(kind=spec.name)


def convert(args: Namespace) -> int:
    """Read `args.source` (.pt, .pth, .bin), write `args.target`."""
    from seed_multimodal.state_dicts import load_state_dict, save_state_dict

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
    from seed_multimodal.plots import draw_runs

    logs = draw_runs(args.runs, args.out)
    emit(args, {"figure": args.out, "logs": [str(log) for log in logs]}, args.out)
    return DONE


def study(args: Namespace) -> int:
    """Train rows of settings with several seeds, measure them, write a table with intervals."""
    from seed_multimodal.evaluation.study import read_study, run_study

    file = Path(args.file)
    if not file.suffix:
        file = project_path(f"configs/studies/{args.file}.yaml")
    settings = read_study(file, args.seeds, args.quick)
    out = Path(args.out or f"outputs/studies/{text_stem(settings.name)}{'-quick' * args.quick}")
    failures = run_study(settings, out, args.jobs, args.budget)
    emit(args, {"folder": str(out), "failures": failures}, str(out))
    return SOME_FAILED if failures else DONE


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


def check_language_model(args: Namespace) -> int:
    """Print whether a completion server reads the tokenizer, and the command that starts it."""
    from seed_multimodal.inference.serving_check import server_problem, write_server_tokenizer
    from seed_multimodal.pipelines.config import CodeSystemConfig

    config = CodeSystemConfig.find(args.model).require("llm", "tokenizer")
    tokenizer = config.path("tokenizer")
    served = tokenizer
    if args.tokenizer_out:
        served = output_folder(args.tokenizer_out, force=False, label="the tokenizer")
        write_server_tokenizer(tokenizer, served)
    problem = server_problem(tokenizer, served)
    command = f"vllm serve {config.llm} --tokenizer {served} --generation-config vllm"
    text = f"PROBLEM: {problem}" if problem else f"Next: {command}"
    emit(args, {"readable": not problem, "problem": problem}, text)
    return SOME_FAILED if problem else DONE


def assemble(args: Namespace) -> int:
    """Make the folder and print its path."""
    from seed_multimodal.pipelines.assemble import assemble_system

    parts = values_of(args, *find_family(args.kind).config.parts())
    settings = read_json_object(Path(args.settings), ConfigError) if args.settings else {}
    folder = assemble_system(args.kind, args.out, parts, settings, force=args.force)
    emit(args, {"folder": str(folder)}, f"{folder}: open it with --model {folder}")
    return DONE
