"""A run that is really killed goes on where it stopped, with the same losses to the last bit, and leaves no process.

Stage 2, because most happens there: k-means start, counts of codes, restarts of dead ones, a data worker, held-out
losses after each epoch (which the run that is compared with does without).
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from real_processes import descendants, wait_until

OPTIONS = ("model.load_pretrained=False", "model.restart_every=3", "run.iters_per_epoch=5", "run.max_epoch=5",
           "run.save_every_steps=4", "run.batch_size_train=4")
# As the speed run trains: on scenes that are drawn, codes begin after a warm-up, the Q-Former learns on.
SCENES = ("model.freeze_qformer=False", "model.codebook_warmup=3", "model.corrupt=0.3", "model.nested=0.5",
          "run.ema=0.9", "run.lr_sched=linear_warmup_cosine_steps", "run.num_workers=1")


def runs(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()


def on_scenes(arguments: list[str]) -> list[str]:
    """The same run on nano's scenes, of which an epoch has few."""
    file = arguments[1]
    config = OmegaConf.load(file)
    config.datasets = {"nano": {"vis_processor": {"train": {"name": "blip_image_eval", "image_size": 64}},
                                "text_processor": {"train": {"name": "blip_caption"}}, "build_info": {"number": 24}}}
    OmegaConf.save(config, file)
    return arguments


@pytest.mark.process
@pytest.mark.parametrize("data", ["pictures", "scenes"])
def test_sigkill_and_resume_gives_bit_equal_losses(yaml, run, start, losses, tmp_path, data):
    def arguments(name: str, *more: str) -> list[str]:
        made = yaml("stage2", *OPTIONS, *(SCENES if data == "scenes" else ["run.num_workers=1"]), *more, name=name)
        return on_scenes(made) if data == "scenes" else made

    killed_run = arguments("killed", "run.valid_splits=[val]")
    process = start(sys.executable, "train.py", *killed_run)
    log = tmp_path / "killed" / "stage2.log.jsonl"
    wait_until(lambda: log.is_file() and log.read_text().count("\n") >= 7, process)  # the first epoch's held-out losses
    workers = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, error
    made = len(losses(tmp_path / "killed", "stage2"))
    assert 7 <= made < 25 and not (tmp_path / "killed" / "stage2.done.json").exists()
    assert len(workers) == 1
    deadline = time.monotonic() + 30
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(runs, workers))

    run(killed_run)
    run(arguments("whole"))
    killed, whole = (losses(tmp_path / name, "stage2") for name in ("killed", "whole"))
    assert list(killed) == list(whole) == list(range(1, 26)) and killed == whole
    first, second = (torch.load(tmp_path / name / "checkpoint_4.pth", weights_only=True)["model"]
                     for name in ("killed", "whole"))
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
