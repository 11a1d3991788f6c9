"""Tiny sizes, and running the application in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import warm_python

ROOT = Path(__file__).resolve().parents[2]
APPLICATION = ROOT / "SEED_Tokenizer"
TINY = ["model.vit={patch_size: 16, width: 32, depth: 1, heads: 2, mlp_width: 64}",
        "model.qformer={width: 32, depth: 2, heads: 2, mlp_width: 64, max_positions: 64, dropout: 0.0}",
        "run.batch_size_train=8", "run.iters_per_epoch=4", "run.max_epoch=2", "run.warmup_steps=2", "run.log_freq=1",
        "run.batch_size_eval=4"]
TINY_STAGE2 = ["model.n_embed=64", "model.codebook_embed_dim=8", "model.decode_heads=2", "model.kmeans_images=16"]
PROJECTS = {"stage1": "nano/pretrain_qformer.yaml", "stage2": "nano/pretrain_codebook.yaml"}
WORKER = """
import sys
sys.path.insert(0, "APPLICATION")
import torch
import train
runner = train.build(train.parser("").parse_args(sys.argv[2:]))
runner.train()
torch.save(runner._model.state_dict(), f"{sys.argv[1]}/rank{runner.run.rank}.pt")
torch.distributed.destroy_process_group()
"""


def environment(**more: str) -> dict[str, str]:
    """For processes of ours: one thread, no downloads, the checkout's library."""
    plain = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**plain, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src"),
            "PYTHONDONTWRITEBYTECODE": "1", "VIRTUAL_ENV": warm_python.ENVIRONMENT, **more}


def log_of(folder: Path, stage: str) -> dict[int, dict[str, float]]:
    """The lines of a run's log by step."""
    lines = (folder / f"{stage}.log.jsonl").read_text().splitlines()
    return {int(line["step"]): line for line in map(json.loads, lines)}


def torchrun(start: Callable[..., subprocess.Popen[str]], folder: Path, arguments: list[str]) -> tuple[str, list[Any]]:
    """Two processes that train; what they print, and the weights of each."""
    import torch

    script = folder / "worker.py"
    script.write_text(WORKER.replace("APPLICATION", str(APPLICATION)))
    process = start(warm_python.PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                    str(script), str(folder), *arguments)
    out, error = process.communicate(timeout=170)
    assert process.returncode == 0, error
    return out, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
