"""Every state-dict key and shape of LaVIT's full-size visual modules, without allocating a weight (meta device).

Also: the vision tower's own file (528 tensors), what is trained once the tower is frozen, and the parameters of the
parts of the tokenizer and of both decoders.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from runner import assert_same, files_named, read_json
from torch import nn

from seed_multimodal.lavit.decoder import CodeDecoder, Head, LavitDecoderConfig
from seed_multimodal.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig

KIND = "lavit_keys_full"
TOKENIZER = "visual_tokenizer.json"
PARAMETERS = {"encoder": 1_012_588_928, "token_predictor": 3_227_490, "causal_encoder": 398_267_392,
              "quantize": 524_288, "encode_task_layer": 2_028_960, "vit_proj": 5_771_264}


def tokenizer() -> nn.Module:
    model = DynamicTokenizer(LavitTokenizerConfig())
    model.encoder.requires_grad_(False)
    assert_same(len(model.encoder.state_dict()), 528, "tensors of the tower")
    counted = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert_same(counted, PARAMETERS, "parameters")
    return model


def decoder(head: Head, tensors: int, millions: float) -> nn.Module:
    model = CodeDecoder(LavitDecoderConfig(head=head))
    assert_same(len(model.state_dict()), tensors, f"tensors of the {head} decoder")
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert_same(round(counted / 1e6, 1), millions, f"millions of parameters of the {head} decoder")
    return model


BUILD: dict[str, Callable[[], nn.Module]] = {
    TOKENIZER: tokenizer, "decoder_highres.json": lambda: decoder("highres", 287, 414.0),
    "decoder_lowres.json": lambda: decoder("lowres", 276, 404.1)}


def check(folder: Path) -> None:
    files = files_named(folder, "*.json")
    assert files, f"{folder}: no key tables"
    for file in files:
        assert file.name in BUILD, f"{file}: no model is known for this table"
        table = read_json(file)
        with torch.device("meta"):
            module = BUILD[file.name]()
        state = module.state_dict()
        assert_same(list(state), list(table), f"{file.name}: keys in order")
        for key, row in table.items():
            assert_same(list(state[key].shape), row["shape"], f"{file.name}: shape of {key}")
        trained = [key for key, parameter in module.named_parameters() if parameter.requires_grad]
        assert_same(sorted(trained), sorted(k for k, row in table.items() if row["trainable"]), f"{file.name}: trained")
