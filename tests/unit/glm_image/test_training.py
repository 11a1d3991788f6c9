"""GLM-Image's trainings: their losses against an independent formula, and their results loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_glm_image as tiny
import torch
import torch.nn.functional as F
from repository import ROOT
from torch.testing import assert_close

from seed_multimodal import MultimodalSystem
from seed_multimodal.data.decoders import get_decoder
from seed_multimodal.data.decoders.base import SeededRandom
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.stream.config import LlmDataSettings, read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.diffusion.objectives import NoisyLatents
from seed_multimodal.rl.task import token_log_probs
from seed_multimodal.training.cli import main as train
from seed_multimodal.training.llm.loss import LossModule

pytest.importorskip("transformers.models.glm_image.modeling_glm_image")
pytest.importorskip("diffusers.pipelines.glm_image.pipeline_glm_image")
from seed_glm_image.diffusion import GlmImageObjective  # noqa: E402
from seed_glm_image.processing import position_ids  # noqa: E402

CONFIGS = ROOT / "MultiModalLLM/configs"


def codes(*shape: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(tiny.N_CODES, shape, generator=generator).tolist()


RECORDS = [
    {"text": "a fox", "image_ids": codes(4, 4), "preview_ids": codes(16, 16, seed=1)},
    {"text": ["an owl", "a bird"], "image_ids": codes(2, 8), "preview_ids": codes(8, 32, seed=2)},
    {"text": "a row", "image_ids": codes(16**2 + 3**2, seed=3)},
]
EDIT = {
    "instruction": "make it red",
    "source_image_ids": codes(2, 3),
    "target_image_ids": codes(3, 2, seed=1),
}


def write_records(folder: Path, records: list[Any] = RECORDS) -> Path:
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def data_settings(file: Path, packing: bool) -> LlmDataSettings:
    source = {"name": "mine", "files": str(file), "decoder": "glm_image.draw"}
    sizes = {"length": 1024, "rows": 1} if packing else {"packing": False}
    if not packing:
        source |= {"batch_size": 3, "max_length": 400}
    return read_data_settings({"sources": [source], "seed": 1, **sizes}, "data")


def expected_loss(llm: Any, sequence: Any) -> torch.Tensor:
    """Cross-entropy of a sequence alone, with all its positions."""
    ids = torch.tensor([sequence.ids])
    plan = torch.as_tensor(sequence.position_ids)[:, None]
    scores = llm(input_ids=ids, position_ids=plan, use_cache=False).logits[0, :-1].float()
    labels = torch.tensor(sequence.labels)[1:]
    return F.cross_entropy(scores, labels, ignore_index=-100, reduction="sum")


@torch.no_grad()
@pytest.mark.parametrize("packing", [True, False])
def test_losses(system, tmp_path, packing):
    """Packed and padded batches have the sum of their sequences' losses."""
    # 1. Of each sequence alone.
    decoder = get_decoder("glm_image.draw", system.tokenizer)
    records = [{**record, "text": "an owl"} for record in RECORDS]
    alone = {}
    for record in records:
        sequence = decoder.decode(record, SeededRandom(0))
        alone[tuple(sequence.ids)] = float(expected_loss(system.llm, sequence))
    assert len(alone) == 3

    # 2. Of a batch with several.
    module = LossModule(system.llm)
    settings = data_settings(write_records(tmp_path, records), packing)
    with LlmBatches(settings, system.tokenizer) as batches:
        batch = next(batches)
    assert batch.axis_ids is not None
    parts = module(
        batch.input_ids,
        batch.labels,
        batch.position_ids,
        batch.attention_mask,
        axis_ids=batch.axis_ids,
    )
    ids = batch.input_ids.flatten().tolist()
    starts = [index for index, position in enumerate(batch.position_ids.flatten()) if position == 0]
    total = 0.0
    for start in starts:
        for sequence_ids, loss in alone.items():
            total += loss if tuple(ids[start : start + len(sequence_ids)]) == sequence_ids else 0
    assert total > 2 * min(alone.values())
    assert float(parts.sum) == pytest.approx(total, rel=1e-4)

    # 3. Without the axes it is another one.
    flat = module(batch.input_ids, batch.labels, batch.position_ids, batch.attention_mask)
    assert abs(float(flat.mean) - float(parts.mean)) > 0.05


def test_sequences(system):
    """Only answers are learned; positions are those of text and grids."""
    sequence = get_decoder("glm_image.draw", system.tokenizer).decode(RECORDS[0], SeededRandom(0))
    learned = [label for label in sequence.labels if label >= 0]
    preview, image = RECORDS[0]["preview_ids"], RECORDS[0]["image_ids"]
    assert learned == [*sum(preview, []), *sum(image, []), tiny.END]
    n_text = len(sequence.ids) - len(learned)
    assert sequence.ids[n_text - 1] == tiny.START
    plan = position_ids([n_text, (16, 16), (4, 4), 1])
    assert sequence.position_ids.tolist() == plan.tolist()

    edit = get_decoder("glm_image.edit", system.tokenizer).decode(EDIT, SeededRandom(0))
    target = [*sum(EDIT["target_image_ids"], []), tiny.END]
    assert [label for label in edit.labels if label >= 0] == target
    assert edit.ids[:8] == [tiny.START, *sum(EDIT["source_image_ids"], []), tiny.END]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a"}, "image_ids"),
        ({"text": "", "image_ids": RECORDS[2]["image_ids"]}, "empty"),
        ({"text": "a", "image_ids": codes(16**2 + 5)}, "a square image"),
        ({"text": "a", "image_ids": codes(4, 4)}, "preview_ids"),
        ({"text": "a", "image_ids": codes(4, 4), "preview_ids": codes(8, 8)}, "(16, 16)"),
        ({"text": "a", "image_ids": [[1, 2], [3]]}, "array"),
        ({"text": "a", "image_ids": [[1, tiny.N_CODES]]}, "outside"),
        ({"text": "a", "image_ids": [[1.5, 2.0]]}, "whole numbers"),
        ({"text": "a", "image_ids": [[True]]}, "whole numbers"),
        ({"text": "a", "image_ids": codes(1, 300), "preview_ids": codes(1, 277)}, "too long"),
        ({"text": "a\ud800", "image_ids": RECORDS[2]["image_ids"]}, "Unicode"),
        ({**RECORDS[2], "preview_ids": codes(16, 16)}, "has a preview, too"),
    ],
)
def test_wrong_records(system, record, reason):
    with pytest.raises(BadRecord, match=reason.replace("(", r"\(").replace(")", r"\)")):
        get_decoder("glm_image.draw", system.tokenizer).decode(record, SeededRandom(0))


ODD = (None, True, 0, -1, 1.5, float("nan"), 10**40, "", " ", "\ud83d", [], [[]], [None], {}, [{}])


@pytest.mark.parametrize(("name", "record"), [("draw", RECORDS[0]), ("edit", EDIT)])
def test_odd_values_of_records(system, name, record):
    """They are refused by the record's own error; without a field it is named."""
    decoder = get_decoder(f"glm_image.{name}", system.tokenizer)
    for key in record:
        for value in ODD:
            with pytest.raises(BadRecord):
                decoder.decode({**record, key: value}, SeededRandom(0))
        others = {other: value for other, value in record.items() if other != key}
        with pytest.raises(BadRecord, match=key):
            decoder.decode(others, SeededRandom(0))


def test_a_sequence_that_is_too_long_is_dropped(system):
    decoder = get_decoder("glm_image.draw", system.tokenizer)
    sequence = decoder.decode(RECORDS[0], SeededRandom(0), 200)
    assert not sequence.ids and "200" in sequence.drop_reason


@torch.no_grad()
def test_log_probabilities_of_rewards(system):
    """Those of the trainer are the engine's, also of answers of different sizes."""
    settings = system.settings("draw", images="forced", temperature=1.0, top_p=1.0, top_k=0, seed=3)
    prompts = []
    for height, width in ((64, 96), (128, 64)):
        drawing = {"height": height, "width": width}
        conversation = [[message] for message in _messages("a fox")]
        prompts += system.family.prompts(conversation, "draw", drawing=drawing)
    requests = system.engine.run(prompts, settings, records=True)
    log_probs = token_log_probs(system.llm, requests)
    for row, request in zip(log_probs, requests, strict=True):
        recorded = torch.tensor(request.log_probs)
        assert_close(row[: len(recorded)], recorded, atol=1e-4, rtol=0)


def _messages(text: str) -> list[Any]:
    from seed_multimodal.language.messages import user_message

    return user_message([text])


@pytest.mark.parametrize("size", [(8, 12), (32, 32), (128, 128)])
def test_noise_and_told_times_are_the_sampler_s(system, size):
    """Of each told time of drawing, the noise of training is that of drawing."""
    decoder = system.images.decoder
    height, width = (side * decoder.factor for side in size)
    settings = decoder.check_settings(height=height, width=width, num_inference_steps=9)
    scheduler = decoder.scheduler
    scheduler.set_timesteps(**decoder.times(settings))
    objective = GlmImageObjective(scheduler, decoder.patch, "logit_normal")
    latents = torch.zeros(9, 4, *size)
    noise = torch.ones_like(latents)
    steps = scheduler.timesteps + 1
    assert torch.equal(objective.told(steps), scheduler.timesteps)
    sigmas = objective.add_noise(latents, noise, steps)[:, 0, 0, 0]
    assert_close(sigmas, scheduler.sigmas[:-1], atol=1e-6, rtol=1e-6)
    # By hand: 0.75 times the root of the patches over 256, and 0.25.
    shift = 0.75 * (size[0] * size[1] / 4 / 256) ** 0.5 + 0.25
    times = steps / 1000
    assert_close(sigmas, shift / (shift + 1 / times - 1), atol=1e-5, rtol=1e-5)
    noisy = NoisyLatents.sample(objective, latents, torch.Generator().manual_seed(0))
    assert noisy.steps.min() >= 0 and noisy.steps.max() < 1000


def llm_arguments(folder: Path, tmp_path: Path, lora: bool = False) -> list[str]:
    """Of a training of the language model, whose results are in `run`."""
    model: dict[str, Any] = {"path": str(folder / "vision_language_encoder"), "dtype": "fp32"}
    if lora:
        model["lora"] = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    source = {"name": "mine", "files": str(write_records(tmp_path)), "decoder": "glm_image.draw"}
    groups = {
        "model": model,
        "tokenizer": {"pretrained_model_name_or_path": str(folder / "processor")},
        "data": {"sources": [source], "length": 1024, "rows": 1},
    }
    arguments = ["optim=nano", "trainer=nano", f"output_dir={tmp_path / 'run'}"]
    for name, group in groups.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(group))
        arguments.append(f"{name}={file}")
    return arguments


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
def test_language_model_training(folder, tmp_path, lora):
    """A few steps lower the loss; the checkpoint is a system that draws."""
    options = "trainer.max_steps=12 trainer.logging_steps=1 optim.learning_rate=0.01"
    arguments = [*llm_arguments(folder, tmp_path, lora), *options.split()]
    out = tmp_path / "run"
    assert train("train_glm_image", CONFIGS, arguments) == 0

    lines = [json.loads(line) for line in (out / "train.log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    trained = MultimodalSystem.from_pretrained(out / "checkpoint-12", device="cpu", log=None)
    untrained = MultimodalSystem.from_pretrained(folder, device="cpu", log=None)
    options = {"height": 64, "width": 64, "num_inference_steps": 1}
    assert trained.draw("a fox", **options).size == (64, 64)
    changed = [
        name
        for name, value in trained.llm.state_dict().items()
        if not torch.equal(value, untrained.llm.state_dict()[name])
    ]
    if lora:
        assert {name.split(".")[-2] for name in changed} == {"q_proj", "lm_head"}
    assert changed


@pytest.mark.process
@pytest.mark.slow
def test_decoder_training(folder, tmp_path):
    """The flow's loss falls on one image; the result draws."""
    images = tmp_path / "images"
    images.mkdir()
    tiny.picture(96, 96).save(images / "one.png")
    model = {"diffusion": str(folder), "tokenizer": str(folder / "vision_language_encoder")}
    data = {
        "sources": [{"name": "mine", "files": str(images)}],
        "batch_size": 4,
        "resolution": 64,
        "encoder_size": 32,
    }
    arguments = []
    for name, group in {"model": model, "data": data}.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(group))
        arguments.append(f"{name}={file}")
    out = tmp_path / "run"
    options = "trainer.max_steps=100 trainer.logging_steps=10 trainer.save_steps=50"
    options += " optim.learning_rate=0.003 trainer.sample_steps=0"
    arguments += ["optim=tiny", "trainer=tiny", *options.split(), f"output_dir={out}"]
    assert train("train_glm_image_decoder", CONFIGS, arguments) == 0
    lines = [json.loads(line) for line in (out / "train.log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    trained = MultimodalSystem.from_pretrained(
        folder, decoder=out / "decoder", device="cpu", log=None
    )
    image = trained.draw("a fox", height=64, width=64, num_inference_steps=1)
    assert image.size == (64, 64)


def test_a_decoder_is_not_distilled(folder, tmp_path, capsys):
    model = {"teacher": str(folder), "diffusion": str(folder), "tokenizer": str(folder)}
    file = tmp_path / "model.yaml"
    file.write_text(json.dumps(model))
    images = f"{{name: mine, files: {ROOT / 'images'}}}"
    arguments = [f"model={file}", "data=glm_image", f"data.sources=[{images}]"]
    arguments.append(f"output_dir={tmp_path / 'run'}")
    assert train("train_glm_image_decoder", CONFIGS, arguments) == 2
    assert "distilled" in capsys.readouterr().err


def test_a_weight_of_text_is_refused(folder, tmp_path, capsys):
    arguments = [*llm_arguments(folder, tmp_path), "trainer.text_weight=2"]
    assert train("train_glm_image", CONFIGS, arguments) == 2
    assert "text_weight" in capsys.readouterr().err


@pytest.mark.slow
def test_training_by_rewards(folder, tmp_path):
    """Two steps of GRPO: the engine's probabilities are the trainer's, and weights change."""
    from rl_runs import run

    def red(images: list[Any], records: Any) -> list[float]:
        return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]

    drawing = {"height": 64, "width": 96, "num_inference_steps": 1}
    before = MultimodalSystem.from_pretrained(folder, device="cpu", log=None).llm.state_dict()
    task = run(tmp_path, folder, {"red": red}, data={"drawing": drawing})
    lines = (tmp_path / "out" / "train.log.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if "drift" in line]
    assert steps and all(step["drift"] < 1e-4 for step in steps)
    after = task.system.llm.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
