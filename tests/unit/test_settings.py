"""Settings: dataclasses out of mappings, with types and limits."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yaml_tables import read_tables

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import check_settings, read_settings, setting

TABLES = read_tables(__file__)


@dataclass
class Inner:
    width: int = setting(8, minimum=1)
    share: float = 1.0


@dataclass
class Example:
    steps: int = setting(minimum=1, maximum=9)
    lr: float = setting(1e-4, above=0, below=1)
    precision: str = setting("bf16", choices=("bf16", "fp32"))
    folder: Path | None = None
    files: list[str] = field(default_factory=list)
    betas: tuple[float, float] = (0.9, 0.99)
    checkpointing: bool | str = False
    options: dict[str, float] | None = None
    inner: Inner = field(default_factory=Inner)
    parts: list[Inner] = field(default_factory=list)


def test_read_settings_converts_values():
    settings = read_settings(Example, TABLES["values"], "trainer")
    assert settings == Example(
        3, 0.5, "bf16", Path("a/b"), ["x"], (0.0, 1.0), "selective", {"a": 1.0}, Inner(2)
    )
    assert isinstance(settings.betas[0], float) and isinstance(settings.options["a"], float)


WRONG = TABLES["wrong"]


@pytest.mark.parametrize("values, named", WRONG.values(), ids=WRONG)
def test_read_settings_names_wrong_values(values, named):
    with pytest.raises(ConfigError) as caught:
        read_settings(Example, values, "trainer")
    sentence = str(caught.value)
    assert sentence.startswith("trainer: ") and "\n" not in sentence
    assert all(name in sentence for name in named)


@given(steps=st.integers(-20, 20), lr=st.floats())
def test_read_settings_accepts_what_the_limits_allow(steps, lr):
    allowed = 1 <= steps <= 9 and 0 < lr < 1
    try:
        read_settings(Example, {"steps": steps, "lr": lr}, "trainer")
    except ConfigError:
        assert not allowed
    else:
        assert allowed


def test_check_settings_of_an_object():
    # Settings that Python code builds have the same limits.
    with pytest.raises(ConfigError, match="width"):
        check_settings(Example(3, inner=Inner(0)), "trainer")
