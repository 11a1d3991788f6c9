"""Which scheduler a pipeline samples with: its folder's, or for the time of a call another, by name or as an object."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError, first_line

# What diffusers' schedulers of other kinds of models raise, dozens of classes, each in its own place.
_MISFITS = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def using(pipeline: Any, scheduler: Any | None,
          own: Mapping[str, Callable[[Mapping[str, Any]], Any]] | None = None) -> Iterator[None]:
    """Run a pipeline with another scheduler, and put its own back.

    Args:
        scheduler: an object, or a name: built from the present one's noise schedule; None: the present one.
        own: names beside diffusers', each with how one is made from another's configuration.

    Raises:
        ConfigError: it is none, or fails inside: one of another kind of model, or a package it needs is missing.
    """
    if scheduler is None:
        yield
        return
    usual = pipeline.scheduler
    name = scheduler if isinstance(scheduler, str) else type(scheduler).__name__
    if not isinstance(scheduler, str) and not (hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step")):
        raise ConfigError(f"A scheduler is the name of a diffusers class or such an object, not {name}.")
    try:
        if isinstance(scheduler, str):
            made = (own or {}).get(scheduler)
            scheduler = made(usual.config) if made else scheduler_class(scheduler).from_config(usual.config)
        pipeline.scheduler = scheduler
        yield
    except torch.OutOfMemoryError:
        raise
    except _MISFITS as error:
        fits = ", ".join(sorted(one.__name__ for one in usual.compatibles))
        raise ConfigError(f"The scheduler {name} does not work with this model and these settings "
                          f"({first_line(error)}); made for such models are {fits}.") from error
    finally:
        pipeline.scheduler = usual


def scheduler_class(name: str) -> Any:
    """A diffusers scheduler class; `ConfigError` names the nearest for an unknown one."""
    import diffusers

    names = [entry for entry in dir(diffusers) if entry.endswith("Scheduler") and entry != "Scheduler"]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise ConfigError(f"Unknown scheduler {name!r}" + (f", did you mean {near[0]!r}?" if near else
                                                           ": give a diffusers scheduler class, e.g. DDIMScheduler."))
    return getattr(diffusers, name)


def read_scheduler(place: Path, where: str) -> Any:
    """The scheduler of a diffusion folder, with its own settings; `where`: what to download, in messages.

    Raises:
        CheckpointError: none is there, or it names no class. ConfigError: a class that diffusers has not.
    """
    listed = place / "scheduler" / "scheduler_config.json"
    settings = read_json_object(listed, CheckpointError, where)
    if "_class_name" not in settings:
        raise CheckpointError(f"{listed}: names no scheduler (_class_name).")
    return scheduler_class(str(settings["_class_name"])).from_config(settings)
