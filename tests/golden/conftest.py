"""`--golden-dir DIR` and one test per fixture folder (see runner.py)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules of kinds import `runner`

from runner import DEFAULT_DIR, fixture_folders  # noqa: E402


def pytest_addoption(parser: pytest.Parser):
    parser.addoption(
        "--golden-dir",
        default=None,
        metavar="DIR",
        help=f"folder of golden fixture folders (default: {DEFAULT_DIR})",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc):
    if "golden_folder" not in metafunc.fixturenames:
        return
    # The option is unknown if pytest was started above tests/golden, because it then reads this
    # conftest too late.
    chosen = metafunc.config.getoption("--golden-dir", default=None)
    directory = (
        DEFAULT_DIR
        if chosen is None
        else metafunc.config.invocation_params.dir / Path(chosen).expanduser()
    )
    folders = fixture_folders(directory)
    metafunc.parametrize("golden_folder", folders, ids=[folder.name for folder in folders])
