"""SEED-1 tokenizer: preprocessing, every activation from pixels to codes to text-like embeddings, the causal rule.

Not checked: `margin_sq_dist` itself (it says how far the recorded codes are from a tie).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from runner import assert_close, read_json, read_tensors
from seed2_common import Tensors, vit_config

from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.seed.configuration import QFormerConfig, Seed1Config
from seed_multimodal.seed.modeling import Seed1Tokenizer
from seed_multimodal.weights import assign_strictly

KIND = "seed1_tokenizer"


def tokenizer_config(sizes: dict[str, Any]) -> Seed1Config:
    bert, reverse = sizes["qformer"], sizes["reverse_qformer"]
    qformer = QFormerConfig(
        width=bert["hidden_size"], depth=bert["num_hidden_layers"], heads=bert["num_attention_heads"],
        mlp_width=bert["intermediate_size"], max_positions=bert["max_position_embeddings"],
        cross_attention_freq=bert["cross_attention_freq"],
        causal_queries=sizes["num_query_token"] if sizes["causal_queries"] else 0)
    assert not reverse["causal"], "a causal Reverse Q-Former is not SEED-1's"
    return Seed1Config(
        vit=vit_config(sizes["vit"]), qformer=qformer, num_query=sizes["num_query_token"],
        codebook_size=sizes["codebook_size"], codebook_dim=sizes["codebook_dim"],
        decode_depth=sizes["blocks_text"]["depth"], decode_heads=sizes["blocks_text"]["num_heads"],
        reverse_depth=reverse["num_hidden_layers"], text_tokens=reverse["num_tokens"],
        text_features_dim=sizes["text_features_dim"])


def check_encode(model: Seed1Tokenizer, given: Tensors, want: Tensors) -> torch.Tensor:
    transform = seed_image_processor(model.config.vit.image_size)
    pictures = [Image.fromarray(pixels.numpy()) for pixels in given["raw_images"]]
    assert_close(transform.batch(pictures), given["image"], 1e-6, 0, "image")
    vit = model.visual_encoder(given["image"])
    assert_close(vit, want["vit_features"], 3e-5, 1e-4, "vit_features")
    assert_close(model.ln_vision(vit), want["ln_vision"], 3e-5, 1e-4, "ln_vision")
    queries = model.query_features(given["image"])
    assert_close(queries, want["query_output"], 3e-5, 1e-4, "query_output")
    pre_quant = model.encode_task_layer(queries)
    assert_close(pre_quant, want["pre_quant"], 3e-5, 1e-4, "pre_quant")
    quant, loss, indices = model.quantize(pre_quant)
    assert torch.equal(indices, want["indices"]), "indices of the quantiser differ"
    assert_close(quant, want["quant"], 3e-5, 1e-4, "quant")
    assert_close(loss, want["vq_loss"], 3e-5, 1e-4, "vq_loss")
    assert torch.equal(model.encode(given["image"]), want["indices"]), "encode gives other codes"
    assert torch.equal(model.encode(given["image"], batch_size=1), want["indices"]), "encode one by one: other codes"
    return quant


def check_decode(model: Seed1Tokenizer, quant: torch.Tensor, want: Tensors, suffix: str) -> None:
    up = model.decode_task_layer(quant)
    assert_close(up, want["decode_task_output" + suffix], 3e-5, 1e-4, "decode_task_output" + suffix)
    if "blocks_text_in" + suffix in want:
        assert_close(up + model.pos_embed_text, want["blocks_text_in" + suffix], 3e-5, 1e-4, "blocks_text_in" + suffix)
    tokens = model.decoder_tokens(up)
    assert_close(tokens, want["blocks_text_out" + suffix], 3e-5, 1e-4, "blocks_text_out" + suffix)
    reverse = model.reverse_queries(tokens)
    assert_close(reverse, want["reverse_output" + suffix], 5e-5, 1e-4, "reverse_output" + suffix)
    assert_close(model.decode_embeddings(quant), want["embeds" + suffix], 5e-5, 1e-4, "embeds" + suffix)


def check_causal(model: Seed1Tokenizer, given: Tensors, want: Tensors) -> None:
    model.query_tokens[0, 20] = given["query20"]
    queries = model.query_features(given["image"])
    assert_close(queries, want["query_output_query20_replaced"], 3e-5, 1e-4, "query_output_query20_replaced")
    assert_close(queries[:, :20], want["query_output"][:, :20], 3e-5, 1e-4, "queries before the replaced one")


@torch.no_grad()
def check(folder: Path) -> None:
    sizes = read_json(folder / "config.json")
    weights, given, want = (read_tensors(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    model = Seed1Tokenizer(tokenizer_config(sizes)).eval()
    assign_strictly(model, weights, folder)
    check_decode(model, check_encode(model, given, want), want, "")
    check_decode(model, model.quantize.lookup(given["random_indices"]), want, "_random")
    assert_close(model.decode(want["indices"]), want["embeds_from_codes"], 5e-5, 1e-4, "embeds_from_codes")
    assert_close(model.decode(given["random_indices"], batch_size=1), want["embeds_random"], 5e-5, 1e-4, "decode")
    check_causal(model, given, want)
