"""SEED-X's instruction tuning: checkpoints, losses of packed rows, evaluation, settings."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import tuning_parts as parts
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
    """Trained tensors by their original names.

    An agent is loaded from them, and a new run starts from them.
    """
    config = config_of(
        tmp_path / "out",
        lora=True,
        trainer={"precision": "bf16", "dataloader_num_workers": 1, "max_steps": 2},
    )
    TuningTask.train(config)
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
        f"{stem}norm.modules_to_save.default.weight",
    } <= saved.keys()
    assert not any(
        ".base_layer." in name or "original_module" in name or name.endswith("resampler.pos_embed")
        for name in saved
    )
    about = json.loads((folder / "agent.json").read_text())
    assert (
        parts.LORA.items() <= about["lora"].items() and "q_proj" in about["lora"]["target_modules"]
    )
    assert (
        about["llm"] is None
        and about["input_resampler"]["embed_dim"] == 48
        and about["train_embeddings"]
    )
    start = {"agent": {"path": str(folder)}}
    task = task_of(config_of(tmp_path / "new", lora=True, **start))
    task.prepare()
    assert equal(task.weights(), saved)
    load_agent(task.module, folder)
    with pytest.raises(CheckpointError, match="agent.json: lora_alpha is 8, but the model"):
        task_of(
            config_of(
                tmp_path / "no",
                lora=True,
                **start,
                model={"lora": {**parts.LORA, "lora_alpha": 16}},
            )
        ).prepare()
    heads = {**parts.RESAMPLERS["output_resampler"], "num_heads": 2}
    agent = read_agent({**parts.RESAMPLERS, "path": str(folder), "output_resampler": heads})
    assert agent.output_resampler.num_heads == 4  # as saved
    with pytest.raises(CheckpointError, match="optimizer .*agent.path. in a new folder"):
        TuningTask.train(config_of(tmp_path / "out", optim={"name": "muon"}, lora=True))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_train_on_a_quantised_base(config_of, tmp_path, quantization):
    config = config_of(
        tmp_path / "out",
        lora=True,
        model={"quantization": quantization},
        trainer={"max_steps": 3},
    )
    record = TuningTask.train(config)
    assert record["steps"] == 3 and len(set(parts.losses(tmp_path / "out"))) == 3
    assert (tmp_path / "out" / "checkpoint-3" / "agent.json").is_file()


def test_losses_of_packed_rows_equal_those_of_their_sequences(config_of, parts_dir: Path, tmp_path):
    """A packed row's loss is the mean over its sequences, weighted by their learned tokens and
    generated images.
    """
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
def test_train_with_evaluation(config_of, parts_dir: Path, tmp_path):
    """Evaluation losses are those of the checkpoint's weights without dropout, and leave training
    unchanged.
    """

    def train(name: str, **changes: Any) -> list[dict[str, Any]]:
        settings = {
            "max_steps": 2,
            "save_steps": 1,
            "eval_batches": 3,
            **changes.pop("trainer", {}),
        }
        TuningTask.train(config_of(tmp_path / name, lora=True, trainer=settings, **changes))
        return [
            json.loads(line)
            for line in (tmp_path / name / "train.log.jsonl").read_text().splitlines()
        ]

    eval_data = parts.data_of(parts_dir, seed=9)
    plain = train("plain")
    log = train("evaluated", eval_data=eval_data, trainer={"eval_steps": 1})
    assert [line["loss"] for line in plain if "loss" in line] == [
        line["loss"] for line in log if "loss" in line
    ]
    evaluations = [line for line in log if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [1, 2]
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    task = task_of(config_of(tmp_path / "x", lora=True, data=eval_data))
    task.prepare()
    batches = list(itertools.islice(task.data, 3))
    for line in evaluations:
        task.load_weights(tmp_path / "evaluated" / f"checkpoint-{line['step']}")
        task.module.eval()
        sums = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            with torch.no_grad():
                losses = task.module(**task.inputs(batch))
            images = 0 if batch.views is None else int(batch.views.is_target.sum())
            text = losses["lm_loss"] * batch.learned
            image = losses["rec_loss"] * images
            sums += torch.tensor([text, batch.learned, image, images])
        text = float(sums[0] / sums[1])
        image = float(sums[2] / sums[3])
        assert [
            line["eval_text_loss"],
            line["eval_image_loss"],
            line["eval_loss"],
        ] == pytest.approx([text, image, text + 6 * image], rel=1e-5)


def test_learning_rate_changes_once_per_step(config_of, tmp_path):
    """With `schedule_per_micro_batch` it changes at every micro-step, as in the original loop."""
    rates = {}
    for legacy in (False, True):
        task = task_of(
            config_of(
                tmp_path,
                optim={"schedule_per_micro_batch": legacy, "warmup_ratio": 0.0},
                trainer={"gradient_accumulation_steps": 2, "max_steps": 100},
            )
        )
        rates[legacy] = [task.learning_rate(step) for step in (0, 49, 99)]
    assert rates[False][0] > rates[False][1] > rates[False][2] == pytest.approx(1e-3, rel=0.01)
    assert rates[True][1] == pytest.approx(1e-3, rel=0.01) and rates[True][2] > 0.95e-2


def test_original_agent_and_encoder_files_are_read():
    agent = read_agent(
        {
            "_target_": "src.models.mllm.seed_x.ContinuousLVLM.from_pretrained",
            "input_resampler": {
                "_target_": "src.models.tokenizer.qwen_visual.Resampler",
                "grid_size": 8,
                "embed_dim": 5120,
                "num_heads": 32,
                "kv_dim": 4096,
            },
            "output_resampler": {
                "_target_": "src.models.tokenizer.qwen_visual.Resampler",
                "grid_size": 8,
                "embed_dim": 4096,
                "num_heads": 32,
                "kv_dim": 5120,
            },
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
            'image_start_id"': 151857,
            "layers": 48,
            "mlp_ratio": 4.9231,
            "output_dim": 4096,
            "patch_size": 14,
            "width": 1664,
            "pretrained_model_path": "pretrained/QwenViT/qwen_vit_G.pt",
        }
    )
    assert (
        encoder.path.endswith("qwen_vit_G.pt")
        and encoder.sizes is not None
        and encoder.sizes.layers == 48
    )
    with pytest.raises(ConfigError, match="did you mean"):
        read_agent({"losses": {"rec_los_scale": 1}})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {
                "agent": {
                    "input_resampler": {
                        "embed_dim": 40,
                        "kv_dim": 16,
                        "grid_size": 2,
                        "num_heads": 4,
                    }
                }
            },
            "embed_dim is 40, but must be 48: the language model",
        ),
        ({"trainer": {"image_weight": 2.0}}, "are weighted by agent.losses"),
        (
            {"tokenizer": {"pretrained_model_name_or_path": "pretrained/nano/seed_tokenizer"}},
            "not SEED-X's",
        ),
    ],
)
def test_prepare_with_parts_that_do_not_fit(config_of, tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        task_of(config_of(tmp_path, **changes)).prepare()


def test_prepare_with_images_of_another_size(config_of, tmp_path):
    config = config_of(tmp_path)
    del config["data"]["sources"][3]["options"]["base_resolution"]
    with pytest.raises(
        ConfigError, match="^data: base_resolution of source chat is 448, but the vision encoder"
    ):
        task_of(config).prepare()
