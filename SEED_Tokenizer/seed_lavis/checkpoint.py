"""LAVIS's checkpoints `checkpoint_{epoch}.pth`: read by the next stage, an export or another LAVIS.

`{"model": without frozen parameters, "optimizer", "config", "scaler", "epoch"}`, written by one process, complete or
not at all. Resuming after a kill does not need them (it reads the loop's checkpoints); `resume_ckpt_path` takes one,
also the original's, as the start of a run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seed_lavis.base import frozen_names
from seed_multimodal.disk import writing
from seed_multimodal.errors import CheckpointError
from seed_multimodal.weights import assign_strictly, read_file, save_torch

NAME = re.compile(r"checkpoint_(\d+)\.pth")


def write_checkpoint(folder: Path, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer,
                     config: Mapping[str, Any], keep: int = 0) -> Path:
    """Write the checkpoint of an epoch; with `keep`, drop all but the first and the newest `keep` ones.

    Raises:
        CheckpointError: it cannot be written (a full disk); what was there stays.
    """
    frozen = frozen_names(model)
    weights = {name: value for name, value in model.state_dict().items() if name not in frozen}
    content = {"model": weights, "optimizer": optimizer.state_dict(), "config": dict(config), "scaler": None,
               "epoch": epoch}
    file = folder / f"checkpoint_{epoch}.pth"
    with writing(file):
        save_torch(content, file)
    if keep:
        for number in sorted(epochs_in(folder))[1:-keep]:
            (folder / f"checkpoint_{number}.pth").unlink()
    return file


def epochs_in(folder: Path) -> list[int]:
    """Epochs whose checkpoints lie in a folder."""
    return [int(found[1]) for found in map(NAME.fullmatch, os.listdir(folder)) if found]


def read_checkpoint(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Fill model and optimiser from a LAVIS checkpoint; returns the number of finished epochs.

    Raises:
        CheckpointError: missing, damaged or unsafe file, another model's or optimiser's, no epoch.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such checkpoint (run.resume_ckpt_path).")
    content = read_file(file)
    state, epoch, saved = (content.get(key) for key in ("model", "epoch", "optimizer"))
    if not isinstance(state, Mapping) or not isinstance(epoch, int) or not isinstance(saved, Mapping):
        raise CheckpointError(f"{file}: not a LAVIS checkpoint: it must hold model, optimizer and epoch, it holds "
                              f"{', '.join(map(str, content))}; to take its weights only, use model.finetuned.")
    assign_strictly(model, state, file, allow_missing=sorted(frozen_names(model)))
    try:
        optimizer.load_state_dict(dict(saved))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: holds the state of another optimiser ({error}).") from error
    return epoch + 1
