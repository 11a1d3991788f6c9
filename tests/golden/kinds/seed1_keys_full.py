"""Every state-dict key and shape of the full-size SEED-1 tokenizer, in order (meta device: no weight is allocated).

Also: parameters per part and buffers. Not checked: dtypes after the reference's partial conversion to half precision
(ours has one dtype per model), and which file brings a tensor (a reading, see the fixture's README).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from runner import assert_same, read_json

from seed_multimodal.seed.configuration import Seed1Config
from seed_multimodal.seed.modeling import Seed1Tokenizer

KIND = "seed1_keys_full"


def check(folder: Path) -> None:
    table, summary = read_json(folder / "inference_tokenizer.json"), read_json(folder / "summary.json")
    with torch.device("meta"):
        model = Seed1Tokenizer(Seed1Config())
    state = model.state_dict()
    assert_same(list(state), list(table), "keys in order")
    assert_same(len(state), summary["entries"], "number of keys")
    for key, row in table.items():
        assert_same(list(state[key].shape), row["shape"], f"shape of {key}")
    buffers = {key for key, _ in model.named_buffers()} & set(state)
    assert_same(sorted(buffers), sorted(summary["buffers"]), "buffers")
    assert_same(sorted(buffers), sorted(key for key, row in table.items() if row.get("buffer")), "buffers of the table")
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[name.split(".")[0]] += parameter.numel()
        assert parameter.requires_grad == table[name]["trainable"], f"{name}: requires_grad"
    assert_same(dict(counts), summary["parameters_by_module"], "parameters of each part")
    assert_same(sum(counts.values()), summary["parameters"], "parameters")
