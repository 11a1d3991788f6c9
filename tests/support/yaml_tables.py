"""Tables of test data in YAML."""

from pathlib import Path
from typing import Any

import yaml


def read_tables(module: str) -> Any:
    """The YAML file beside a module (its `__file__`), of the same name."""
    return yaml.safe_load(Path(module).with_suffix(".yaml").read_text())
