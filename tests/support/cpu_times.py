"""CPU seconds of tests: what a run's costliest files and tests were, and files in the order of
those seconds, so that no worker ends with a long one (`file_times.yaml`, of the suite's last
recording: `RECORD_FILE_TIMES=1 bash scripts/test.sh`).
"""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm_processes
import yaml

RECORDED = Path(__file__).with_name("file_times.yaml")
LIBRARIES = (
    "transformers.models.llama.modeling_llama",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_tiny",
)
LIMIT = 2.0  # seconds of a test without the marker `slow`
LISTED = 20
LEAST = 4  # seconds of a file whose place matters


def folder() -> Path:
    """Of a run and all its workers."""
    return Path(os.environ[warm_processes.FOLDER])


def cpu_seconds() -> float:
    """Of this process and its children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def warm_seconds(test: str) -> float:
    """Of the warm processes that a test started."""
    times = folder() / "times.jsonl"
    lines = times.read_text().splitlines() if times.is_file() else []
    return sum(seconds for name, seconds in map(json.loads, lines) if name.startswith(f"{test} ("))


class CpuTimes:
    """Plug-in of pytest."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Files with the most seconds first."""
        recorded = yaml.safe_load(RECORDED.read_text())
        items.sort(key=lambda item: -recorded.get(item.nodeid.partition("::")[0], 0))

    def pytest_collection_finish(self) -> None:
        """Import what the first tests would pay for."""
        if "PYTEST_XDIST_WORKER" in os.environ:
            for name in LIBRARIES:
                importlib.import_module(name)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        started = cpu_seconds()
        result = yield
        seconds = cpu_seconds() - started + warm_seconds(item.nodeid)
        with (folder() / "tests.jsonl").open("a") as file:
            file.write(json.dumps([item.nodeid, seconds]) + "\n")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Fail a test above the limit, in a worker of the suite."""
        started = cpu_seconds()
        yield
        if any(map(item.get_closest_marker, ("slow", "browser", "nightly"))):
            return
        seconds = cpu_seconds() - started + warm_seconds(item.nodeid)
        if seconds > LIMIT and "PYTEST_XDIST_WORKER" in os.environ:
            pytest.fail(f"{seconds:.1f} CPU seconds: make it faster, or mark it slow")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the costliest, once a run."""
        times = folder() / "tests.jsonl"
        if "PYTEST_XDIST_WORKER" in os.environ or not times.is_file():
            return
        tests: Counter[str] = Counter(dict(map(json.loads, times.read_text().splitlines())))
        files: Counter[str] = Counter()
        for name, seconds in tests.items():
            files[name.partition("::")[0]] += seconds
        terminalreporter.section(f"CPU seconds: {tests.total():.0f}")
        for table in (files, tests):
            for name, seconds in table.most_common(LISTED):
                terminalreporter.write_line(f"{seconds:7.1f} {name}")
        if "RECORD_FILE_TIMES" in os.environ:
            rows = {name: round(value) for name, value in files.most_common() if value >= LEAST}
            RECORDED.write_text(yaml.safe_dump(rows, sort_keys=False))
