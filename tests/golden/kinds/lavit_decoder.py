"""LaVIT's decoder with both heads: rows of pictures of several lengths → features → a U-Net's conditions."""

from __future__ import annotations

from pathlib import Path

import torch
from lavit_pixels import decoder_config
from runner import assert_close, assert_same, read_json, read_tensors
from torch import Tensor

from seed_multimodal.lavit.decoder import CodeDecoder, Head
from seed_multimodal.weights import assign_strictly

KIND = "lavit_decoder"


@torch.no_grad()
def check(folder: Path) -> None:
    case = read_json(folder / "config.json")
    weights, given, want = (read_tensors(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    heads: tuple[Head, ...] = ("lowres", "highres")
    for head in heads:
        decoder = CodeDecoder(decoder_config(case[head], case["decoder_out_dim"], case["unet_dims"], head)).eval()
        state = {name.removeprefix(f"{head}."): value for name, value in weights.items() if name.startswith(f"{head}.")}
        assign_strictly(decoder, state, head)
        rows = given[f"{head}.x"].split(given[f"{head}.token_num"].tolist())
        normed: list[Tensor] = []
        hook = decoder.norm.register_forward_hook(lambda module, inputs, output, normed=normed: normed.append(output))
        features = decoder.features(rows)
        hook.remove()
        made = decoder(rows)
        results = {"norm": normed[0], "decode_task": features, **(
            {"output": made.prompt_embeds} if head == "lowres" else
            {"prompt_embeds": made.prompt_embeds, "pooled": made.pooled})}
        recorded = {name for name in want if name.startswith(f"{head}.")}
        assert_same({f"{head}.{name}" for name in results}, recorded, f"results of {head}")
        for name, value in results.items():
            assert_close(value, want[f"{head}.{name}"], 1e-5, 1e-4, f"{head}.{name}")
