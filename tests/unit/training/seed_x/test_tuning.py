"""SEED-X's instruction tuning: checkpoints, losses of packed rows, evaluation, settings."""

import itertools
from collections.abc import Iterable

import pytest
import torch
import tuning_parts as parts
from data_files import lines
from llm_runs import task_of
from repository import NANO
from tensors import equal
from tiny import read_json
from tiny.language import LLM_WIDTH

from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.models.seed_x.modeling import load_agent
from seed_multimodal.recipes.seed_x.train_agent import TuningTask, read_encoder
from seed_multimodal.state_dicts import load_state_dict


@pytest.mark.process
@pytest.mark.slow
def test_train_saves_an_agent(config_of, tmp_path):
    # Trained tensors by their original names; an agent is loaded from them, and a new run starts
    # from them.
    trainer = {"precision": "bf16", "dataloader_num_workers": 1, "max_steps": 2}
    TuningTask.train(config_of(tmp_path / "out", lora=True, trainer=trainer))
    folder = tmp_path / "out" / "checkpoint-2"
    saved = load_state_dict(folder / "model.safetensors")
    assert "llm.base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight" in saved
    assert {"patch_pos_embed", "output_resampler.attn.in_proj_weight"} < saved.keys()
    not_saved = (".base_layer.", "original_module", "resampler.pos_embed")
    assert not [name for name in saved if any(part in name for part in not_saved)]
    about = read_json(folder / "agent.json")
    assert parts.LORA.items() <= about["lora"].items()
    assert about["input_resampler"]["embed_dim"] == LLM_WIDTH

    start = {"agent": {"path": str(folder)}, "lora": True}
    task = task_of(TuningTask, config_of(tmp_path / "new", **start))
    task.prepare()
    assert equal(task.published(task.module.state_dict()), saved)
    load_agent(task.module, folder)
    other = {"lora": {**parts.LORA, "lora_alpha": 16}}
    with pytest.raises(CheckpointError, match="lora_alpha"):
        task_of(TuningTask, config_of(tmp_path / "no", **start, model=other)).prepare()


@torch.no_grad()
def mean_losses(task: TuningTask, batches: Iterable[LlmBatch]) -> list[float]:
    """Losses of text by its learned tokens and of images by the number of generated ones."""
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        losses = task.module(**task.inputs(batch))
        n_images = 0 if batch.views is None else int(batch.views.is_target.sum())
        text, image = losses["lm_loss"] * batch.learned, losses["rec_loss"] * n_images
        sums += torch.tensor([text, batch.learned, image, n_images])
    return [float(sums[0] / sums[1]), float(sums[2] / sums[3])]


def test_losses_of_packed_rows_equal_those_of_single_sequences(config_of, parts_dir, tmp_path):
    # A token that sees another sequence, or an image in another's place, shows in no curve.
    losses = []
    for packing, rows in ((True, 2), (False, 1)):
        data = parts.data_of(parts_dir, packing=packing, rows=rows)
        for source in data["sources"]:
            source |= {"cycles": 1, "batch_size": 1}
        task = task_of(TuningTask, config_of(tmp_path, data=data))
        task.prepare()
        losses.append(mean_losses(task, task.data))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_gradients_reach_every_parameter_in_every_batch(config_of, parts_dir, tmp_path):
    # Processes wait for each other's gradients: none may be left out where a batch lacks images.
    data = parts.data_of(parts_dir)
    texts = lines(tmp_path / "texts.jsonl", [{"data": ["Say red.", "Red."]}])
    data["sources"].append({**data["sources"][0], "name": "texts", "files": str(texts)})
    task = task_of(TuningTask, config_of(tmp_path / "out", data=data))
    task.prepare()
    contents = set()
    for batch in itertools.islice(task.data, 20):
        is_target = [] if batch.views is None else batch.views.is_target.tolist()
        contents.add(frozenset(is_target))
        task.module.zero_grad()
        task.module(**task.inputs(batch))["total_loss"].backward()
        trained = (value for value in task.module.parameters() if value.requires_grad)
        gradients = [value.grad for value in trained]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    # No images, images to read, to generate, and both.
    assert contents == {frozenset(kinds) for kinds in ([], [False], [True], [False, True])}


def test_encoder_file_of_the_original_is_read():
    # Its agent's file: test_tuning_export.py.
    encoder = read_encoder(
        {
            "_target_": "src.models.tokenizer.qwen_visual.VisionTransformerWithAttnPool"
            ".from_pretrained",
            'image_start_id"': 151857,  # the original's misspelling
            "layers": 48,
            "pretrained_model_path": "pretrained/QwenViT/qwen_vit_G.pt",
        }
    )
    assert encoder.path.endswith("qwen_vit_G.pt")
    assert encoder.sizes is not None and encoder.sizes.layers == 48


def test_prepare_with_another_tokenizer_or_size_of_images(config_of, tmp_path):
    # Named before hours of training; of an option the source.
    tokenizer = {"pretrained_model_name_or_path": str(NANO / "seed_tokenizer")}
    with pytest.raises(ConfigError, match="SEED-X"):
        task_of(TuningTask, config_of(tmp_path, tokenizer=tokenizer)).prepare()
    config = config_of(tmp_path)
    del config["data"]["sources"][3]["options"]["base_resolution"]
    with pytest.raises(ConfigError, match="source chat"):
        task_of(TuningTask, config).prepare()
