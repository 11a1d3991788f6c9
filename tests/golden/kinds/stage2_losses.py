"""Stage 2 (codebook, reconstruction, image distillation): activations, losses, every gradient, two AdamW steps.

Both decode heads. The CLIP tower that makes the target is transformers' own class with the recorded weights.
Not checked: `modules_in_train_mode` of the CLIP tower (it has no dropout).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from runner import assert_close, assert_same, read_json, read_tensors
from seed2_common import ClearGradients, Tensors, recorded_adamw, recorded_steps, tokenizer_config
from torch import nn

from seed_multimodal.seed.training import Stage2Model, Stage2Output, Stage2Weights
from seed_multimodal.weights import assign_strictly

KIND = "stage2_losses"
CODEBOOK = "quantize.embedding.weight"


def build(sizes: dict[str, Any], weights: Tensors) -> Stage2Model:
    config = tokenizer_config({**sizes, "decode_blocks_heads": sizes["decode_heads"]},
                              sizes["reverse_qformer_layers"] or 4)
    codebook = torch.full((config.codebook_size, config.codebook_dim), sizes["codebook_far_value"])
    codebook[: sizes["codebook_rows_near"]] = weights.pop(f"{CODEBOOK}.near")
    weights[CODEBOOK] = codebook
    factors = sizes["loss_weights"]
    model = Stage2Model(config, clip_model=_clip(sizes["clip_vision"]), weights=Stage2Weights(
        factors["embed"], factors["recon_s"], factors["distil_image"]))
    assign_strictly(model, weights, "the fixture", allow_unexpected=["clip_model.*.position_ids"])
    return model.train()


def _clip(sizes: dict[str, Any]) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes))


def compare(output: Stage2Output, want: Tensors) -> None:
    names = {"query_up": "query_output_up", "tokens": "blocks_image_out", "embeds": "image_embeds",
             "loss_distil": "loss_distil_image", "target": "clip_image_embeds"}
    assert torch.equal(output.indices, want["indices"]), "indices differ"
    for field in dataclasses.fields(output):
        name = names.get(field.name, field.name)
        if name in want and name != "indices":
            value = getattr(output, field.name).detach()
            assert_close(value, want[name].reshape(value.shape), 1e-5, 1e-4, name)


def compare_gradients(model: Stage2Model, want: Tensors, near: int, norms: dict[str, float | None]) -> None:
    parameters = dict(model.named_parameters())
    for name in (n for n in want if n.startswith("grad.")):
        own = name.removeprefix("grad.")
        gradient = parameters[own].grad
        assert_close(gradient[:near] if own == CODEBOOK else gradient, want[name], 1e-6, 1e-3, name)
    for name, norm in norms.items():
        gradient = parameters[name].grad
        if norm is None:
            assert gradient is None, f"{name} has a gradient"
        else:
            assert_close(gradient.norm(), norm, 1e-5, 1e-3, f"gradient norm of {name}")


def check_steps(model: Stage2Model, image: torch.Tensor, want: Tensors, meta: dict[str, Any], near: int,
                decay: float) -> None:
    steps, clear = recorded_adamw(model, meta["optimizer"]), ClearGradients()
    assert decay in [group["weight_decay"] for group in steps.param_groups]
    parameters = dict(model.named_parameters())
    comparable = recorded_steps(want, model.state_dict())
    for number, loss in enumerate(meta["losses_before_each_step"], start=1):
        steps.zero_grad()
        output = model(image)
        output.loss.backward()
        assert_close(output.loss.detach(), loss, 1e-4, 1e-4, f"loss before step {number}")
        clear.note(model, zero_counts=True)
        steps.step()
        if number not in comparable:
            continue
        for name in (n for n in want if n.startswith(f"step{number}.")):
            own = name.removeprefix(f"step{number}.")
            if own.startswith("codebook_row_"):
                row = parameters[CODEBOOK].detach()[int(own.removeprefix("codebook_row_"))]
                assert_close(row, want[name], 2e-5, 1e-5, name)
                continue
            rows = slice(0, near) if own == CODEBOOK else slice(None)
            mask = clear.masks[own][rows]
            assert_close(parameters[own].detach()[rows][mask], want[name][mask], 2e-5, 1e-4, name)
    with torch.no_grad():
        assert_close(model(image).loss, meta["loss_after_two_steps"], 1e-3, 1e-3, "loss after two steps")


@torch.no_grad()
def check_helpers(model: Stage2Model, image: torch.Tensor, want: Tensors) -> None:
    tokenizer = model.to_tokenizer()
    if "get_discrete_tokens" in want:
        assert torch.equal(tokenizer.encode(image), want["get_discrete_tokens"]), "get_discrete_tokens"
    if "get_discrete_features_for_decode" in want:
        features = tokenizer.decode(tokenizer.encode(image))
        assert_close(features, want["get_discrete_features_for_decode"], 1e-4, 1e-4, "decoded features")
    if "forward_image.0" in want:
        quant, _, _ = tokenizer.quantize(tokenizer.pre_quant(image))
        rebuilt = tokenizer.rebuild_queries(tokenizer.decode_task_layer(quant))
        assert_close(rebuilt, want["forward_image.0"], 1e-5, 1e-4, "forward_image.0")
        vision = tokenizer.ln_vision(tokenizer.visual_encoder(image))
        assert_close(vision, want["forward_image.1"], 1e-5, 1e-4, "forward_image.1")


def check(folder: Path) -> None:
    sizes, meta = read_json(folder / "config.json"), read_json(folder / "meta.json")
    weights, given, want = (read_tensors(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    model, image, near = build(sizes, weights), given["image"], sizes["codebook_rows_near"]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert_same(sorted(trainable), sorted(meta["trainable"]), "trainable parameters")
    for name, training in meta["modules_in_train_mode"].items():
        assert_same(getattr(model, name).training, training, f"train mode of {name}")
    check_helpers(model, image, want)
    output = model(image)
    output.loss.backward()
    compare(output, want)
    rows = output.indices.unique().tolist()
    assert_same(rows, meta["codebook_rows_with_gradient"], "codebook rows with gradient")
    compare_gradients(model, want, near, meta["grad_norms"])
    check_steps(model, image, want, meta, near, sizes["weight_decay"])
