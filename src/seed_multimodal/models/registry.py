"""Registry of model families: the library asks a family's `FamilySpec` instead of its name.

    find_family("seed_x").load_images()  # the function that loads its images' codec
    [spec.name for spec in families()]   # seed_llama, seed_x, lavit, then other packages'

A family is one folder with a `SPEC` in its `spec.py`. Those of this library are in `BUILT_IN`;
other packages register theirs by an entry point of the group `seed_multimodal.families`:

    [project.entry-points."seed_multimodal.families"]
    mine = "my_package.spec:SPEC"
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import DEFAULT_TASKS, TaskPrompts
from seed_multimodal.settings import nearest

if TYPE_CHECKING:
    from seed_multimodal.pipelines.base import MultimodalSystem
    from seed_multimodal.pipelines.config import SystemConfig

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


@dataclass(frozen=True)
class ModelCard:
    """How the chat page shows a model.

    Attributes:
        tabs: further tabs, of "draw", "edit", "codes" and "find".
        temperature, max_rounds: initial values of the sliders.
        examples: texts with the name of a demo image each, "" for none.
        keeps_aspect: images are sent with their aspect ratio; otherwise as squares.
        single_turn_template: each message is sent alone, between these two texts.
        tasks: its prompts, for finding things in images.
        ratios: aspect ratios of its drawings. Such a model uses its own settings, not the sliders'.
    """

    title: str
    tabs: tuple[str, ...] = ("draw", "edit", "codes")
    temperature: float = 1.0
    examples: tuple[tuple[str, str], ...] = ()
    keeps_aspect: bool = False
    single_turn_template: tuple[str, str] | None = None
    max_rounds: int = 3
    tasks: TaskPrompts = DEFAULT_TASKS
    ratios: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """A model family. Objects that need torch are named "module:object" and imported on first use.

    Attributes:
        title: in messages.
        config: class of its `system.json`: parts, settings, original models, how its folders are
            recognised.
        system: its `MultimodalSystem`.
        images: its function (config, placement) → `ImageCodec`.
        decoders: of training records, by name.
        evaluation: default options of the tasks of `seed eval`, by kind.
        evaluators: their `Evaluation`s that differ from the library's, by kind.
        trainings: by the name of their program.
        starts: YAML file of what `seed init` makes (see there).
        cards: by the name of a model.
    """

    title: str
    config: type[SystemConfig]
    system: str
    images: str
    decoders: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluators: Mapping[str, str] = field(default_factory=dict)
    trainings: Mapping[str, Training] = field(default_factory=dict)
    starts: Path | None = None
    cards: Mapping[str, ModelCard] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`system` in system.json."""
        return self.config.system

    def system_class(self) -> type[MultimodalSystem]:
        system_class: type[MultimodalSystem] = pkgutil.resolve_name(self.system)
        return system_class

    def load_images(self) -> Any:
        """The function that loads its `ImageCodec`."""
        return pkgutil.resolve_name(self.images)


@cache
def families() -> tuple[FamilySpec, ...]:
    """All families, those of this library first.

    Raises ConfigError: an entry point of another package that cannot be imported.
    """
    specs: list[FamilySpec] = [pkgutil.resolve_name(name) for name in BUILT_IN]
    for entry in entry_points(group="seed_multimodal.families"):
        try:
            specs.append(entry.load())
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{entry.value}: the family {entry.name} cannot be imported ({error})."
            ) from error
    return tuple(specs)


def find_family(name: str) -> FamilySpec:
    """The family of a system's kind. Raises ConfigError: unknown (with the nearest)."""
    by_name = {spec.name: spec for spec in families()}
    if name not in by_name:
        raise ConfigError(
            f"{name!r} is no model family{nearest(name, by_name)}; there are {', '.join(by_name)}."
        )
    return by_name[name]


def find_training(program: str) -> Training:
    """The training of a program of any family. Raises ConfigError: unknown (with the nearest)."""
    trainings: dict[str, Training] = {}
    for spec in families():
        trainings |= spec.trainings
    if program not in trainings:
        raise ConfigError(
            f"{program!r} is no training{nearest(program, trainings)}; "
            f"there are {', '.join(trainings)}."
        )
    return trainings[program]


def model_cards() -> dict[str, ModelCard]:
    """The chat page's models of all families, by name."""
    cards: dict[str, ModelCard] = {}
    for spec in families():
        cards |= spec.cards
    return cards
