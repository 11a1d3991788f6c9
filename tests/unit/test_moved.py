"""Earlier names of modules."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest

from seed_multimodal.config import find_target
from seed_multimodal.models.registry import families
from seed_multimodal.moved import MOVED, PACKAGE, current_name


@pytest.mark.parametrize("name", MOVED)
def test_import_of_an_earlier_name(name: str) -> None:
    current = pkgutil.resolve_name(PACKAGE + MOVED[name])
    assert pkgutil.resolve_name(current_name(PACKAGE + name)) is current
    if isinstance(current, ModuleType):
        assert importlib.import_module(PACKAGE + name) is current


# Names that earlier READMEs, pages and YAML files had.
@pytest.mark.parametrize(
    "name",
    [
        "language.tasks:TaskPrompts",
        "seed.original:Seed1.from_pretrained",
        "seed_x.pipeline:SeedX",
        "serving.flask_app:create_app",
        "system.base:MultimodalSystem",
        "system.config:SystemConfig",
        "systems.lavit:Lavit",
        "systems.seed1:Seed1.from_pretrained",
        "systems.seed_x:SeedX",
    ],
)
def test_documented_earlier_name(name: str) -> None:
    assert callable(pkgutil.resolve_name(PACKAGE + name))
    assert callable(find_target(PACKAGE + name.replace(":", ".")))


def test_import_below_an_earlier_package() -> None:
    from seed_multimodal.models.seed.pipeline import SeedLlama
    from seed_multimodal.seed.pipeline import SeedLlama as Earlier  # type: ignore[import-not-found]

    assert Earlier is SeedLlama


def test_find_target_of_an_earlier_name() -> None:
    target = find_target("seed_multimodal.system.images.open_images")
    assert target is find_target("seed_multimodal.pipelines.images.open_images")


def test_current_name_of_other_packages() -> None:
    assert current_name("torch.nn") == "torch.nn"


@pytest.mark.parametrize("spec", families(), ids=lambda spec: spec.name)
def test_names_in_a_spec_exist(spec) -> None:

    tasks = [training.task for training in spec.trainings.values()]
    for name in (
        spec.system,
        spec.images,
        *spec.decoders.values(),
        *spec.evaluators.values(),
        *(exported.function for exported in spec.exports.values()),
        *tasks,
    ):
        assert callable(pkgutil.resolve_name(name))
    for name, path in spec.decoders.items():
        assert pkgutil.resolve_name(path).name == name
