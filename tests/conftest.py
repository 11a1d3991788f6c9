"""Fixtures of several packages: tiny random systems (tests/support/tiny), each built once per
session.

Tests copy a system before they change it. A test that starts a process needs the marker `process`,
so that `scripts/test.sh --fast` skips it.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm_processes
from cpu_times import CpuTimes
from systems import load

import seed_multimodal  # noqa: F401  (before transformers: it sets HF_HUB_OFFLINE)

# Programs flush each line when piped without the first; pytest may itself run under torchrun.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
for name in ("PYTHONUNBUFFERED", *TORCHRUN):
    os.environ.pop(name, None)
PROCESSES = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
# Programs that reports call for the commit and the processor, in milliseconds.
FOR_REPORTS = ("git", "uname")
started = []


def pytest_configure(config: pytest.Config):
    """Record each process that is started, and the seconds of tests."""
    config.pluginmanager.register(CpuTimes())

    def note(event: str, arguments: tuple):
        if event not in PROCESSES or is_importing():
            return
        # The first argument is the program or its path, as text or bytes; a fork has none. On
        # Python 3.13 subprocess raises os.posix_spawn, too, for programs given by their path.
        program = os.fsdecode(arguments[0]) if arguments else ""
        if os.path.basename(program) not in FOR_REPORTS:
            started.append(f"{event} {program}")

    sys.addaudithook(note)


def is_importing() -> bool:
    """Whether a module is being imported: DeepSpeed starts programs to find libraries."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
    return False


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol():
    """Clear the processes that were started before, while tests were collected."""
    started.clear()


def pytest_runtest_setup(item: pytest.Item):
    if any(map(item.get_closest_marker, ("process", "browser"))):
        warm_processes.start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that starts a process, itself or in a fixture, without the marker for it."""
    yield
    if started and not any(map(item.get_closest_marker, ("process", "browser"))):
        seen = sorted(set(started))
        started.clear()
        pytest.fail(
            f"starts a process ({', '.join(seen)}): mark it with @pytest.mark.process, so that "
            "--fast skips it"
        )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    # Found through `pythonpath` in pyproject.toml; slow to import, so only where it is used.
    from tiny.seed import build_seed_llama

    return build_seed_llama(tmp_path_factory.mktemp("tiny_system"))


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return load(tiny_folder)


@pytest.fixture(scope="session")
def tiny_x_folder(tmp_path_factory) -> Path:
    """An instruction-tuned SEED-X with a de-tokenizer of the second stage."""
    from tiny.seed_x import build_seed_x

    return build_seed_x(tmp_path_factory.mktemp("tiny_seed_x"), stage=2)


@pytest.fixture(scope="session")
def tiny_x(tiny_x_folder):
    return load(tiny_x_folder)


@pytest.fixture(scope="session")
def tiny_lavit_folder(tmp_path_factory) -> Path:
    from tiny.lavit import build_lavit

    return build_lavit(tmp_path_factory.mktemp("tiny_lavit"))


@pytest.fixture(scope="session")
def tiny_lavit(tiny_lavit_folder):
    return load(tiny_lavit_folder)


@pytest.fixture(scope="session")
def nano():
    return load("nano")
