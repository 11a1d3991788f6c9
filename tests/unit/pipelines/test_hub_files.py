"""The module that saved folders hold for `trust_remote_code=True`."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from seed_multimodal.pipelines.hub_files import REMOTE_CODE


@pytest.fixture
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("copied", REMOTE_CODE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_module_has_the_classes_of_the_package(module):
    from seed_multimodal.transformers import SeedXProcessor

    assert module.SeedXProcessor is SeedXProcessor


def test_module_without_the_package_says_how_to_install_it(module):
    # On a machine that has the folder only, as from a model hub.
    module.PACKAGE = "no_such_package"
    with pytest.raises(ImportError, match=r"SeedXProcessor.*install\.sh"):
        _ = module.SeedXProcessor
