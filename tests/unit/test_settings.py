"""Settings: dataclasses out of mappings, with types and limits."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import check_settings, read_settings, setting


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
    values = {
        "steps": 3,
        "lr": 0.5,
        "folder": "a/b",
        "files": ["x"],
        "betas": [0, 1],
        "checkpointing": "selective",
        "options": {"a": 1},
        "inner": {"width": 2},
    }
    settings = read_settings(Example, values, "trainer")
    assert settings == Example(
        3, 0.5, "bf16", Path("a/b"), ["x"], (0.0, 1.0), "selective", {"a": 1.0}, Inner(2)
    )
    assert isinstance(settings.betas[0], float) and isinstance(settings.options["a"], float)


# Values → the keys, and the nearest of an unknown one, that the error names.
WRONG = yaml.safe_load("""
missing: [{}, [steps]]
unknown: [{steps: 3, stepps: 3}, [stepps, "'steps'"]]
minimum: [{steps: 0}, [steps, "1", "0"]]
maximum: [{steps: 10}, [steps, "9", "10"]]
type: [{steps: 2.5}, [steps]]
boolean: [{steps: true}, [steps]]
below: [{steps: 3, lr: 1}, [lr, "1"]]
above: [{steps: 3, lr: 0}, [lr, "0"]]
nan: [{steps: 3, inner: {share: .nan}}, [inner, share, nan]]
infinite in a list: [{steps: 3, betas: [0.9, -.inf]}, [betas, -inf]]
nan in a mapping: [{steps: 3, options: {rate: .nan}}, [options, rate]]
nan in a nested list: [{steps: 3, parts: [{share: .nan}]}, [parts, share]]
choice: [{steps: 3, precision: bf61}, [precision, bf61, "'bf16'"]]
text for a list: [{steps: 3, files: x}, [files]]
nested: [{steps: 3, inner: {width: 0}}, [inner, width]]
nested unknown: [{steps: 3, inner: {widht: 3}}, [inner, widht, "'width'"]]
""")


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
