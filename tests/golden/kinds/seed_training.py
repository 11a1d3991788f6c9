"""SEED's training: activations, losses, logits, every gradient and two AdamW steps of both stages.

Stage 1 without a process group and in two real processes over gloo; stage 2 with both decode heads.
Not compared: the original's two crashes in stage 1 (no process group, batch of one: both work
here), its text tokenizer (the inputs are ids), `modules_in_train_mode` of the CLIP encoder (it has
no dropout).
"""

import copy
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from kinds.seed_tokenizers import qformer_config, seed2_config, vit_config
from runner import CLOSE, EXACT, Recording, Tensors, assert_close, assert_gradients, assert_same
from warm_processes import PYTHON

from seed_multimodal.models.seed.configuration import Seed2Config
from seed_multimodal.recipes.seed.losses import (
    Stage1Model,
    Stage1Output,
    Stage1TrainingOptions,
    Stage2Model,
    Stage2Weights,
)
from seed_multimodal.state_dicts import assign_strictly

CODEBOOK = "quantize.embedding.weight"
# Fields of Stage2Output → recorded names.
STAGE2_NAMES = {
    "query_up": "query_output_up",
    "tokens": "blocks_image_out",
    "embeds": "image_embeds",
    "loss_distil": "loss_distil_image",
    "target": "clip_image_embeds",
}


def check_steps(model, loss_of: Callable[[], torch.Tensor], want: Tensors, meta):
    """Two AdamW steps: losses, and the parameters after both.

    Recordings hold references to the parameters: `step1.*` is what `step2.*` is, and both may be
    the start, where only losses are compared.
    """
    recorded = meta["optimizer"]
    parameters = dict(model.named_parameters())
    settings = {**recorded, **recorded.get("defaults", {})}
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [parameters[name] for name in group["params"]],
                "weight_decay": group["weight_decay"],
            }
            for group in recorded["groups"]
        ],
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
    )
    # Recorded name → parameter, and the rows that are recorded: of the codebook only some.
    second = dict(want.part("step2").items())
    places = {name: (name, ...) for name in second}
    for name in second:
        if name == CODEBOOK:
            places[name] = CODEBOOK, slice(len(second[name]))
        elif name.startswith("codebook_row_"):
            places[name] = CODEBOOK, int(name.removeprefix("codebook_row_"))
    is_start = all(
        torch.equal(parameters[name], second[name]) for name, rows in places.values() if rows is ...
    )
    clear = dict[str, torch.Tensor]()
    for step, loss in enumerate(meta["losses_before_each_step"], start=1):
        model.zero_grad()
        actual = loss_of()
        actual.backward()
        assert_close(actual, loss, 1e-4, 1e-4, f"loss before step {step}")
        # AdamW scales tiny gradients to a full step: those entries are not compared.
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                large = (parameter.grad.abs() > 1e-6) | (parameter.grad == 0)
                clear[name] = clear.get(name, True) & large
        optimizer.step()
    for recorded_name, (name, rows) in places.items():
        if not is_start:
            mask = clear[name][rows]
            value = second[recorded_name][mask]
            assert_close(parameters[name][rows][mask], value, 2e-5, 1e-5, f"step2.{recorded_name}")
    assert_close(loss_of(), meta["loss_after_two_steps"], 1e-3, 1e-3, "loss after two steps")


# ---- stage 1


def build_stage1(sizes, weights: Tensors, gather_gradient: bool | None) -> Stage1Model:
    config = Seed2Config(
        vit=vit_config(sizes["vit"]),
        qformer=qformer_config(sizes["bert"], sizes["cross_attention_freq"]),
        num_query=sizes["num_query_token"],
    )
    n_words = weights["Qformer.bert.embeddings.word_embeddings.weight"].shape[0]
    model = Stage1Model(
        config,
        options=Stage1TrainingOptions(
            embed_dim=sizes["embed_dim"],
            temperature=sizes["temp"],
            label_smoothing=sizes["label_smoothing"],
            gather_gradient=gather_gradient,
        ),
        vocab_size=n_words,
    )
    assign_strictly(model, weights, "the fixture")
    return model.train()


def run(model: Stage1Model, inputs: Tensors) -> Stage1Output:
    return model(inputs["image"], inputs["input_ids"], inputs["attention_mask"])


def compare(
    model: Stage1Model, inputs: Tensors, want: Tensors, group: str, norms: dict[str, float | None]
):
    output = run(model, inputs)
    output.loss.backward()
    want.compare(
        f"{group}.",
        loss=output.loss,
        loss_itc=output.loss_itc,
        sim_i2t=output.sim_i2t,
        sim_t2i=output.sim_t2i,
        query_feats_normalized=output.query_feats,
        text_feat=output.text_feats,
    )
    assert_same(output.targets.tolist(), want[f"{group}.targets"].tolist(), f"{group}.targets")
    assert_gradients(model, want.part(f"{group}.grad"), norms)


def worker(rank, world, folder, rendezvous: str):
    """One of `world` processes on its share of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        recording = Recording(folder)
        sizes, weights, inputs, want = recording.case()
        local = {name: value.chunk(world)[rank] for name, value in inputs.items()}
        norms = recording.meta[f"grad_norms_world{world}_rank{rank}"]
        compare(build_stage1(sizes, weights, None), local, want, f"world{world}.rank{rank}", norms)
    finally:
        dist.destroy_process_group()


def check_stage1(recording):
    (sizes, weights, inputs, want) = recording.case()
    meta = recording.meta
    model = build_stage1(sizes, weights, None)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert_same(trainable, meta["trainable"], "trainable parameters")
    compare(model, inputs, want, "nodist", meta["grad_norms_nodist"])
    # One process of a group does not send gradients through the gathered features.
    detached = build_stage1(sizes, weights, False)
    compare(detached, inputs, want, "world1", meta["grad_norms_world1"])
    check_steps(detached, lambda: run(detached, inputs).loss, want, meta)
    # Several processes: the captions of the others are wrong answers for an image, too.
    world = len({name.split(".")[1] for name in want if name.startswith("world2.")})
    if world:
        with tempfile.TemporaryDirectory() as work:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            command = [
                PYTHON,
                __file__,
                str(world),
                str(recording.folder.absolute()),
                f"{work}/rendezvous",
            ]
            processes = [
                subprocess.Popen([*command, str(rank)], env=environment) for rank in range(world)
            ]
            assert [process.wait(150) for process in processes] == [0] * world, (
                "stage 1 in several processes"
            )


# ---- stage 2


def build_stage2(sizes, weights: Tensors) -> Stage2Model:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    depth = sizes["reverse_qformer_layers"] or 4
    config = seed2_config(sizes, sizes["decode_heads"], depth)
    codebook = torch.full((config.codebook_size, config.codebook_dim), sizes["codebook_far_value"])
    codebook[: sizes["codebook_rows_near"]] = weights.pop(f"{CODEBOOK}.near")
    weights[CODEBOOK] = codebook
    factors = sizes["loss_weights"]
    model = Stage2Model(
        config,
        clip_model=CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes["clip_vision"])),
        weights=Stage2Weights(factors["embed"], factors["recon_s"], factors["distil_image"]),
    )
    assign_strictly(model, weights, "the fixture", allow_unexpected=["clip_model.*.position_ids"])
    return model.train()


@torch.no_grad()
def check_helpers(model: Stage2Model, image: torch.Tensor, want: Tensors):
    """The tokenizer that the training holds, in evaluation mode."""
    # A copy, as the run goes on in training mode.
    tokenizer = copy.deepcopy(model).eval()
    codes = tokenizer.encode(image)
    quant, _, _ = tokenizer.quantize(tokenizer.pre_quant(image))
    recorded = {
        "get_discrete_tokens": (codes, EXACT),
        "get_discrete_features_for_decode": (tokenizer.decode(codes), (1e-4, 1e-4)),
        "forward_image.0": (
            tokenizer.rebuild_queries(tokenizer.decode_task_layer(quant)),
            CLOSE,
        ),
        "forward_image.1": (tokenizer.ln_vision(tokenizer.visual_encoder(image)), CLOSE),
    }
    for name in recorded.keys() & want.keys():
        want.close(name, *recorded[name])


def check_stage2(recording):
    (sizes, weights, inputs, want) = recording.case()
    meta = recording.meta
    model = build_stage2(sizes, weights)
    image = inputs["image"]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert_same(sorted(trainable), sorted(meta["trainable"]), "trainable parameters")
    for name, training in meta["modules_in_train_mode"].items():
        assert_same(getattr(model, name).training, training, f"train mode of {name}")
    check_helpers(model, image, want)

    # Activations and losses: recorded names, or those of the output's fields.
    output = model(image)
    output.loss.backward()
    for field in dataclasses.fields(output):
        name = STAGE2_NAMES.get(field.name, field.name)
        if name in want:
            value = getattr(output, field.name)
            want.close(name, value.reshape(want[name].shape), EXACT if name == "indices" else CLOSE)
    # Only codes that were selected are trained.
    rows = output.indices.unique().tolist()
    assert_same(rows, meta["codebook_rows_with_gradient"], "codebook rows with gradient")
    assert_gradients(model, want.part("grad"), meta["grad_norms"])
    check_steps(model, lambda: model(image).loss, want, meta)


KINDS = {"stage1_losses": check_stage1, "stage2_losses": check_stage2}
# The processes of `worker` read the first; the others are what `step2` holds.
UNREAD = {"stage1_losses": ("world2.*", "step1.*"), "stage2_losses": ("step1.*",)}

if __name__ == "__main__":
    worker(int(sys.argv[4]), int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
