"""SEED's tokenizers: every activation from pixels to codes to embeddings, all decode heads, any
sizes.

Not compared: `margin_sq_dist` (how far the recorded codes are from a tie).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from runner import assert_all_close, assert_close, read_case

from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.models.seed.configuration import QFormerConfig, Seed1Config, Seed2Config
from seed_multimodal.models.seed.modeling import Seed1Tokenizer, Seed2Tokenizer
from seed_multimodal.nn.vision.eva import EvaConfig
from seed_multimodal.weights import assign_strictly

Tensors = dict[str, torch.Tensor]


def vit_config(sizes: dict[str, Any]) -> EvaConfig:
    width = sizes["embed_dim"]
    return EvaConfig(
        image_size=sizes["img_size"],
        patch_size=sizes["patch_size"],
        width=width,
        depth=sizes["depth"],
        heads=sizes["num_heads"],
        mlp_width=int(width * sizes["mlp_ratio"]),
    )


def qformer_config(
    bert: dict[str, Any], cross_attention_freq: int = 2, **more: Any
) -> QFormerConfig:
    return QFormerConfig(
        width=bert["hidden_size"],
        depth=bert["num_hidden_layers"],
        heads=bert["num_attention_heads"],
        mlp_width=bert["intermediate_size"],
        max_positions=bert["max_position_embeddings"],
        cross_attention_freq=bert.get("cross_attention_freq", cross_attention_freq),
        dropout=bert.get("hidden_dropout_prob", 0.1),
        **more,
    )


def seed1_config(sizes: dict[str, Any]) -> Seed1Config:
    reverse = sizes["reverse_qformer"]
    queries = sizes["num_query_token"]
    assert not reverse["causal"], "a causal Reverse Q-Former is not SEED-1's"
    return Seed1Config(
        vit=vit_config(sizes["vit"]),
        num_query=queries,
        codebook_size=sizes["codebook_size"],
        qformer=qformer_config(
            sizes["qformer"], causal_queries=queries if sizes["causal_queries"] else 0
        ),
        codebook_dim=sizes["codebook_dim"],
        decode_depth=sizes["blocks_text"]["depth"],
        decode_heads=sizes["blocks_text"]["num_heads"],
        reverse_depth=reverse["num_hidden_layers"],
        text_tokens=reverse["num_tokens"],
        text_features_dim=sizes["text_features_dim"],
    )


def seed2_config(sizes: dict[str, Any], reverse_depth: int) -> Seed2Config:
    return Seed2Config(
        vit=vit_config(sizes["vit"]),
        qformer=qformer_config(sizes["bert"]),
        num_query=sizes["num_query_token"],
        codebook_size=sizes["codebook_size"],
        codebook_dim=sizes["codebook_dim"],
        decode_depth=sizes["decode_depth"],
        decode_heads=sizes["decode_blocks_heads"],
        image_features_dim=sizes["image_features_dim"],
        use_qformer_image=sizes["use_qformer_image"],
        reverse_depth=reverse_depth,
    )


def check_encode(model: Any, image: torch.Tensor, want: Tensors, atol: float) -> torch.Tensor:
    """Activations of the encode side; returns the rows of the codebook."""
    vit = model.visual_encoder(image)
    queries = model.query_features(image)
    pre_quant = model.encode_task_layer(queries)
    quant, loss, indices = model.quantize(pre_quant)
    assert_all_close(
        {
            "vit_features": vit,
            "ln_vision": model.ln_vision(vit),
            "query_output": queries,
            "pre_quant": pre_quant,
            "quant": quant,
            **({"vq_loss": loss} if "vq_loss" in want else {}),
        },
        want,
        atol,
        1e-4,
    )
    assert torch.equal(indices, want["indices"]), "indices of the quantiser differ"
    for batch_size in (None, 1):
        assert torch.equal(model.encode(image, batch_size=batch_size), want["indices"]), (
            "encode gives other codes"
        )
    return quant


def check_seed1_decode(
    model: Seed1Tokenizer, quant: torch.Tensor, want: Tensors, suffix: str
) -> None:
    up = model.decode_task_layer(quant)
    tokens = model.decoder_tokens(up)
    activations = {"decode_task_output": up, "blocks_text_out": tokens}
    if "blocks_text_in" + suffix in want:
        activations["blocks_text_in"] = up + model.pos_embed_text
    assert_all_close(activations, want, 3e-5, 1e-4, "{}" + suffix)
    assert_all_close(
        {"reverse_output": model.reverse_queries(tokens), "embeds": model.decode_embeddings(quant)},
        want,
        5e-5,
        1e-4,
        "{}" + suffix,
    )


@torch.no_grad()
def check_seed1(folder: Path) -> None:
    sizes, weights, inputs, want = read_case(folder)
    model = Seed1Tokenizer(seed1_config(sizes)).eval()
    assign_strictly(model, weights, folder)
    images = [Image.fromarray(pixels.numpy()) for pixels in inputs["raw_images"]]
    assert_close(
        seed_image_processor(model.config.vit.image_size).batch(images),
        inputs["image"],
        1e-6,
        0,
        "image",
    )
    check_seed1_decode(model, check_encode(model, inputs["image"], want, 3e-5), want, "")
    check_seed1_decode(model, model.quantize.lookup(inputs["random_indices"]), want, "_random")
    assert_close(
        model.decode(want["indices"]), want["embeds_from_codes"], 5e-5, 1e-4, "embeds_from_codes"
    )
    assert_close(
        model.decode(inputs["random_indices"], batch_size=1),
        want["embeds_random"],
        5e-5,
        1e-4,
        "decode",
    )
    model.query_tokens[0, 20] = inputs["query20"]  # causal attention
    queries = model.query_features(inputs["image"])
    assert_close(
        queries, want["query_output_query20_replaced"], 3e-5, 1e-4, "query_output_query20_replaced"
    )
    assert_close(
        queries[:, :20], want["query_output"][:, :20], 3e-5, 1e-4, "queries before the replaced one"
    )


def check_seed2_decode(
    model: Seed2Tokenizer, codes: torch.Tensor, want: Tensors, suffix: str
) -> None:
    tokens = model.decoder_tokens(model.decode_task_layer(model.quantize.lookup(codes)))
    outputs = {"blocks_image_out": tokens}
    if "image_down_out" + suffix in want:
        outputs["image_down_out"] = model.image_down(tokens)
    if "reverse_qformer_out" + suffix in want:
        outputs["reverse_qformer_out"] = model.Reverse_Qformer(
            model.reverse_tokens.expand(len(tokens), -1, -1), tokens
        )
    assert_all_close(outputs, want, 1e-5, 1e-4, "{}" + suffix)
    assert_close(
        model.decode(codes), want["image_embeds" + suffix], 1e-4, 1e-4, "image_embeds" + suffix
    )


@torch.no_grad()
def check_seed2(folder: Path) -> None:
    sizes, weights, inputs, want = read_case(folder)
    reverse = {
        name.split(".")[4]
        for name in weights
        if name.startswith("Reverse_Qformer.bert.encoder.layer.")
    }
    model = Seed2Tokenizer(
        seed2_config(sizes, len(reverse) or sizes["bert"]["num_hidden_layers"])
    ).eval()
    assign_strictly(model, weights, folder)
    quant = check_encode(model, inputs["image"], want, 1e-5)
    assert_close(
        model.decode_task_layer(quant), want["decode_task_output"], 1e-5, 1e-4, "decode_task_output"
    )
    check_seed2_decode(model, want["indices"], want, "")
    check_seed2_decode(model, inputs["random_indices"], want, "_random")


KINDS = {"seed1_tokenizer": check_seed1, "seed2_tokenizer": check_seed2}
