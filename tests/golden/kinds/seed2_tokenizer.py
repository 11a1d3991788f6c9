"""SEED-2 tokenizer: every activation from pixels to codes to embedding, both decode heads, any sizes.

Not checked: `margin_sq_dist` itself (it says how far the recorded codes are from a tie).
"""

from __future__ import annotations

from pathlib import Path

import torch
from runner import assert_close, read_json, read_tensors
from seed2_common import tokenizer_config

from seed_multimodal.seed.modeling import Seed2Tokenizer
from seed_multimodal.weights import assign_strictly

KIND = "seed2_tokenizer"


def _reverse_depth(names: list[str], otherwise: int) -> int:
    layers = {int(n.split(".")[4]) for n in names if n.startswith("Reverse_Qformer.bert.encoder.layer.")}
    return len(layers) or otherwise


def _decode_checked(model: Seed2Tokenizer, codes: torch.Tensor, want: dict[str, torch.Tensor], suffix: str) -> None:
    tokens = model.decoder_tokens(model.decode_task_layer(model.quantize.lookup(codes)))
    assert_close(tokens, want["blocks_image_out" + suffix], 1e-5, 1e-4, "blocks_image_out" + suffix)
    if "image_down_out" + suffix in want:
        assert_close(model.image_down(tokens), want["image_down_out" + suffix], 1e-5, 1e-4, "image_down_out" + suffix)
    if "reverse_qformer_out" + suffix in want:
        reverse = model.Reverse_Qformer(model.reverse_tokens.expand(len(tokens), -1, -1), tokens)
        assert_close(reverse, want["reverse_qformer_out" + suffix], 1e-5, 1e-4, "reverse_qformer_out" + suffix)
    assert_close(model.decode(codes), want["image_embeds" + suffix], 1e-4, 1e-4, "image_embeds" + suffix)


@torch.no_grad()
def check(folder: Path) -> None:
    sizes = read_json(folder / "config.json")
    weights, given, want = (read_tensors(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    depth = _reverse_depth(list(weights), sizes["bert"]["num_hidden_layers"])
    model = Seed2Tokenizer(tokenizer_config(sizes, depth)).eval()
    assign_strictly(model, weights, folder)

    vit = model.visual_encoder(given["image"])
    assert_close(vit, want["vit_features"], 1e-5, 1e-4, "vit_features")
    assert_close(model.ln_vision(vit), want["ln_vision"], 1e-5, 1e-4, "ln_vision")
    queries = model.query_features(given["image"])
    assert_close(queries, want["query_output"], 1e-5, 1e-4, "query_output")
    pre_quant = model.encode_task_layer(queries)
    assert_close(pre_quant, want["pre_quant"], 1e-5, 1e-4, "pre_quant")
    quant, _, indices = model.quantize(pre_quant)
    assert torch.equal(indices, want["indices"]), "indices of the quantiser differ"
    assert_close(quant, want["quant"], 1e-5, 1e-4, "quant")
    assert_close(model.decode_task_layer(quant), want["decode_task_output"], 1e-5, 1e-4, "decode_task_output")

    assert torch.equal(model.encode(given["image"]), want["indices"]), "encode gives other codes"
    assert torch.equal(model.encode(given["image"], batch_size=1), want["indices"]), "encode one by one: other codes"
    _decode_checked(model, want["indices"], want, "")
    _decode_checked(model, given["random_indices"], want, "_random")
