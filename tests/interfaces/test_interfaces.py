"""Public interfaces are frozen: a changed Python name, flag, setting or field breaks programs of
users. `interfaces.json` has them all.

    python tests/interfaces/test_interfaces.py --record    after a change that is meant
"""

import argparse
import contextlib
import inspect
import io
import json
import os
import pkgutil
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("interfaces.json")
PROGRAMS = (
    "demo_recon.py",
    "gradio_demo/*.py",
    "scripts/*.py",
    "src/inference/eval_*.py",
    "src/lavit/*.py",
    "src/tools/*.py",
    "MultiModalLLM/eval/*.py",
    "MultiModalLLM/src/tools/*.py",
    "SEED_Tokenizer/train.py",
    "SEED_Tokenizer/evaluate.py",
    "SEED_Tokenizer/eval/*.py",
)
Interfaces = dict[str, dict[str, list[str]]]


def collect() -> Interfaces:
    """Section → name of an interface → what it has."""
    sys.path[:0] = [str(ROOT / "src")]
    return {
        "python": python_names(),
        "seed": seed_commands(),
        "programs": programs(),
        "trainings": trainings(),
        "http": http(),
    }


@pytest.mark.slow
def test_interfaces_are_as_recorded():
    recorded, now = json.loads(RECORD.read_text(encoding="utf-8")), collect()
    changes = []
    for section in {**recorded, **now}:
        before, after = recorded.get(section, {}), now.get(section, {})
        for name in sorted({*before, *after}):
            # A new or removed interface is a change of its own name, too.
            gone = {*before.get(name, [])} - {*after.get(name, [])}
            new = {*after.get(name, [])} - {*before.get(name, [])}
            gone |= {"itself"} if name not in after else set()
            new |= {"itself"} if name not in before else set()
            changes += [f"{section}: {name}: - {entry}" for entry in sorted(gone)]
            changes += [f"{section}: {name}: + {entry}" for entry in sorted(new)]
    assert not changes, (
        "\n".join(changes) + "\nIf that is meant: tell users in CHANGELOG.md, then "
        "`python tests/interfaces/test_interfaces.py --record`."
    )


# ---- Python


def python_names() -> dict[str, list[str]]:
    """The package's names, and those that README and docs import → methods with parameters."""
    import seed_multimodal

    names = {f"seed_multimodal:{name}" for name in seed_multimodal.__all__}
    pattern = re.compile(r"^ *from (seed_multimodal[\w.]*) import ([\w, ]+)", re.MULTILINE)
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for module, imported in pattern.findall(page.read_text(encoding="utf-8")):
            names |= {f"{module}:{name.strip()}" for name in imported.split(",")}
    return {name: members(pkgutil.resolve_name(name)) for name in sorted(names)}


def members(thing) -> list[str]:
    """The parameters of a function; of a class also those of its public methods."""
    if inspect.isfunction(thing):
        return parameters(thing)
    if not inspect.isclass(thing):
        return []
    found = parameters(thing)
    for name, member in inspect.getmembers(thing):
        owner = next((base for base in thing.__mro__ if name in vars(base)), None)
        # Methods of torch's and transformers' base classes are theirs.
        if name.startswith("_") or not str(getattr(owner, "__module__", "")).startswith("seed_"):
            continue
        if callable(member):
            found.append(f"{name}({', '.join(parameters(member))})")
        else:
            found.append(name)
    return found


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


# ---- commands


def flags(parser: argparse.ArgumentParser) -> list[str]:
    """All spellings of a parser's flags, and its positional arguments."""
    names = []
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            names += action.option_strings or [action.dest]
    return sorted(names)


def seed_commands() -> dict[str, list[str]]:
    from seed_multimodal.cli.main import build_parser

    def walk(name, parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
        yield name, flags(parser)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command, inner in action.choices.items():
                    yield from walk(f"{name} {command}", inner)

    return dict(walk("seed", build_parser()))


class Parsed(BaseException):
    """Raised where a program would read its arguments."""


def programs() -> dict[str, list[str]]:
    """Flags of the originals' programs; each is started, and stopped where it parses them."""
    parsers = []

    def stop(self: argparse.ArgumentParser, *arguments, **options):
        parsers.append(self)
        raise Parsed

    found = {}
    originals = [
        getattr(argparse.ArgumentParser, name) for name in ("parse_args", "parse_known_args")
    ]
    argparse.ArgumentParser.parse_args = stop
    argparse.ArgumentParser.parse_known_args = stop
    try:
        for file in sorted(file for pattern in PROGRAMS for file in ROOT.glob(pattern)):
            if "__main__" not in file.read_text(encoding="utf-8"):
                continue
            with contextlib.suppress(Parsed):
                run(file)
            found[str(file.relative_to(ROOT))] = flags(parsers.pop())
    finally:
        argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args = originals
    return found


def trainings() -> dict[str, list[str]]:
    """Keys of the Hydra trainings as their help lists them, and the originals' flags for them."""
    from seed_multimodal.compat import training_flags

    original = (*training_flags.FLAGS, *training_flags.UNSUPPORTED_FLAGS)
    found = {"flags of the originals": sorted({*original, *training_flags.IGNORED_FLAGS})}
    for file in sorted((ROOT / "MultiModalLLM/src/train").glob("*.py")):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            run(file, "--help")
        keys = output.getvalue().partition("Keys and defaults")[2]
        found[file.name] = sorted(re.findall(r"(?m)^  ([\w.\[\]]+)=", keys))
    return found


def run(file, *arguments: str):
    """Run a program in this process, with the import path and arguments that it had before."""
    argv, path = sys.argv, sys.path[:]
    sys.argv = [str(file), *arguments]
    sys.path.insert(0, str(file.parent))
    try:
        runpy.run_path(str(file), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


# ---- HTTP


def http() -> dict[str, list[str]]:
    """Routes of the OpenAPI document → fields of their bodies; bodies' parts → their fields."""
    from seed_multimodal.serving.schema import openapi

    document = openapi()
    found = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            text = json.dumps(operation.get("requestBody", {}))
            found[f"{method.upper()} {path}"] = re.findall(r"schemas/(\w+)", text)
    for name, schema in document["components"]["schemas"].items():
        required = schema.get("required", [])
        fields = schema.get("properties", {})
        found[name] = [f"{field} (required)" if field in required else field for field in fields]
    return found


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(__doc__)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    RECORD.write_text(json.dumps(collect(), indent=1) + "\n", encoding="utf-8")
