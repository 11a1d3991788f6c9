"""Loads the folder that holds this file, by `trust_remote_code=True`: the classes are those of the
package seed-multimodal.

This file imports nothing of the package, since it is copied to other machines.
"""

from __future__ import annotations

import importlib
from typing import Any

PACKAGE = "seed_multimodal"


def __getattr__(name: str) -> Any:
    """The package's class of this name. Raises ImportError: the package is not installed."""
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        module = importlib.import_module(f"{PACKAGE}.transformers")
    except ModuleNotFoundError as error:
        if error.name != PACKAGE:  # something that the package needs is missing
            raise
        raise ImportError(
            f"{name} is a class of the package seed-multimodal, which is not installed: run "
            "`bash install.sh` in its repository, or `pip install -e REPOSITORY`."
        ) from error
    return getattr(module, name)
