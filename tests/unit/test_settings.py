"""Reading settings into dataclasses, folder locks, replacing files."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from seed_multimodal.disk import atomic_open, folder_lock, writing
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.settings import check_settings, describe_settings, read_settings, setting


@dataclass
class Inner:
    width: int = setting(8, minimum=1)


@dataclass
class Example:
    steps: int = setting(minimum=1)
    lr: float = setting(1e-4, above=0, below=1)
    precision: str = setting("bf16", choices=("bf16", "fp32"))
    folder: Path | None = None
    files: list[str] = field(default_factory=list)
    betas: tuple[float, float] = (0.9, 0.99)
    checkpointing: bool | str = False
    options: dict[str, float] | None = None
    inner: Inner = field(default_factory=Inner)


def read(**values: object) -> Example:
    return read_settings(Example, {"steps": 3, **values}, "trainer")


def test_read_settings_converts_values():
    settings = read(
        lr=0.5,
        folder="a/b",
        files=["x"],
        betas=[0, 1],
        options={"a": 1},
        inner={"width": 2},
        checkpointing="selective",
    )
    assert settings == Example(
        3, 0.5, "bf16", Path("a/b"), ["x"], (0.0, 1.0), "selective", {"a": 1.0}, Inner(2)
    )
    assert isinstance(settings.betas[0], float) and isinstance(settings.options["a"], float)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"stepps": 3}, "trainer: unknown key 'stepps' (did you mean 'steps'?)"),
        ({"steps": 0}, "trainer: steps must be at least 1, not 0."),
        ({"steps": 2.5}, "trainer: steps: input should be a valid integer"),
        ({"lr": 1}, "trainer: lr must be below 1, not 1.0."),
        ({"lr": math.nan}, "trainer: lr must be above 0, not nan."),
        (
            {"precision": "bf61"},
            "trainer: precision must be one of bf16, fp32, not 'bf61' (did you mean 'bf16'?).",
        ),
        ({"files": "x"}, "trainer: files: input should be a valid list, not 'x'."),
        ({"inner": {"width": 0}}, "trainer: inner: width must be at least 1, not 0."),
        ({"inner": {"widht": 3}}, "trainer: inner: unknown key 'widht' (did you mean 'width'?)"),
    ],
)
def test_read_settings_names_wrong_values(values, sentence):
    with pytest.raises(ConfigError) as caught:
        read(**values)
    assert str(caught.value).startswith(sentence)


def test_check_settings_of_an_object():
    with pytest.raises(ConfigError, match="trainer: inner: width must be at least 1, not 0"):
        check_settings(Example(3, inner=Inner(0)), "trainer")


def test_read_settings_without_a_required_key():
    with pytest.raises(ConfigError, match="trainer: steps is required"):
        read_settings(Example, {}, "trainer")


def test_describe_settings_lists_every_key_with_its_default():
    lines = describe_settings(Example, "trainer")
    assert [*lines[:5], lines[-1]] == [
        "trainer.steps=???  (int)",
        "trainer.lr=0.0001  (float)",
        "trainer.precision=bf16  (bf16, fp32)",
        "trainer.folder=null  (Path | None)",
        "trainer.files=[]  (list[str])",
        "trainer.inner.width=8  (int)",
    ]


@pytest.mark.process
def test_folder_lock_of_another_process(tmp_path):
    code = (
        f"import sys, pathlib; from seed_multimodal.disk import folder_lock\n"
        f"with folder_lock(pathlib.Path({str(tmp_path)!r}), ValueError):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match="another run is busy"),
            folder_lock(tmp_path, ConfigError, "busy", 0.1),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    with folder_lock(tmp_path, ConfigError, timeout=5):
        pass


def test_replacing_writes_the_whole_file_or_nothing(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("before")
    with pytest.raises(RuntimeError), atomic_open(file) as handle:
        handle.write(b"half")
        raise RuntimeError
    assert file.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with atomic_open(file) as handle:
        handle.write(b"after")
    assert file.read_text() == "after"
    with (
        pytest.raises(DataError, match=r"none/a: cannot be written \(No such file"),
        writing(tmp_path, DataError),
    ):
        (tmp_path / "none" / "a").write_text("x")
