"""Whether a run may go on from a checkpoint, and what it does differently from the run that saved it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from seed_multimodal.errors import ConfigError

# What changes no number of the training, or is said elsewhere (`checkpoint.check_same_run`).
_SILENT = ("output_dir", "deepspeed", "eval_data", "trainer.resume", "trainer.max_steps", "trainer.logging_steps",
           "trainer.save_steps", "trainer.save_total_limit", "trainer.async_save", "trainer.eval_steps",
           "trainer.eval_batches", "trainer.report_to", "trainer.dataloader_num_workers", "trainer.device",
           "trainer.timeout_minutes", "trainer.gradient_accumulation_steps", "trainer.gradient_checkpointing",
           "trainer.compile", "model.compile", "model.gradient_checkpointing")
_SHOWN = 8


def check_same_run(folder: Path, state: Mapping[str, Any], now: Mapping[str, Any], config: Mapping[str, Any]
                   ) -> list[str]:
    """Refuse a checkpoint that this run cannot go on from; returns remarks on what differs and may.

    Args:
        now: `engine`, `zero_stage`, `world_size`, `model`, `optimizer`, `max_steps`, `rows_per_step` of this run.
        config: this run's resolved configuration.

    Raises:
        ConfigError: another engine, model or optimiser, or another number of processes with ZeRO.
    """
    for key, what in (("engine", "engine"), ("zero_stage", "ZeRO stage"), ("model", "model"),
                      ("optimizer", "optimiser")):
        if state.get(key) != now[key]:
            raise ConfigError(f"{folder}: was saved with the {what} {_brief(state.get(key))}, this run has "
                              f"{_brief(now[key])}; use the same, or start from its weights in a new folder "
                              "(model.adapter, or model.path).")
    if now["engine"] == "deepspeed" and state["world_size"] != now["world_size"]:
        raise ConfigError(f"{folder}: its ZeRO shards belong to {state['world_size']} processes, this run has "
                          f"{now['world_size']}; use {state['world_size']}, or start from its weights in a new folder "
                          f"(model.adapter, or model.path). The plain engine may change their number.")
    remarks = []
    for key, what in (("world_size", "processes"), ("max_steps", "steps in all (the schedule follows)"),
                      ("rows_per_step", "micro-batches a step")):
        if state.get(key) != now[key]:
            remarks.append(f"the checkpoint was saved with {state.get(key)} {what}, this run has {now[key]}")
    changes = changed_settings(state["config"], config) if "config" in state else []
    if changes:
        remarks.append(f"other settings than in the run that saved the checkpoint: {'; '.join(changes)}")
    return remarks


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings of two resolved configurations that differ and change the numbers of a training.

    Returns:
        `key: before -> now` for each, dotted keys in alphabetical order; at most eight, then how many more.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not _silent(key)]
    lines = [f"{key}: {_word(old, key)} -> {_word(new, key)}" for key in keys[:_SHOWN]]
    return lines + ([f"{len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else [])


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its dotted key; sources go by their names, so that one more does not move the others."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{inner.get('name', number)}")
    else:
        yield key, value


def _silent(key: str) -> bool:
    return any(key == silent or key.startswith(f"{silent}.") for silent in _SILENT)


def _word(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "not given"


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
