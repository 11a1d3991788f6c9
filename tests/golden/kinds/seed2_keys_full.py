"""Every state-dict key and shape of the full-size models, in order, without allocating a weight (meta device).

Also: which parameters the stages train, and which entries are buffers. Not checked: dtypes after the reference's
partial conversion to half precision (ours has one dtype per model), and the CLIP tower of stage 2, which is not
our code (`clip_model.*`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runner import assert_same, files_named, read_json
from torch import nn

from seed_multimodal.seed.configuration import Seed2Config
from seed_multimodal.seed.modeling import Seed2Tokenizer
from seed_multimodal.seed.training import Stage1Model, Stage2Model

KIND = "seed2_keys_full"

BUILD: dict[str, Callable[[], nn.Module]] = {
    "inference_quantizer.default.json": lambda: Seed2Tokenizer(Seed2Config()),
    "inference_quantizer.use_qformer_image.json": lambda: Seed2Tokenizer(Seed2Config(use_qformer_image=True)),
    "stage1_training_model.json": lambda: Stage1Model(Seed2Config()),
    "stage2_training_model.json": lambda: Stage2Model(Seed2Config(use_qformer_image=True, reverse_depth=4)),
}


def _check_model(model: nn.Module, table: dict[str, dict[str, Any]], name: str, trains: bool) -> None:
    state = model.state_dict()
    assert_same(list(state), list(table), f"{name}: keys in order")
    for key, row in table.items():
        assert_same(list(state[key].shape), row["shape"], f"{name}: shape of {key}")
    buffers = {key for key, _ in model.named_buffers()} & set(state)
    assert_same(sorted(buffers), sorted(k for k, row in table.items() if row.get("buffer")), f"{name}: buffers")
    if trains:
        trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        aliases = {key for key, parameter in model.named_parameters(remove_duplicate=False)} - {
            key for key, _ in model.named_parameters()}
        recorded = [key for key, row in table.items() if row.get("trainable") and key not in aliases]
        assert_same(trainable, recorded, f"{name}: trainable parameters")


def check(folder: Path) -> None:
    files = files_named(folder, "*.json")
    assert files, f"{folder}: no key tables"
    for file in files:
        assert file.name in BUILD, f"{file}: no model is known for this table"
        table = {k: row for k, row in read_json(file).items() if not k.startswith("clip_model.")}
        with torch.device("meta"):
            model = BUILD[file.name]()
        _check_model(model, table, file.name, trains="training" in file.name)
