"""`seed init --llm … --encoder …`: configurations and commands that make a SEED of other parts.

The recipe is `models/seed/recipe.yaml`; here its values are read from the parts. `--size tiny`
first writes small random parts of the same classes.
"""

from __future__ import annotations

import os
import shlex
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from omegaconf import OmegaConf

from seed_multimodal.cli.tiny_parts import write_tiny_encoder, write_tiny_llm
from seed_multimodal.config import read_yaml
from seed_multimodal.data.formats.contents import IMAGE_SUFFIXES
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.storage import list_files
from seed_multimodal.disk import JsonObject, atomic_folder, output_folder
from seed_multimodal.errors import ConfigError, SeedWarning
from seed_multimodal.language.hub_tokenizer import HubTokenizer
from seed_multimodal.language.llm import llm_config
from seed_multimodal.models import seed
from seed_multimodal.nn.vision.hub import HubVisionConfig
from seed_multimodal.pretokenize.inputs import InputSettings, find_inputs, read_input_settings
from seed_multimodal.weights.catalogue import WEIGHT_PATTERNS
from seed_multimodal.weights.find import find_folder, locate, locate_or_same

RECIPE = Path(seed.__file__).with_name("recipe.yaml")
SCRIPT = RECIPE.with_suffix(".sh")
PART_FILES = (*WEIGHT_PATTERNS, "*.jinja")  # of a hub id
PART_ADVICE = "give the folder or hub id of a model of transformers, or --size tiny"
CODEBOOK, TINY_CODEBOOK = 8192, 256
FEW_IMAGES = 5000  # of a folder, below which a warning is printed
MAX_LENGTH = 2048  # tokens of a packed row, as the published training


class Step(NamedTuple):
    """One command of the recipe.

    inputs: results of other steps that it reads.
    result: file or folder of the recipe's that it makes; empty: it only runs when it is named.
    command: in the words of run.sh.
    """

    name: str
    inputs: str
    result: str
    command: str


def write_recipe(args: Namespace) -> tuple[Path, list[Step]]:
    """Write the folder `args.out`; returns it and the steps of its `run.sh`."""
    repository = locate("MultiModalLLM/configs")
    if repository is None:
        raise ConfigError("The recipe runs the repository's trainings; run it from a checkout.")
    if args.size != "tiny" and not (args.llm and args.encoder):
        raise ConfigError(
            "Give --llm and --encoder (folders or hub ids of transformers models); or --size tiny "
            "for small random parts, or --like KIND."
        )
    out = output_folder(args.out, force=False, label="the recipe").resolve()
    with atomic_folder(out, args.out, ConfigError) as folder:
        # 1. The parts, and what their configurations say.
        values: JsonObject = {
            "out": str(out),
            "repository": str(repository.resolve().parents[1]),
            "codes": args.codes,
            "codebook": args.codebook or (TINY_CODEBOOK if args.size == "tiny" else CODEBOOK),
            "decoder": args.decoder,
            "adapter": args.adapter,
        }
        data, data_sections = data_values(args, out)
        values |= data
        if args.size == "tiny":
            llm = folder / "parts/llm"
            encoder = folder / "parts/encoder"
            write_tiny_llm(args.llm or "qwen3", tiny_texts(), llm)
            write_tiny_encoder(args.encoder or "siglip2", encoder)
        else:
            llm = find_part(args.llm)
            encoder = find_part(args.encoder)
            values |= {"llm": str(llm), "encoder": str(encoder)}
        tokenizer, sizes = read_parts(llm, encoder, args.codes, values["codebook"])
        tokenizer.save_pretrained(folder / "llm_tokenizer")
        values |= sizes

        # 2. The files.
        recipe = compose(values, args.size or "full", data_sections)
        for name, content in recipe["files"].items():
            text = yaml.safe_dump(content, sort_keys=False, width=100)
            (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        steps = [Step(*map(str, step)) for step in recipe["steps"]]
        script = recipe["head"] + SCRIPT.read_text(encoding="utf-8") + script_lines(steps)
        run_script = folder / "run.sh"
        run_script.write_text(script, encoding="utf-8")
        run_script.chmod(0o755)
        (folder / "README.md").write_text(recipe["readme"], encoding="utf-8")
    return out, steps


def find_part(name: str) -> Path:
    """A part's folder, or the snapshot of a hub id. Raises CheckpointError: neither exists."""
    return find_folder(locate_or_same(name), PART_FILES, PART_ADVICE).resolve()


def read_parts(
    llm: Path, encoder: Path, n_codes: int, codebook_size: int
) -> tuple[HubTokenizer, JsonObject]:
    """The language model's tokenizer with image tokens, and values of the recipe.

    Raises CheckpointError, ConfigError: no model of its kind.
    """
    # 1. The language model.
    config = llm_config(llm)
    tokenizer = HubTokenizer.create(llm, codebook_size, n_codes)
    length = min(MAX_LENGTH, int(config.max_position_embeddings))

    # 2. The vision encoder, without weights.
    with torch.device("meta"):
        vision_config = HubVisionConfig(path=str(encoder))
        vision = vision_config.build()
    # Stage 2 decodes towards the pooled feature.
    _ = vision_config.with_pooled_feature().pooled_width
    return tokenizer, {
        "llm_sizes": (
            f"{config.model_type}: {config.hidden_size} wide, {config.num_hidden_layers} layers, "
            f"{config.vocab_size:,} tokens and {len(tokenizer) - tokenizer.vocabulary.n_text:,} "
            "of images"
        ),
        "length": length,
        "encoder_sizes": (
            f"{vision_config.network['model_type']}: {vision.n_patches} patches of images of "
            f"{vision.image_size} pixels, {vision.width} wide"
        ),
        "image_size": vision.image_size,
    }


def tiny_texts() -> list[str]:
    """Captions of the small recipe's data, on which its tokenizer is trained."""
    settings = read_input_settings(read_yaml(RECIPE)["pair scenes"]["captions"])
    captions = open_records(None, format=settings.format, options=settings.format_options)
    return [str(captions.locate(row).fields["text"]) for row in range(len(captions))]


def data_values(args: Namespace, out: Path) -> tuple[JsonObject, list[str]]:
    """Values of the recipe about its data, and the sections that read them.

    Raises DataError: `--data` or `--chats` names nothing that can be read.
    """
    values: JsonObject = {"chat_images": None}
    sections: list[str] = []
    needed: list[str] = []  # to be put into the folder
    for section, files, default, scenes in (
        ("pairs", args.data, "data/pairs", "pair scenes"),
        ("chats", args.chats, "data/chats.jsonl", "chat scenes"),
    ):
        if files is None and args.size == "tiny":
            values[section] = "scenes of nano, drawn as they are read"
            sections.append(scenes)
            continue
        sections.append(section)
        if files is None:
            values[section] = f"{out}/{default}"
            needed.append(default)
        else:
            values[section] = data_files(files)
    if args.data and os.path.isdir(args.data):
        n_images = sum(path.lower().endswith(IMAGE_SUFFIXES) for path in list_files(args.data))
        if 0 < n_images < FEW_IMAGES:  # none: the folder has tars or tables
            warnings.warn(
                f"{args.data}: {n_images} images. The recipe begins at random weights, which learn "
                "nothing useful from so few; `seed init --like nano` tunes trained ones.",
                SeedWarning,
                stacklevel=2,
            )
    if "data/chats.jsonl" in needed:
        values["chat_images"] = f"{out}/data/images"
    values["needed_data"] = " ".join(needed)
    return values, sections


def data_files(files: str) -> str:
    """A user's files as named in YAML files, which are read in other folders.

    Raises DataError: nothing that can be read.
    """
    find_inputs(InputSettings(files=files))
    return os.path.abspath(files) if os.path.exists(files) else files


def compose(values: JsonObject, size: str, data_sections: Sequence[str]) -> JsonObject:
    """The recipe's `files`, `steps`, `head` of run.sh and `readme` with all values.

    size: full or tiny.
    """
    recipe = read_yaml(RECIPE)
    names = ("shared", size, values["adapter"], f"{size} {values['decoder']}", *data_sections)
    sections = [recipe[name] for name in names]

    # 1. Each file: its base, and the sections' changes.
    section_values = [section.pop("values", {}) for section in sections]
    root = Path(values["repository"])
    files: JsonObject = {}
    for name in sorted(set().union(*sections)):
        layers = [section[name] for section in sections if name in section]
        published = [read_yaml(root / layer.pop("base")) for layer in layers if "base" in layer]
        files[name] = OmegaConf.merge(*published, *layers)

    # 2. The values in all of them.
    texts = OmegaConf.masked_copy(recipe, ["steps", "head", "readme"])
    whole = OmegaConf.merge(*section_values, values, texts, {"files": files})
    plain: Any = OmegaConf.to_container(whole, resolve=True)
    return dict(plain)


def script_lines(steps: list[Step]) -> str:
    """The steps as lines of run.sh, after a check of its folder and arguments."""
    lines = ['follow_folder "$@"\n', f"check_arguments {' '.join(step.name for step in steps)}\n"]
    for step in steps:
        # Paths may have spaces.
        words = [f'"{word}"' if "$" in word else word for word in step.command.split()]
        lines.append(f'step {step.name} "{step.inputs}" "{step.result}" {" ".join(words)}\n')
    return "".join(lines)


def describe(out: Path, steps: list[Step]) -> str:
    """What comes next, and the names of the steps in their order."""
    names = ", ".join(step.name for step in steps if step.result)
    others = ", ".join(step.name for step in steps if not step.result)
    return (
        f"{out}: README.md says what to put where; the steps are {names}, and if they are named "
        f"{others}.\nNext: bash {shlex.quote(f'{out}/run.sh')}"
    )
