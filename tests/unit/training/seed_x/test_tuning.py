"""SEED-X's instruction tuning on the one loop: it learns, resumes to the last bit, and its checkpoints are agents."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.seed_x.modeling import load_agent
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.seed_x.tuning import TuningTask, read_agent, read_encoder
from seed_multimodal.weights import load_state_dict

CASES: dict[str, dict[str, Any]] = {
    "packed": {"packing": True},
    "lora": {"lora": True, "trainer": {"precision": "bf16", "dataloader_num_workers": 1}},
}


def configured(parts: ModuleType, home: Path, output: Path, case: str, **trainer: Any) -> dict[str, Any]:
    given = CASES[case]
    data = parts.data_of(home, packing=given.get("packing", False))
    return parts.config_of(home, output, data=data, lora=given.get("lora", False),
                           trainer={**given.get("trainer", {}), "save_steps": 4, **trainer})


@pytest.mark.process
@pytest.mark.slow
def test_a_checkpoint_is_an_agent(parts: ModuleType, home: Path, tmp_path: Path) -> None:
    """What is trained next to a LoRA, by the original names; the loader of agents takes it, a new run starts from
    it."""
    config = configured(parts, home, tmp_path / "out", "lora", max_steps=2)
    TuningTask.train(config)
    folder = tmp_path / "out" / "checkpoint-2"
    saved = load_state_dict(folder / "model.safetensors")
    stem = "llm.base_model.model.model."
    assert {"patch_pos_embed", "input_resampler.query", "output_resampler.attn.in_proj_weight",
            f"{stem}embed_tokens.weight", "llm.base_model.model.lm_head.weight",
            f"{stem}layers.1.self_attn.q_proj.lora_A.default.weight",
            f"{stem}layers.0.input_layernorm.modules_to_save.default.weight",
            f"{stem}norm.modules_to_save.default.weight"} <= saved.keys()
    assert not any(".base_layer." in name or "original_module" in name or name.endswith("resampler.pos_embed")
                   for name in saved)
    about = json.loads((folder / "agent.json").read_text())
    assert parts.LORA.items() <= about["lora"].items() and "q_proj" in about["lora"]["target_modules"]
    assert about["llm"] is None and about["input_resampler"]["embed_dim"] == 48 and about["train_embeddings"]
    run = TuningTask.read(configured(parts, home, tmp_path / "new", "lora"))
    task = TuningTask(run, ProcessGroup(), torch.device("cpu"))
    task.prepare()
    load_agent(task.module, folder)
    assert all(torch.equal(value, saved[name]) for name, value in task.weights().items())
    new = parts.config_of(home, tmp_path / "new", lora=True, agent={"path": str(folder)}, trainer={"max_steps": 2})
    TuningTask.train(new)
    assert parts.losses(tmp_path / "new")[1] < parts.losses(tmp_path / "out")[1] + 1
    given = {"agent": {"path": str(folder)}, "model": {"lora": {**parts.LORA, "lora_alpha": 16}}}
    with pytest.raises(CheckpointError, match="agent.json: lora_alpha is 8, but the model"):
        TuningTask.train(parts.config_of(home, tmp_path / "no", lora=True, **given))
    heads = {**parts.RESAMPLERS["output_resampler"], "num_heads": 2}
    found = read_agent({**parts.RESAMPLERS, "path": str(folder), "output_resampler": heads})  # stored sizes win
    assert found.output_resampler.num_heads == 4
    with pytest.raises(CheckpointError, match="optimizer .*agent.path. in a new folder"):
        TuningTask.train(parts.config_of(home, tmp_path / "out", optim={"name": "muon"}, lora=True))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_train_llm_on_a_quantised_base(parts: ModuleType, home: Path, tmp_path: Path, quantization: str) -> None:
    config = parts.config_of(home, tmp_path / "out", lora=True, model={"quantization": quantization},
                             trainer={"max_steps": 3})
    record = TuningTask.train(config)
    assert record["steps"] == 3 and len(set(parts.losses(tmp_path / "out"))) == 3
    assert (tmp_path / "out" / "checkpoint-3" / "agent.json").is_file()


def test_packed_rows_have_the_losses_of_their_sequences(parts: ModuleType, home: Path, tmp_path: Path) -> None:
    """Each sequence alone, weighted by its words and images, gives what the packed row gives: features stand at their
    words, and no sequence sees another."""
    task = TuningTask(TuningTask.read(configured(parts, home, tmp_path, "packed")), ProcessGroup(), torch.device("cpu"))
    task.prepare()
    batch = next(task.data)
    assert batch.views is not None and batch.sequences > 3 and 0 < int(batch.views.written.sum())
    with torch.no_grad():
        packed = task.module(**task.inputs(batch))
        sums, counts, view = [0.0, 0.0], [0.0, 0.0], 0
        inputs = task.inputs(batch)
        whole = {name: inputs[name].flatten() for name in ("input_ids", "labels", "ids_cmp_mask", "ids_gen_mask")}
        starts = [*(batch.position_ids.flatten() == 0).nonzero().flatten().tolist(), batch.position_ids.numel()]
        for start, end in zip(starts, starts[1:], strict=False):
            own = {name: value[None, start:end] for name, value in whole.items()}
            views = int((own["ids_cmp_mask"] | own["ids_gen_mask"]).sum()) // 4
            chosen = slice(view, view + views)
            view += views
            one = task.module(**own, attention_mask=None, image_embeds=inputs["image_embeds"][chosen],
                              embeds_gen_mask=inputs["embeds_gen_mask"][chosen],
                              embeds_cmp_mask=inputs["embeds_cmp_mask"][chosen],
                              patch_positions=inputs["patch_positions"][chosen])
            weights = [int((own["labels"][:, 1:] != -100).sum()), int(own["ids_gen_mask"].sum()) // 4]
            for place, name in enumerate(("lm_loss", "rec_loss")):
                sums[place] += weights[place] * float(one[name])
                counts[place] += weights[place]
    assert view == len(inputs["image_embeds"])
    assert [float(packed["lm_loss"]), float(packed["rec_loss"])] == pytest.approx(
        [total / count for total, count in zip(sums, counts, strict=True)], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_held_out_losses_are_measured_and_change_nothing(packing: bool, parts: ModuleType, home: Path, tmp_path: Path
                                                         ) -> None:
    """They are the losses of the first micro-batches with the weights of that step, without dropout; training goes on
    as without them."""
    data = parts.data_of(home, packing=packing)

    def run(name: str, **changes: Any) -> list[dict[str, Any]]:
        given = {"max_steps": 4, "save_steps": 2, "eval_batches": 3, **changes.pop("trainer", {})}
        TuningTask.train(parts.config_of(home, tmp_path / name, data=data, lora=True, trainer=given, **changes))
        return [json.loads(line) for line in (tmp_path / name / "train.log.jsonl").read_text().splitlines()]

    plain = run("plain")
    measured = run("measured", eval_data=parts.data_of(home, packing=packing, seed=9), trainer={"eval_steps": 2})
    assert [line["loss"] for line in plain if "loss" in line] == [line["loss"] for line in measured if "loss" in line]
    lines = [line for line in measured if "eval_loss" in line]
    assert [line["step"] for line in lines] == [2, 4] and lines[1]["eval_loss"] < lines[0]["eval_loss"]
    task = TuningTask(TuningTask.read(parts.config_of(home, tmp_path / "x", lora=True, data=parts.data_of(
        home, packing=packing, seed=9))), ProcessGroup(), torch.device("cpu"))
    task.prepare()
    batches = list(itertools.islice(task.data, 3))
    for line in lines:
        task.load_weights(tmp_path / "measured" / f"checkpoint-{line['step']}")
        task.module.eval()
        sums = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            with torch.no_grad():
                losses = task.module(**task.inputs(batch))
            drawn = 0 if batch.views is None else int(batch.views.written.sum())
            sums += torch.tensor([losses["lm_loss"] * batch.learned, batch.learned, losses["rec_loss"] * drawn, drawn])
        text, image = float(sums[0] / sums[1]), float(sums[2] / sums[3])
        assert line["eval_text_loss"] == pytest.approx(text, rel=1e-5)
        assert line["eval_image_loss"] == pytest.approx(image, rel=1e-5)
        assert line["eval_loss"] == pytest.approx(text + 6 * image, rel=1e-5)


def test_the_rate_moves_once_a_step(parts: ModuleType, home: Path, tmp_path: Path) -> None:
    """The original loop moved it at every micro-step; a switch does so, too."""
    rates = {}
    for legacy in (False, True):
        config = parts.config_of(home, tmp_path, optim={"schedule_per_micro_batch": legacy, "warmup_ratio": 0.0},
                                 trainer={"gradient_accumulation_steps": 2, "max_steps": 100})
        task = TuningTask(TuningTask.read(config), ProcessGroup(), torch.device("cpu"))
        rates[legacy] = [task.learning_rate(step) for step in (0, 49, 99)]
    assert rates[False][0] > rates[False][1] > rates[False][2] == pytest.approx(1e-3, rel=0.01)
    assert rates[True][1] == pytest.approx(1e-3, rel=0.01) and rates[True][2] > 0.95e-2


def test_the_original_files_are_read() -> None:
    agent = read_agent({
        "_target_": "src.models.mllm.seed_x.ContinuousLVLM.from_pretrained",
        "input_resampler": {"_target_": "src.models.tokenizer.qwen_visual.Resampler", "grid_size": 8,
                            "embed_dim": 5120, "num_heads": 32, "kv_dim": 4096},
        "output_resampler": {"_target_": "src.models.tokenizer.qwen_visual.Resampler", "grid_size": 8,
                             "embed_dim": 4096, "num_heads": 32, "kv_dim": 5120},
        "add_patch_pos": True, "vit_down": True, "mse": True, "lm_loss_scale": 1.0, "rec_loss_scale": 6.0,
        "pretrained_model_path": "pretrained/seed_x/agent/pytorch_model.bin"})
    assert agent == read_agent({"path": "pretrained/seed_x/agent/pytorch_model.bin"})
    tower = read_encoder({
        "_target_": "src.models.tokenizer.qwen_visual.VisionTransformerWithAttnPool.from_pretrained", "heads": 16,
        "image_size": 448, 'image_start_id"': 151857, "layers": 48, "mlp_ratio": 4.9231, "output_dim": 4096,
        "patch_size": 14, "width": 1664, "pretrained_model_path": "pretrained/QwenViT/qwen_vit_G.pt"})
    assert tower.path.endswith("qwen_vit_G.pt") and tower.sizes is not None and tower.sizes.layers == 48
    for wrong, sentence in (({"_target_": "src.models.mllm.seed_x.ContinuousLVM"}, "did you mean"),
                            ({"rec_los_scale": 1}, "rec_los_scale"), ({"losses": {"rec_los_scale": 1}}, "did you mean"),
                            ({"input_resampler": {"grid_size": 2}}, "embed_dim")):
        with pytest.raises(ConfigError, match=sentence):
            read_agent(wrong)
    with pytest.raises(ConfigError, match="vision encoder's weights"):
        read_encoder({"at_once": 2})


@pytest.mark.parametrize("changes, sentence", [
    ({"agent": {"embed_dim": 40, "kv_dim": 16}}, "embed_dim is 40, but must be 48: the language model"),
    ({"agent": {"kv_dim": 20}}, "input_resampler.kv_dim is 20, but must be 16"),
    ({"trainer": {"image_weight": 2.0}}, "are weighted by agent.losses"),
    ({"tokenizer": {"pretrained_model_name_or_path": "pretrained/nano/seed_tokenizer"}}, "not SEED-X's"),
    ({"data": 3}, "^data: base_resolution of source chat is 448, but the vision encoder"),
    ({"agent": None}, "agent is required")])
def test_parts_that_do_not_fit(parts: ModuleType, home: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
                               ) -> None:
    given = dict(changes)
    if "data" in given:
        given["data"] = parts.data_of(home)
        given["data"]["sources"] = given["data"]["sources"][3:]
        del given["data"]["sources"][0]["options"]["base_resolution"]
    if given.get("agent"):
        given["agent"] = {"input_resampler": {**parts.RESAMPLERS["input_resampler"], **given["agent"]}}
    config = parts.config_of(home, tmp_path, **{key: value for key, value in given.items() if value is not None})
    with pytest.raises(ConfigError, match=sentence):
        TuningTask(TuningTask.read({key: value for key, value in config.items() if given.get(key, "") is not None}),
                   ProcessGroup(), torch.device("cpu")).prepare()
