"""SEED's tokenizers: every activation from pixels to codes to embeddings, all decode heads, any
sizes.

Not compared: `margin_sq_dist` (how far the recorded codes are from a tie).
"""

import torch
from PIL import Image
from runner import CLOSE, EXACT, Tensors

from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.models.seed.configuration import QFormerConfig, Seed1Config, Seed2Config
from seed_multimodal.models.seed.modeling import Seed1Tokenizer, Seed2Tokenizer
from seed_multimodal.nn.vision.eva import EvaConfig
from seed_multimodal.state_dicts import assign_strictly

SEED1_CLOSE = 3e-5, 1e-4
SEED1_DECODED = 5e-5, 1e-4
SEED2_DECODED = 1e-4, 1e-4


def vit_config(sizes) -> EvaConfig:
    width = sizes["embed_dim"]
    return EvaConfig(
        image_size=sizes["img_size"],
        patch_size=sizes["patch_size"],
        width=width,
        depth=sizes["depth"],
        heads=sizes["num_heads"],
        mlp_width=int(width * sizes["mlp_ratio"]),
    )


def qformer_config(bert: dict, frequency: int = 2, **more) -> QFormerConfig:
    return QFormerConfig(
        width=bert["hidden_size"],
        depth=bert["num_hidden_layers"],
        heads=bert["num_attention_heads"],
        mlp_width=bert["intermediate_size"],
        max_positions=bert["max_position_embeddings"],
        cross_attention_freq=bert.get("cross_attention_freq", frequency),
        dropout=bert.get("hidden_dropout_prob", 0.1),
        **more,
    )


def causal_queries(sizes) -> int | None:
    """The original is causal with 32 queries only."""
    return None if sizes.get("causal_queries", True) else 0


def seed1_config(sizes) -> Seed1Config:
    reverse = sizes["reverse_qformer"]
    blocks = sizes["blocks_text"]
    return Seed1Config(
        vit=vit_config(sizes["vit"]),
        qformer=qformer_config(sizes["qformer"], causal_queries=causal_queries(sizes)),
        num_query=sizes["num_query_token"],
        decode_depth=blocks["depth"],
        decode_heads=blocks["num_heads"],
        reverse_depth=reverse["num_hidden_layers"],
        text_tokens=reverse["num_tokens"],
        **{key: sizes[key] for key in ("codebook_size", "codebook_dim", "text_features_dim")},
    )


def seed2_config(sizes, heads: int, reverse_depth: int) -> Seed2Config:
    same = (
        "codebook_size",
        "codebook_dim",
        "decode_depth",
        "image_features_dim",
        "use_qformer_image",
    )
    return Seed2Config(
        vit=vit_config(sizes["vit"]),
        qformer=qformer_config(sizes["bert"], causal_queries=causal_queries(sizes)),
        num_query=sizes["num_query_token"],
        decode_heads=heads,
        reverse_depth=reverse_depth,
        **{key: sizes[key] for key in same},
    )


def check_encode(
    model, image: torch.Tensor, want: Tensors, tolerance: tuple[float, float]
) -> torch.Tensor:
    """Activations of the encode side; returns the rows of the codebook."""
    vit = model.visual_encoder(image)
    queries = model.query_features(image)
    pre_quant = model.encode_task_layer(queries)
    quant, loss, indices = model.quantize(pre_quant)
    want.compare(
        "",
        tolerance,
        vit_features=vit,
        ln_vision=model.ln_vision(vit),
        query_output=queries,
        pre_quant=pre_quant,
        quant=quant,
    )
    if "vq_loss" in want:
        want.close("vq_loss", loss, tolerance)
    # Codes by the parts, by one call, and image by image.
    for codes in (indices, model.encode(image), torch.cat([*map(model.encode, image)])):
        want.close("indices", codes, EXACT)
    return quant


def check_seed1_decode(model: Seed1Tokenizer, quant: torch.Tensor, want: Tensors, suffix: str):
    up = model.decode_task_layer(quant)
    tokens = model.decoder_tokens(up)
    want.close("decode_task_output" + suffix, up, SEED1_CLOSE)
    want.close("blocks_text_out" + suffix, tokens, SEED1_CLOSE)
    if (name := "blocks_text_in" + suffix) in want:
        want.close(name, up + model.pos_embed_text, SEED1_CLOSE)
    want.close("reverse_output" + suffix, model.reverse_queries(tokens), SEED1_DECODED)
    want.close("embeds" + suffix, model.project(tokens), SEED1_DECODED)


@torch.no_grad()
def check_seed1(recording):
    inputs = recording.inputs
    want = recording.outputs
    image = inputs["image"]
    model = Seed1Tokenizer(seed1_config(recording.config)).eval()
    assign_strictly(model, recording.weights, recording.folder)

    # 1. Pixels → codes → embeddings, and codes that no image gives.
    photos = [Image.fromarray(pixels.numpy()) for pixels in inputs["raw_images"]]
    inputs.close(
        "image", seed_image_processor(model.config.vit.image_size).batch(photos), (1e-6, 0)
    )
    check_seed1_decode(model, check_encode(model, image, want, SEED1_CLOSE), want, "")
    random = inputs["random_indices"]
    check_seed1_decode(model, model.quantize.lookup(random), want, "_random")
    want.close("embeds_from_codes", model.decode(want["indices"]), SEED1_DECODED)
    want.close(
        "embeds_random", torch.cat([model.decode(row[None]) for row in random]), SEED1_DECODED
    )

    # 2. Causal attention: queries before a replaced one stay as they are.
    model.query_tokens[0, 20] = inputs["query20"]
    queries = model.query_features(image)
    want.close("query_output_query20_replaced", queries, SEED1_CLOSE)
    same = torch.cat([queries[:, :20], want["query_output"][:, 20:]], 1)
    want.close("query_output", same, SEED1_CLOSE)


def check_seed2_decode(model: Seed2Tokenizer, codes: torch.Tensor, want: Tensors, suffix: str):
    # One of the heads is recorded: the linear one, or the reverse Q-Former.
    tokens = model.decoder_tokens(model.decode_task_layer(model.quantize.lookup(codes)))
    want.close("blocks_image_out" + suffix, tokens)
    if (name := "image_down_out" + suffix) in want:
        want.close(name, model.image_down(tokens))
    if (name := "reverse_qformer_out" + suffix) in want:
        queries = model.reverse_tokens.expand(len(tokens), -1, -1)
        want.close(name, model.Reverse_Qformer(queries, tokens))
    want.close("image_embeds" + suffix, model.decode(codes), SEED2_DECODED)


@torch.no_grad()
def check_seed2(recording):
    sizes = recording.config
    want = recording.outputs
    image = recording.inputs["image"]
    # Without a reverse Q-Former its depth does not matter.
    layers = recording.weights.part("Reverse_Qformer.bert.encoder.layer").parts()
    depth = len(layers) or sizes["bert"]["num_hidden_layers"]
    model = Seed2Tokenizer(seed2_config(sizes, sizes["decode_blocks_heads"], depth)).eval()
    assign_strictly(model, recording.weights, recording.folder)
    quant = check_encode(model, image, want, CLOSE)
    want.close("decode_task_output", model.decode_task_layer(quant))
    check_seed2_decode(model, want["indices"], want, "")
    check_seed2_decode(model, recording.inputs["random_indices"], want, "_random")


KINDS = {"seed1_tokenizer": check_seed1, "seed2_tokenizer": check_seed2}
UNREAD = dict.fromkeys(KINDS, ("margin_sq_dist*",))
