"""Stage 1 (contrastive): losses, logits, every gradient, two AdamW steps, one and two processes.

`world2` runs in two real processes over gloo. Not checked: the reference's two crashes (no process group, batch of
one), because both work here; the text tokenizer (ids are given).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from runner import assert_close, assert_same, read_json, read_tensors
from seed2_common import ClearGradients, Tensors, recorded_adamw, recorded_steps
from stage1_common import build, compare, run, worker

from seed_multimodal.seed.training import Stage1Model

KIND = "stage1_losses"


def check_steps(model: Stage1Model, given: Tensors, want: Tensors, meta: dict[str, Any]) -> None:
    steps, clear = recorded_adamw(model, meta["optimizer"]), ClearGradients()
    parameters = dict(model.named_parameters())
    comparable = recorded_steps(want, model.state_dict())
    for number, loss in enumerate(meta["losses_before_each_step"], start=1):
        output = run(model, given)
        assert_close(output.loss.detach(), loss, 1e-4, 1e-4, f"loss before step {number}")
        clear.note(model)
        steps.step()
        if number not in comparable:
            continue
        for name in (n for n in want if n.startswith(f"step{number}.")):
            own = name.removeprefix(f"step{number}.")
            mask = clear.masks[own]
            assert_close(parameters[own].detach()[mask], want[name][mask], 2e-5, 1e-4, name)
    output = run(model, given)
    assert_close(output.loss.detach(), meta["loss_after_two_steps"], 1e-3, 1e-3, "loss after two steps")


def check(folder: Path) -> None:
    sizes, meta = read_json(folder / "config.json"), read_json(folder / "meta.json")
    weights, given, want = (read_tensors(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    model = build(sizes, weights, None)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert_same(trainable, meta["trainable"], "trainable parameters")
    compare(run(model, given), model, want, "nodist", meta["grad_norms_nodist"])
    detached = build(sizes, weights, False)
    compare(run(detached, given), detached, want, "world1", meta["grad_norms_world1"])
    check_steps(detached, given, want, meta)
    world = 1 + max((int(n.split(".")[1].removeprefix("rank")) for n in want if n.startswith("world2.")), default=0)
    if world > 1:
        with tempfile.TemporaryDirectory() as place:
            torch.multiprocessing.spawn(worker, (world, str(folder), f"{place}/rendezvous"), nprocs=world)
