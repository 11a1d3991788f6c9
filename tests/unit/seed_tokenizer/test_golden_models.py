"""Models that LAVIS builds give the originals' recorded losses (gradients: tests/golden)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

DATA = Path(__file__).resolve().parents[2] / "golden" / "data"


def read(kind: str) -> tuple[dict[str, Any], dict[str, Any], Any, Any, Any]:
    from runner import read_json, read_tensors

    folder = DATA / kind
    tensors = (read_tensors(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    return read_json(folder / "config.json"), read_json(folder / "meta.json"), *tensors


def sizes(vit: Any, qformer: Any) -> dict[str, Any]:
    plain = {"vit": dataclasses.asdict(vit), "qformer": dataclasses.asdict(qformer), "load_pretrained": False,
             "vit_precision": "fp32", "image_size": vit.image_size}
    for key in ("image_size", "grad_checkpoint"):
        plain["vit"].pop(key)
    plain["cross_attention_freq"] = plain["qformer"].pop("cross_attention_freq")
    return plain


def model_of(config: dict[str, Any]) -> Any:
    from omegaconf import OmegaConf
    from seed_lavis import register

    register()
    from seed_lavis.compat import registry

    arch = config.pop("arch")
    return registry.get_model_class(arch).from_config(OmegaConf.create(config)).place(torch.device("cpu")).train()


def test_from_config_gives_the_recorded_losses_of_stage1():
    from kinds.seed_tokenizers import qformer_config, vit_config
    from runner import assert_close

    from seed_multimodal.weights import assign_strictly

    given, meta, weights, inputs, want = read("stage1_losses")
    model = model_of({
        "arch": "blip2_casual", **sizes(vit_config(given["vit"]), qformer_config(given["bert"],
                                                                                 given["cross_attention_freq"])),
        "num_query_token": given["num_query_token"], "embed_dim": given["embed_dim"], "temperature": given["temp"],
        "label_smoothing": given["label_smoothing"], "text_tokenizer": None,
        "vocab_size": weights["Qformer.bert.embeddings.word_embeddings.weight"].shape[0]})
    assign_strictly(model, weights, "the fixture")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == meta["trainable"]
    output = model(inputs)  # image, input_ids, attention_mask
    assert_close(output["loss"].detach(), want["nodist.loss"], 1e-5, 1e-4, "loss")
    assert_close(output["loss_itc"], want["nodist.loss_itc"], 1e-5, 1e-4, "loss_itc")


@pytest.mark.slow
def test_from_config_gives_the_recorded_losses_of_stage2(tmp_path):
    from kinds.seed_tokenizers import seed2_config
    from runner import assert_close
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from seed_multimodal.weights import assign_strictly

    given, meta, weights, inputs, want = read("stage2_losses")
    CLIPVisionModelWithProjection(CLIPVisionConfig(**given["clip_vision"])).save_pretrained(tmp_path)
    config = seed2_config({**given, "decode_blocks_heads": given["decode_heads"]}, 4)
    model = model_of({
        "arch": "blip2_codebook_all_image", **sizes(config.vit, config.qformer), "clip_model": str(tmp_path),
        "clip_precision": "fp32", "n_embed": config.codebook_size, "codebook_embed_dim": config.codebook_dim,
        "decode_depth": config.decode_depth, "decode_heads": config.decode_heads, "num_query_token": config.num_query,
        "image_features_dim": config.image_features_dim, "use_qformer_image": config.use_qformer_image,
        "reverse_depth": given["reverse_qformer_layers"] or 4, "loss_weights": given["loss_weights"]})
    near = given["codebook_rows_near"]
    codebook = torch.full((config.codebook_size, config.codebook_dim), given["codebook_far_value"])
    codebook[:near] = weights.pop("quantize.embedding.weight.near")
    assign_strictly(model, {**weights, "quantize.embedding.weight": codebook}, "the fixture",
                    allow_unexpected=["clip_model.*.position_ids"])
    assert sorted(name for name, p in model.named_parameters() if p.requires_grad) == sorted(meta["trainable"])
    output = model({"image": inputs["image"], "caption": [""] * len(inputs["image"])})
    assert torch.equal(model.codes, want["indices"])
    for name in ("loss", "loss_embed", "loss_recon_s", "loss_distil_image"):
        assert_close(output[name].detach(), want[name], 1e-5, 1e-4, name)
