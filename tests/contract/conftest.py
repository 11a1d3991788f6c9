"""A family that another package registers (`support/mosaic_package`), installed for a module."""

import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

PACKAGE = ROOT / "tests" / "support" / "mosaic_package"


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """A folder with the installed package."""
    from installed_package import install

    site = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE / "mosaic", site / "mosaic")
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    install(site, project["name"], project["entry-points"])
    return site


@pytest.fixture(scope="module")
def installed(site) -> Iterator[Path]:
    from seed_multimodal.models.registry import families

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{site}")  # of programs
        families.cache_clear()
        yield site
    families.cache_clear()


@pytest.fixture(scope="module")
def mosaic_folder(installed, tiny_folder, tmp_path_factory) -> Path:
    """A system that `seed assemble` made of a tiny language model and its tokenizer."""
    from seed_multimodal.cli.main import main

    out = tmp_path_factory.mktemp("mosaic") / "my_mosaic"
    settings = out.with_suffix(".json")
    settings.write_text(
        json.dumps({"tile": 6, "generation": {"max_new_tokens": 40, "do_sample": False}})
    )
    flags = ["--llm", str(tiny_folder / "seed_llama")]
    flags += ["--tokenizer", str(tiny_folder / "seed_tokenizer")]
    flags += ["--settings", str(settings), "--out", str(out)]
    assert main(["assemble", "mosaic", *flags]) == 0
    return out


@pytest.fixture(scope="module")
def mosaic(mosaic_folder):
    from systems import load

    return load(mosaic_folder)
