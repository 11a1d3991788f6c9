"""The module that saved folders hold for `trust_remote_code=True`."""

import importlib.util

import pytest

from seed_multimodal.pipelines.assemble import REMOTE_CODE


def test_module_without_the_package_says_how_to_install_it():
    # On a machine that has the folder only, as from a model hub.
    spec = importlib.util.spec_from_file_location("copied", REMOTE_CODE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PACKAGE = "no_such_package"
    with pytest.raises(ImportError, match=r"SeedXProcessor.*install\.sh"):
        _ = module.SeedXProcessor
