"""MkDocs hook: the pages of `reference/`, made from the code when the site is built.

`mkdocs serve` and `mkdocs build` (mkdocs.yml) run it; `python docs/generate.py DIR` writes the
pages as Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
os.environ["COLUMNS"] = "110"  # of argparse's help

# Page of options → its first paragraph, and `key: module:Dataclass` of each table.
OPTIONS = {
    "training": (
        "Keys of the trainings in `MultiModalLLM/`: `KEY=VALUE` on the command line, or a YAML "
        "file for each section. `python src/train/train.py --help` prints the same for each "
        "program.",
        {
            "trainer (all programs)": "training.config:TrainerSettings",
            "trainer (language models)": "training.llm.config:LlmTrainerSettings",
            "trainer (pixel decoders)": "training.pixel_decoder.config:PixelTrainer",
            "optim": "training.config:OptimSettings",
            "model (language models)": "training.llm.config:LlmModelSettings",
            "data (language models)": "data.stream.config:LlmDataSettings",
            "data.sources": "data.stream.config:SourceSettings",
            "model (SEED's decoders)": "recipes.seed.train_detokenizer:SeedDecoderModel",
            "model (small autoencoders)": ("training.pixel_decoder.autoencoder:AutoencoderModel"),
            "data (pixel decoders)": "training.pixel_decoder.config:ImageData",
            "data.sources (pixel decoders)": "training.pixel_decoder.config:ImageSource",
            "agent (SEED-X)": "models.seed_x.modeling:AgentSettings",
        },
    ),
    "tokenizer-training": (
        "Keys of the sections `model` and `run` of the YAML files in "
        "`SEED_Tokenizer/lavis/projects`; `--options KEY=VALUE` changes them.",
        {
            "model (all)": "seed_lavis.options:ModelOptions",
            "model: blip2_casual (stage 1)": "seed_lavis.options:Stage1Options",
            "model: blip2_codebook_all_image (stage 2)": "seed_lavis.options:Stage2Options",
            "model: seed1_codebook_text (SEED-1, stage 2)": "seed_lavis.options:Seed1Options",
            "model: lavit_tokenizer (LaVIT, stage 1)": "seed_lavis.options:LavitOptions",
            "run": "seed_lavis.options:RunOptions",
        },
    ),
    "generation": (
        "Keyword arguments of `describe`, `ask`, `chat`, `draw`, `edit` and `reconstruct`, and "
        "keys of `generation` in `system.json`. The defaults of a system win over those below.",
        {
            "Text and tokens": "inference.prompt:GenerationSettings",
            "Drawing: SEED-2 (unCLIP)": "models.seed.diffusion:UnclipSettings",
            "Drawing: SEED-1 (Stable Diffusion)": "models.seed.diffusion:StableDiffusionSettings",
            "Drawing: SEED-X (SDXL)": "models.seed_x.diffusion:SdxlSettings",
            "Drawing: LaVIT": "models.lavit.diffusion:LavitSettings",
        },
    ),
}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages (MkDocs calls it)."""
    from mkdocs.structure.files import File

    for name, text in pages():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def pages() -> Iterator[tuple[str, str]]:
    """Name and Markdown of each page."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "SEED_Tokenizer")]
    yield "cli", _commands()
    for name, (opening, tables) in OPTIONS.items():
        kinds = {key: _kind(place) for key, place in tables.items()}
        first = next(iter(kinds.values()))
        yield (
            name,
            "\n\n".join(
                [
                    f"# Options: {name.replace('-', ' ')}",
                    opening,
                    *(
                        _table(
                            key,
                            kind,
                            first if issubclass(kind, first) and kind is not first else None,
                        )
                        for key, kind in kinds.items()
                    ),
                ]
            ),
        )
    yield "system-json", _system_json()
    yield "http", _http()


def _commands() -> str:
    from seed_multimodal.cli.main import build_parser

    return "\n\n".join(
        ["# The command `seed`", "What `seed COMMAND --help` prints.", *_helps(build_parser())]
    )


def _helps(parser: argparse.ArgumentParser) -> Iterator[str]:
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield f"## {parser.prog}\n\n```text\n{parser.format_help().strip()}\n```"
    for one in inner[0].choices.values() if inner else ():
        yield from _helps(one)


def _kind(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(
        import_module(module if "seed_lavis" in module else f"seed_multimodal.{module}"), name
    )


def _table(key: str, kind: Any, base: Any = None) -> str:
    """A table of a dataclass's fields: name, type or choices, default, and what its docstring or
    comments say; with `base` only the fields that this class does not have, or with another
    default.
    """
    hints, notes, rows = get_type_hints(kind), _notes(kind), []
    opening = inspect.cleandoc(kind.__doc__ or "").split("\nAttributes:")[0].strip()
    opening += "\n\nBesides the keys of the first table:" if base else ""
    shown_before = {entry.name: entry.default for entry in dataclasses.fields(base)} if base else {}
    for entry in dataclasses.fields(kind):
        if entry.name in shown_before and shown_before[entry.name] == entry.default:
            continue
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        shown = "required" if default is dataclasses.MISSING else f"`{_short(default)}`"
        choices = ", ".join(map(str, entry.metadata.get("choices", ())))
        hint = hints[entry.name]
        type_name = choices or (
            hint.__name__ if type(hint) is type else re.sub(r"\w+\.", "", str(hint))
        )
        rows.append(
            f"| `{entry.name}` | {_cell(type_name)} | {_cell(shown)} | "
            f"{_cell(notes.get(entry.name, ''))} |"
        )
    return "\n".join(
        [
            f"## {key}",
            "",
            opening,
            "",
            "| key | type or choices | default | meaning |",
            "| --- | --- | --- | --- |",
            *rows,
        ]
    )


def _system_json() -> str:
    """Keys of `system.json`: of all systems, then parts and settings of each family."""
    from seed_multimodal.language.prompts import TaskPrompts
    from seed_multimodal.models.registry import families
    from seed_multimodal.pipelines.config import SystemConfig

    head = ["| key | default | meaning |", "| --- | --- | --- |"]
    opening = (
        "A system's folder has a `system.json` with these keys; all have defaults. Paths are "
        "relative to the folder, else to the repository; keys that begin with `_` are remarks. "
        "`seed assemble` writes one."
    )
    common = SystemConfig.settings()
    rows = _setting_rows(SystemConfig, common)
    parts = ["# system.json", opening, "\n".join(["## All systems", "", *head, *rows])]
    for spec in families():
        defaults = {entry.name: _default(entry) for entry in dataclasses.fields(SystemConfig)}
        rows = [
            f"| `{key}` | {f'`{part.folder}`' if part.folder else '–'} | folder: {part.label} |"
            for key, part in spec.config.parts().items()
        ]
        fields = {entry.name: _default(entry) for entry in dataclasses.fields(spec.config)}
        keys = [
            key
            for key in spec.config.settings()
            if key not in common or fields[key] != defaults[key]
        ]
        rows += _setting_rows(spec.config, keys)
        parts.append("\n".join([f'## "system": "{spec.name}"', "", *head, *rows]))
    return "\n\n".join([*parts, _table("tasks", TaskPrompts)])


def _setting_rows(kind: Any, keys: Sequence[str]) -> list[str]:
    """Rows of keys of `system.json`: key, default, meaning."""
    notes = {}
    for parent in reversed(kind.__mro__[:-1]):
        notes |= _notes(parent)
    defaults = {entry.name: _default(entry) for entry in dataclasses.fields(kind)}
    return [
        f"| `{key}` | `{_cell(_short(defaults[key]))}` | {_cell(notes.get(key, ''))} |"
        for key in keys
    ]


def _default(entry: dataclasses.Field) -> Any:
    return entry.default_factory() if callable(entry.default_factory) else entry.default


def _short(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) < 60 else f"{text[:57]}…"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _notes(kind: type) -> dict[str, str]:
    """Field → its entry below `Attributes:`, or the comment behind or above it, also of base
    classes.
    """
    notes: dict[str, str] = {}
    for base in reversed([one for one in kind.__mro__ if dataclasses.is_dataclass(one)]):
        listed = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:")[2]
        for names, text in re.findall(r"(?m)^ {4}([\w, ]+): ((?:.|\n(?! {4}\w))*)", listed):
            notes |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
        above: list[str] = []
        for line in inspect.getsource(base).splitlines():
            field, comment = re.match(r"    (\w+): ", line), re.search(r"(?:^ +|  )# (.*)", line)
            if field and (comment or above):
                notes[field[1]] = comment[1] if comment else " ".join(above)
            above = [*above, comment[1]] if comment and not field and comment[1] != "ours" else []
    return notes


def _http() -> str:
    """Routes and schemas of the server's OpenAPI document."""
    from seed_multimodal.serving.schema import openapi

    document = openapi()
    rows = [
        f"| `{method.upper()} {path}` | {_body(operation.get('requestBody'))} | "
        f"{_body(operation['responses']['200'])} |"
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    parts = [
        "# HTTP",
        "From the server's OpenAPI document (`GET /openapi.json`). How to use it: "
        "[Serve](../how-to/serve.md). Fields that are not listed are refused by name, "
        "ignored ones with values also with any other value.",
        "\n".join(["| route | request | answer |", "| --- | --- | --- |", *rows]),
    ]
    for name, schema in document["components"]["schemas"].items():
        needed = schema.get("required", ())
        fields = [
            f"| `{field}` | {_cell(_json_type(kind))} | " + _verdict(kind, field in needed)
            for field, kind in schema.get("properties", {}).items()
        ]
        parts.append(
            "\n".join(
                [
                    f"## {name}",
                    "",
                    " ".join(schema.get("description", "").split()),
                    "",
                    "| field | type | default |",
                    "| --- | --- | --- |",
                    *fields,
                ]
            )
        )
    return "\n\n".join(parts)


def _verdict(kind: Any, is_required: bool) -> str:
    """The last column of a field: ignored, required, or its default."""
    if kind.get("description") == "Ignored.":
        return "ignored |"
    return "required |" if is_required else f"`{_short(kind.get('default'))}` |"


def _body(part: Any) -> str:
    """What a request or an answer holds, linked to its table."""
    if not part or "content" not in part:
        return "–"
    names = re.findall(r"#/components/schemas/(\w+)", json.dumps(part["content"]))
    types = [kind for kind in part["content"] if kind != "application/json"]
    return (
        ", ".join([*(f"[{name}](#{name.lower()})" for name in dict.fromkeys(names)), *types])
        or "JSON"
    )


def _json_type(kind: Any) -> str:
    """The type of a JSON schema in words, with its limits."""
    if "$ref" in kind:
        name = kind["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in kind:
        return " or ".join(dict.fromkeys(_json_type(one) for one in kind["anyOf"]))
    if "enum" in kind or "const" in kind:
        return ", ".join(json.dumps(value) for value in kind.get("enum", [kind.get("const")]))
    if kind.get("type") == "array":
        return f"list of {_json_type(kind.get('items', {}))}"
    low, high = kind.get("minimum"), kind.get("maximum", kind.get("exclusiveMaximum"))
    limits = f" {low}–{high}" if low is not None and high is not None else ""
    return f"{kind.get('type', 'any')}{limits}"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages():
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
