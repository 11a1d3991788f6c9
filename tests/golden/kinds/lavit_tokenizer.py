"""LaVIT's dynamic tokenizer: every stage of both paths, the merger with given decisions, the selector with given
weights of the patches. Noise is the recorded one. The projector is recorded with its first 64 rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from runner import assert_close, assert_same, read_json, read_tensors
from torch import Tensor

from seed_multimodal.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig, causal_mask, dropped_mask
from seed_multimodal.nn.eva import EvaConfig
from seed_multimodal.weights import assign_strictly

KIND = "lavit_tokenizer"
FIRST_CODE, START, END = 32002, 32000, 32001


def build(sizes: dict[str, int], weights: dict[str, Tensor]) -> DynamicTokenizer:
    hidden = int(sizes["width"] * sizes["mlp_ratio"])
    vit = EvaConfig(image_size=sizes["img"], patch_size=sizes["patch"], width=sizes["width"], depth=sizes["enc_layers"],
                    heads=sizes["heads"], mlp_width=hidden)
    model = DynamicTokenizer(LavitTokenizerConfig(
        vit=vit, vit_head=sizes["encoder_head_out"], merger_depth=sizes["layers"], merger_heads=sizes["heads"],
        merger_mlp_width=hidden, codebook_size=sizes["n_code"], codebook_dim=sizes["code_dim"],
        llm_width=len(weights["vit_proj.bias"])))
    assign_strictly(model, weights, KIND)
    return model.eval()


def check_codes(model: DynamicTokenizer, image: Tensor, want: dict[str, Tensor], ids: dict[str, Any]) -> None:
    features = model.patch_features(image)
    assert_close(features, want["encoder"][:, 1:], 1e-5, 1e-4, "encoder")
    selection = model.select(features, noise=want["gumbel_noise"])
    assert_close(selection.log_probs_BN2, want["log_probs"], 1e-5, 1e-4, "log_probs")
    assert_same(selection.keep_BN.tolist(), want["keep"].tolist(), "keep")
    check_first_block(model, features, selection.keep_BN, want)
    assert_close(model.merge(features, selection.keep_BN), want["merger"], 1e-5, 1e-4, "merger")
    rows, counts = model.rows(image, noise=want["gumbel_noise"])
    assert_same(counts.tolist(), want["token_nums"].tolist(), "token_nums")
    assert_close(model.to_codebook(rows), want["to_quantizer"], 1e-5, 1e-4, "to_quantizer")
    assert_close(model.quantize_rows(rows)[1], want["quantized"], 1e-6, 0, "quantized")
    codes = model.encode(image, noise=want["gumbel_noise"])
    placed = [[FIRST_CODE + code for code in one.tolist()] for one in codes]
    assert_same(placed, ids["token_ids"], "token ids")
    assert_same([[START, *one, END] for one in placed], ids["token_ids_special"], "token ids with markers")
    assert_close(model.embed_codes(torch.cat(codes)), want["quantized"], 0, 0, "rows of the codes")


def check_first_block(model: DynamicTokenizer, features: Tensor, keep: Tensor, want: dict[str, Tensor]) -> None:
    merger = model.causal_encoder
    source, causal, dropped = merger.ln_vision(features), causal_mask(keep), dropped_mask(keep)
    assert_close(source, want["merger_ln_vision"], 1e-5, 1e-4, "merger_ln_vision")
    block = merger.blocks[0]
    own = block.token_causal_attn(block.norm0(features), causal)
    assert_close(own, want["merger_block0_causal_attn"], 1e-5, 1e-4, "merger_block0_causal_attn")
    cross = block.token_cross_attn(block.norm1(features + own), source, dropped)
    assert_close(cross, want["merger_block0_cross_attn"], 1e-5, 1e-4, "merger_block0_cross_attn")
    assert_close(block(features, source, causal, dropped), want["merger_block0"], 1e-5, 1e-4, "merger_block0")


def check_continuous(model: DynamicTokenizer, image: Tensor, want: dict[str, Tensor], counts: list[int]) -> None:
    features = model.patch_features(image)
    keep = model.select(features, noise=want["gumbel_noise"]).keep_BN
    assert_same(keep.tolist(), want["keep"].tolist(), "features.keep")
    assert_close(model.merge(features, keep), want["merger"], 1e-5, 1e-4, "features.merger")
    rows = model.continuous(image, noise=want["gumbel_noise"])
    assert_same([len(one) for one in rows], counts, "features: rows of each picture")
    for number, one in enumerate(rows):
        recorded = want[f"{number}.first_64_columns"]
        assert_close(one[:, :recorded.shape[1]], recorded, 1e-5, 1e-4, f"features.{number}")


@torch.no_grad()
def check(folder: Path) -> None:
    outputs, image = read_tensors(folder / "outputs.safetensors"), read_tensors(folder / "inputs.safetensors")["image"]
    meta = read_json(folder / "meta.json")
    model = build(read_json(folder / "config.json"), read_tensors(folder / "weights.safetensors"))

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): value for key, value in outputs.items() if key.startswith(f"{name}.")}

    check_codes(model, image, part("tokenize"), meta)
    assert_same(meta["keep_counts"], outputs["tokenize.token_nums"].tolist(), "keep_counts")
    check_continuous(model, image, part("features"), meta["feature_counts"])
    manual, features = part("manual"), model.patch_features(image)
    assert_close(model.merge(features, manual["decisions"]), manual["merger"], 1e-5, 1e-4, "manual.merger")
    assert_close(model.token_predictor(features, manual["predictor_policy"]), manual["predictor"], 1e-5, 1e-4,
                 "manual.predictor")
