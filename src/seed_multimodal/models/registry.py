"""Registry of model families: the library asks a family's `FamilySpec` instead of its name.

    find_family("seed_x").images  # the function that loads its images' codec, "module:function"
    [spec.name for spec in families()]   # seed_llama, seed_x, lavit, then other packages'

A family is one folder with a `SPEC` in its `spec.py`. Those of this library are in `BUILT_IN`;
other packages register theirs by an entry point of the group `seed_multimodal.families`:

    [project.entry-points."seed_multimodal.families"]
    mine = "my_package.spec:SPEC"
"""

from __future__ import annotations

import pkgutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from seed_multimodal.config import load_yaml, read_table
from seed_multimodal.errors import ConfigError, SeedWarning
from seed_multimodal.language.prompts import DEFAULT_TASKS, TaskPrompts
from seed_multimodal.plugins import import_entry, registered
from seed_multimodal.settings import find_entry, read_settings

BUILT_IN = (
    "seed_multimodal.models.seed.spec:SPEC",
    "seed_multimodal.models.seed_x.spec:SPEC",
    "seed_multimodal.models.lavit.spec:SPEC",
)


class Training(NamedTuple):
    """A Hydra training.

    config: below `configs`, without `.yaml`.
    task: its `RunTask`, as "module:Class".
    """

    config: str
    task: str


class TokenizerExport(NamedTuple):
    """A checkpoint of a tokenizer's training → the folder of a tokenizer.

    function: (checkpoint, flags of `seed export-tokenizer`) → record and text of what was written,
        as "module:function".
    help: of the flag that takes the checkpoint.
    """

    function: str
    help: str


class Example(NamedTuple):
    """A message of the chat page's gallery.

    images: names of demo images, in the folder `images` of the repository.
    then: messages that can follow it; each is offered below the answer before.
    """

    text: str
    images: tuple[str, ...] = ()
    then: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelCard:
    """How the chat page shows a model.

    Attributes:
        tabs: further tabs, of "draw", "edit", "codes" and "find".
        about: below the title, after the system's notice.
        temperature, max_rounds: initial values of the sliders; 0 rounds: any number.
        examples: the gallery, whose messages are answered at a click.
        keeps_aspect: images are sent with their aspect ratio; otherwise as squares.
        single_turn_template: each message is sent alone, between these two texts.
        tasks: its prompts, for finding things in images.
        ratios: aspect ratios of its drawings. Such a model uses its own settings, not the sliders'.
    """

    title: str
    about: str = ""
    tabs: tuple[str, ...] = ("draw", "edit", "codes")
    temperature: float = 1.0
    examples: tuple[Example, ...] = ()
    keeps_aspect: bool = False
    single_turn_template: tuple[str, str] | None = None
    max_rounds: int = 0
    tasks: TaskPrompts = DEFAULT_TASKS
    ratios: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What the systems of a family do.

    Attributes:
        reads_codes, draws_codes: prompts, and answers, hold codes of an image alone, neither
            features nor pixels.
        codes_are_rows: the codes of an image are a row, and positions count tokens; else a grid in
            a size of the request's, in positions with axes.
        first_codes: whether the first codes of an image are an image, which previews show.
        writes: texts.
        converses: in several turns; else each message is answered alone, by a text if it has an
            image, by an image if the request asks for one.
        edits: images.
        detects: finds things in images.
        takes_conditions: a drawing may take over parts of an image.
    """

    reads_codes: bool = True
    draws_codes: bool = True
    codes_are_rows: bool = True
    first_codes: bool = False
    writes: bool = True
    converses: bool = True
    edits: bool = True
    detects: bool = False
    takes_conditions: bool = False


# Tasks that need an ability.
NEEDS = {
    "describe": "writes",
    "ask": "writes",
    "chat": "writes",
    "detect": "detects",
    "edit": "edits",
}
# What the refusal says of a system without an ability.
LACKS = {
    "reads_codes": "has prompts with features or pixels of images, not of ids alone",
    "draws_codes": "has no codes: its images are features (`images.encode` gives them)",
    "codes_are_rows": "has grids of codes, not rows, for the engine torch alone",
    "first_codes": "draws no image of the first codes of one",
    "writes": "writes no text, it draws and edits",
    "edits": "does not edit images",
    "detects": "does not support detection",
    "takes_conditions": "draws without a condition image",
}


@dataclass(frozen=True)
class PageCards:
    """The chat page of a family's models, and of single models that differ, by the name of their
    folder: what its `cards.yaml` holds."""

    family: ModelCard
    models: Mapping[str, ModelCard] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> PageCards:
        """Raises ConfigError: not readable, an unknown key or a missing one."""
        return read_settings(cls, load_yaml(file), str(file))


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """A model family; its module must be importable without torch.

    Objects that need torch are named "module:object" and imported on first use.

    Attributes:
        title: in messages.
        config: the `SystemConfig` class of its `system.json`: abilities, parts, settings, original
            models, how its folders are recognised.
        family: its `pipelines.family.Family`, which loads the parts of a system.
        images: its function (config, placement) → `ImageCodec`.
        decoders: of training records, by name.
        evaluation: default options of the tasks of `seed eval`, by kind.
        evaluators: evaluations that differ from the library's, by kind: subclasses of those in
            `evaluation.benchmark.BENCHMARKS`, and for "tokenizer" of `evaluation.tokenizer`.
        trainings: by the name of their program.
        exports: what `seed export-tokenizer` reads, by its flag.
        starts: YAML file of what `seed init` makes (see there).
        cards: the chat page of its models; None: a card with its title.
    """

    title: str
    config: Any
    family: str
    images: str
    decoders: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluators: Mapping[str, str] = field(default_factory=dict)
    trainings: Mapping[str, Training] = field(default_factory=dict)
    exports: Mapping[str, TokenizerExport] = field(default_factory=dict)
    starts: Path | None = None
    cards: PageCards | None = None

    @classmethod
    def read(cls, config: Any, folder: Path) -> FamilySpec:
        """The family of a folder with `family.yaml` (the other fields), `starts.yaml` and
        `cards.yaml`."""
        file = folder / "family.yaml"
        values = read_table(file)
        values["config"] = config
        values["starts"] = folder / "starts.yaml"
        values["cards"] = PageCards.read(folder / "cards.yaml")
        return read_settings(cls, values, str(file))

    @property
    def name(self) -> str:
        """`system` in system.json."""
        return self.config.system

    @property
    def system_name(self) -> str:
        """What names of classes begin with, as `SeedLlama`."""
        return self.family.rpartition(":")[2].removesuffix("Family")

    def page_cards(self) -> PageCards:
        return self.cards or PageCards(ModelCard(self.title))


@cache
def families() -> tuple[FamilySpec, ...]:
    """All families, those of this library first.

    A family of another package that cannot be imported is left out, with a warning; one whose
    module is being imported, without.

    Raises ConfigError: two families have a name in common (their own, a training's, a decoder's, an
            export's, a card's).
    """
    specs: list[FamilySpec] = [pkgutil.resolve_name(name) for name in BUILT_IN]
    for entry in registered("families").values():
        module = sys.modules.get(entry.module)
        if module is not None and getattr(module.__spec__, "_initializing", False):
            continue
        try:
            specs.append(import_entry(entry))
        except ConfigError as error:
            warnings.warn(str(error), SeedWarning, stacklevel=2)
    _check_names(specs)
    return tuple(specs)


def _check_names(specs: Sequence[FamilySpec]) -> None:
    """Raise ConfigError for a name that two families give to the same kind of thing."""
    owners: dict[tuple[str, str], str] = {}
    for spec in specs:
        names = {
            "family": [spec.name],
            "training": spec.trainings,
            "decoder": spec.decoders,
            "export": spec.exports,
            "card": spec.page_cards().models,
        }
        for kind, kind_names in names.items():
            for name in kind_names:
                owner = owners.setdefault((kind, name), spec.title)
                if owner != spec.title:
                    raise ConfigError(f"{owner} and {spec.title} both have the {kind} {name!r}.")


def find_family(name: str) -> FamilySpec:
    """The family of a system's kind. Raises ConfigError: unknown (with the nearest)."""
    return find_entry({spec.name: spec for spec in families()}, name, "model family")


def check_ability(abilities: Abilities, ability: str, name: object) -> None:
    """Raise ConfigError, which names others that have it, if the system `name` lacks an ability
    (one of `LACKS`)."""
    if getattr(abilities, ability):
        return
    able = [spec for spec in families() if getattr(spec.config.abilities, ability)]
    names = [other for spec in able for other in (spec.config.shipped, spec.title) if other]
    others = f" (others: {', '.join(names)})" if names else ""
    raise ConfigError(f"{name} {LACKS[ability]}{others}.")


def find_training(program: str) -> Training:
    """The training of a program of any family. Raises ConfigError: unknown (with the nearest)."""
    trainings = {name: task for spec in families() for name, task in spec.trainings.items()}
    return find_entry(trainings, program, "training")


def tokenizer_exports() -> dict[str, TokenizerExport]:
    """What `seed export-tokenizer` reads of all families, by flag."""
    return {name: export for spec in families() for name, export in spec.exports.items()}


def model_cards() -> dict[str, ModelCard]:
    """The chat page's models of all families, by name."""
    return {name: card for spec in families() for name, card in spec.page_cards().models.items()}
