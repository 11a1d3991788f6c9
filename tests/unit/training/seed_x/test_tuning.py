"""SEED-X's instruction tuning: checkpoints, losses of packed rows, evaluation, settings."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import tuning_parts as parts
from repository import NANO
from tensors import equal

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.models.seed_x.modeling import load_agent
from seed_multimodal.models.seed_x.train_agent import TuningTask, read_agent, read_encoder
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.weights import load_state_dict


def task_of(config: dict[str, Any]) -> TuningTask:
    return TuningTask(TuningTask.read(config), ProcessGroup(), torch.device("cpu"))


@pytest.mark.process
@pytest.mark.slow
def test_train_saves_an_agent(config_of, tmp_path):
    # Trained tensors by their original names; an agent is loaded from them, and a new run starts
    # from them.
    trainer = {"precision": "bf16", "dataloader_num_workers": 1, "max_steps": 2}
    TuningTask.train(config_of(tmp_path / "out", lora=True, trainer=trainer))
    folder = tmp_path / "out" / "checkpoint-2"
    saved = load_state_dict(folder / "model.safetensors")
    stem = "llm.base_model.model.model."
    assert {
        "patch_pos_embed",
        "input_resampler.query",
        "output_resampler.attn.in_proj_weight",
        f"{stem}embed_tokens.weight",
        "llm.base_model.model.lm_head.weight",
        f"{stem}layers.1.self_attn.q_proj.lora_A.default.weight",
        f"{stem}layers.0.input_layernorm.modules_to_save.default.weight",
    } <= saved.keys()
    not_saved = (".base_layer.", "original_module", "resampler.pos_embed")
    assert not [name for name in saved if any(part in name for part in not_saved)]
    about = json.loads((folder / "agent.json").read_text())
    assert parts.LORA.items() <= about["lora"].items()
    assert about["input_resampler"]["embed_dim"] == 48

    start = {"agent": {"path": str(folder)}, "lora": True}
    task = task_of(config_of(tmp_path / "new", **start))
    task.prepare()
    assert equal(task.weights(), saved)
    load_agent(task.module, folder)
    other = {"lora": {**parts.LORA, "lora_alpha": 16}}
    with pytest.raises(CheckpointError, match="lora_alpha"):
        task_of(config_of(tmp_path / "no", **start, model=other)).prepare()
    # The sizes of the resamplers are those of the checkpoint.
    heads = {**parts.RESAMPLERS["output_resampler"], "num_heads": 2}
    agent = read_agent({**parts.RESAMPLERS, "path": str(folder), "output_resampler": heads})
    assert agent.output_resampler.num_heads == 4


def test_losses_of_packed_rows_equal_those_of_their_sequences(config_of, parts_dir: Path, tmp_path):
    # A packed row's loss is the mean over its sequences, weighted by their learned tokens and
    # generated images.
    task = task_of(config_of(tmp_path, data=parts.data_of(parts_dir, packing=True)))
    task.prepare()
    batch = next(task.data)
    assert batch.views is not None and batch.sequences > 3 and 0 < int(batch.views.is_target.sum())
    inputs = task.inputs(batch)
    sums = [0.0, 0.0]
    counts = [0.0, 0.0]
    first_view = 0
    tokens = {
        name: inputs[name].flatten()
        for name in ("input_ids", "labels", "ids_cmp_mask", "ids_gen_mask")
    }
    images = {
        name: inputs[name]
        for name in ("image_embeds", "embeds_gen_mask", "embeds_cmp_mask", "patch_positions")
    }
    starts = [
        *(batch.position_ids.flatten() == 0).nonzero().flatten().tolist(),
        batch.position_ids.numel(),
    ]
    with torch.no_grad():
        packed = task.module(**inputs)
        for start, end in zip(starts, starts[1:], strict=False):
            sequence = {name: value[None, start:end] for name, value in tokens.items()}
            last_view = (
                first_view + int((sequence["ids_cmp_mask"] | sequence["ids_gen_mask"]).sum()) // 4
            )
            losses = task.module(
                **sequence,
                attention_mask=None,
                **{name: value[first_view:last_view] for name, value in images.items()},
            )
            first_view = last_view
            weights = [
                int((sequence["labels"][:, 1:] != -100).sum()),
                int(sequence["ids_gen_mask"].sum()) // 4,
            ]
            for kind, name in enumerate(("lm_loss", "rec_loss")):
                sums[kind] += weights[kind] * float(losses[name])
                counts[kind] += weights[kind]
    assert first_view == len(inputs["image_embeds"])
    assert [float(packed["lm_loss"]), float(packed["rec_loss"])] == pytest.approx(
        [total / count for total, count in zip(sums, counts, strict=True)], rel=1e-5
    )


@pytest.mark.slow
def test_evaluation_has_the_losses_of_the_checkpoint(config_of, parts_dir: Path, tmp_path):
    # Without dropout; text by its tokens, images by their number.
    eval_data = parts.data_of(parts_dir, seed=9)
    trainer = {"max_steps": 2, "eval_steps": 2, "eval_batches": 3}
    options = {"lora": True, "eval_data": eval_data, "trainer": trainer}
    record = TuningTask.train(config_of(tmp_path / "out", **options))
    task = task_of(config_of(tmp_path / "x", lora=True, data=eval_data))
    task.prepare()
    task.load_weights(tmp_path / "out" / "checkpoint-2")
    task.module.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in itertools.islice(task.data, 3):
        with torch.no_grad():
            losses = task.module(**task.inputs(batch))
        images = 0 if batch.views is None else int(batch.views.is_target.sum())
        text = losses["lm_loss"] * batch.learned
        sums += torch.tensor([text, batch.learned, losses["rec_loss"] * images, images])
    text, image = float(sums[0] / sums[1]), float(sums[2] / sums[3])
    evaluation = record["evaluation"]
    values = [evaluation[f"eval_{name}"] for name in ("text_loss", "image_loss", "loss")]
    assert values == pytest.approx([text, image, text + 6 * image], rel=1e-5)


def test_original_agent_and_encoder_files_are_read():
    # The YAML files of the original, key by key.
    resampler = "src.models.tokenizer.qwen_visual.Resampler"
    sizes = {"_target_": resampler, "grid_size": 8, "num_heads": 32}
    agent = read_agent(
        {
            "_target_": "src.models.mllm.seed_x.ContinuousLVLM.from_pretrained",
            "input_resampler": {**sizes, "embed_dim": 5120, "kv_dim": 4096},
            "output_resampler": {**sizes, "embed_dim": 4096, "kv_dim": 5120},
            "add_patch_pos": True,
            "vit_down": True,
            "mse": True,
            "lm_loss_scale": 1.0,
            "rec_loss_scale": 6.0,
            "pretrained_model_path": "pretrained/seed_x/agent/pytorch_model.bin",
        }
    )
    assert agent == read_agent({"path": "pretrained/seed_x/agent/pytorch_model.bin"})
    encoder = read_encoder(
        {
            "_target_": "src.models.tokenizer.qwen_visual.VisionTransformerWithAttnPool"
            ".from_pretrained",
            "heads": 16,
            "image_size": 448,
            'image_start_id"': 151857,  # the original's misspelling
            "layers": 48,
            "mlp_ratio": 4.9231,
            "output_dim": 4096,
            "patch_size": 14,
            "width": 1664,
            "pretrained_model_path": "pretrained/QwenViT/qwen_vit_G.pt",
        }
    )
    assert encoder.path.endswith("qwen_vit_G.pt")
    assert encoder.sizes is not None and encoder.sizes.layers == 48


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {
                "agent": {
                    "input_resampler": {**parts.RESAMPLERS["input_resampler"], "embed_dim": 40}
                }
            },
            "embed_dim",
        ),
        ({"agent": {"losses": {"rec_los_scale": 1}}}, "rec_loss_scale"),
        ({"trainer": {"image_weight": 2.0}}, "agent.losses"),
        (
            {"tokenizer": {"pretrained_model_name_or_path": str(NANO / "seed_tokenizer")}},
            "SEED-X",
        ),
    ],
)
def test_prepare_with_parts_that_do_not_fit(config_of, tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        task_of(config_of(tmp_path, **changes)).prepare()


def test_prepare_with_images_of_another_size(config_of, tmp_path):
    # The error names the source whose option is missing.
    config = config_of(tmp_path)
    del config["data"]["sources"][3]["options"]["base_resolution"]
    with pytest.raises(ConfigError, match="source chat"):
        task_of(config).prepare()
