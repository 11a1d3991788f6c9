"""Whether a run may go on from a checkpoint, and what it does differently from the run that saved it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seed_multimodal.errors import ConfigError
from seed_multimodal.training.resume import settings_remark

# What changes no number of the training, or is said elsewhere (`checkpoint.check_same_run`).
_SILENT = ("output_dir", "deepspeed", "eval_data", "trainer.resume", "trainer.max_steps", "trainer.logging_steps",
           "trainer.save_steps", "trainer.save_total_limit", "trainer.async_save", "trainer.eval_steps",
           "trainer.eval_batches", "trainer.report_to", "trainer.dataloader_num_workers", "trainer.device",
           "trainer.timeout_minutes", "trainer.gradient_accumulation_steps", "trainer.gradient_checkpointing",
           "trainer.compile", "model.compile", "model.gradient_checkpointing")


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
    remark = settings_remark(state["config"], config, _SILENT) if "config" in state else ""
    return [*remarks, remark] if remark else remarks


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
