"""LaVIT's unified pre-training: rows and losses, learning rates, resume, checkpoints."""

from __future__ import annotations

import io
import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pretrain_parts as parts
import pytest
import torch
from llm_runs import LORA
from PIL import Image
from repository import NANO, ROOT
from tiny.vision import write_vision
from torch import Tensor
from torch.nn.functional import cross_entropy

from seed_multimodal.data.formats.sources import open_records
from seed_multimodal.data.pretokenize.run import RunSettings, run
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.images.transforms import normalise
from seed_multimodal.models.lavit.checkpoints import (
    load_dynamic_tokenizer,
    save_dynamic_tokenizer,
    with_merger,
)
from seed_multimodal.models.lavit.modeling import DynamicTokenizer
from seed_multimodal.models.lavit.pipeline import Lavit
from seed_multimodal.models.lavit.train_llm import PretrainTask
from seed_multimodal.models.seed.checkpoints import load_vision
from seed_multimodal.nn.vision.hub import HubVisionConfig
from seed_multimodal.training.cli import compose, parse
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.weights import load_state_dict


def task_of(config: dict[str, Any]) -> PretrainTask:
    return PretrainTask(PretrainTask.read(config), ProcessGroup(), torch.device("cpu"))


@pytest.mark.parametrize("packing", [True, False])
def test_losses_of_rows_equal_those_of_their_sequences(
    config_of, parts_dir: Path, tmp_path, packing
):
    # Placeholders of images become as many positions as the image has tokens: codes of the frozen
    # tokenizer by each sample's seed, or outputs of the trained merger and projector for images
    # that are understood; image starts and prompts are not learned.
    captions, _, texts = parts.data_of(parts_dir)["sources"]
    data = {"length": 240, "sources": [captions, texts], "packing": packing}
    task = task_of(config_of(tmp_path, data=data))
    task.prepare()
    with torch.no_grad():  # the trained merger differs from the frozen one
        for value in task.module.causal_encoder.parameters():
            value.add_(0.05 * torch.randn_like(value))
    trained = {
        name: value
        for name, value in task.weights().items()
        if name.startswith(("causal_", "vit_proj"))
    }
    frozen = load_dynamic_tokenizer(parts_dir / "visual")
    understanding = with_merger(frozen, trained, "merger")
    batch = next(
        batch
        for batch in task.data
        if batch.views and len(set(batch.views.is_target.tolist())) == 2
    )
    target_flags = batch.views.is_target.tolist()
    views = zip(batch.views.pixels, batch.views.seeds, target_flags, strict=True)
    images = []
    for pixels, seed, generated in views:
        encode = frozen.encode if generated else understanding.continuous
        generator = [torch.Generator().manual_seed(int(seed))]
        images.append(encode(normalise(pixels[None]), generator=generator, mode="draw")[0])
    ready = task.prepare_batch(batch)
    with torch.no_grad():
        losses = task.loss_parts(task.module, ready)
    # The numbers of tokens are the images' own.
    lengths = {len(image) for image in images}
    assert lengths != {parts.PATCHES}
    total, image_total, learned = reference(task, ready, images, target_flags)
    assert float(losses.sum) == pytest.approx(total, rel=1e-5)
    assert float(losses.image_sum) == pytest.approx(image_total, rel=1e-5)
    assert int(losses.text_count + losses.image_count) == learned == ready.learned


def reference(
    task: PretrainTask, ready: Any, images: list[Tensor], target_flags: list[bool]
) -> tuple[float, float, int]:
    """Losses of all tokens and of image tokens, and their number, computed per sequence by a plain
    LLaMA."""
    vocabulary = task.tokenizer.vocabulary
    embed = task.llm.get_input_embeddings()
    total = image_total = 0.0
    learned = 0
    remaining = list(zip(images, target_flags, strict=True))
    columns = (ready.input_ids, ready.labels, ready.position_ids)
    for row, row_labels, positions in zip(*columns, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(row)]
        for start, end in itertools.pairwise(starts):
            ids = row[start:end]
            labels = row_labels[start:end].clone()
            if (labels == -100).all():  # padding
                continue
            embeds = embed(ids).detach().clone()
            if (ids == vocabulary.boi_id).any():
                image, generated = remaining.pop(0)
                first = int((ids == vocabulary.boi_id).nonzero()[0]) + 1
                last = int((ids == vocabulary.eoi_id).nonzero()[0])
                if generated:
                    codes = ids[first:last] - vocabulary.code_start
                    assert codes.tolist() == image.tolist()
                else:
                    embeds[first:last] = image.detach()
            assert not (labels == vocabulary.boi_id).any()
            labels[0] = -100
            with torch.no_grad():
                logits = task.llm(inputs_embeds=embeds[None]).logits[0]
            values = cross_entropy(logits[:-1], labels[1:], reduction="none")
            total += float(values.sum())
            image_total += float(values[labels[1:] >= vocabulary.n_text].sum())
            learned += int((labels[1:] != -100).sum())
    assert not remaining
    return total, image_total, learned


def test_images_are_prepared_as_the_vision_encoder_of_the_tokenizer_says(
    config_of, parts_dir: Path, tmp_path
):
    # Cropped and with its mean, as in a system; EVA's are squashed.
    write_vision("dinov2", tmp_path / "vision", side=32)
    vit = HubVisionConfig(path=str(tmp_path / "vision"))
    torch.manual_seed(0)
    model = DynamicTokenizer(replace(parts.SIZES, vit=vit))
    load_vision(model.encoder, tmp_path / "vision", None)
    save_dynamic_tokenizer(model, tmp_path / "visual")
    captions = parts.data_of(parts_dir)["sources"][0]
    captions["options"]["base_resolution"] = 32
    config = config_of(
        tmp_path / "out",
        data={"sources": [captions]},
        visual_encoder={"path": str(tmp_path / "visual")},
    )
    task = task_of(config)
    task.prepare()
    batch = next(batch for batch in task.data if batch.views is not None)
    files = [parts.image_of(colour, index) for index, colour in enumerate(parts.COLOURS.values())]
    images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    expected = [vit.preprocessing.read(image) for image in images]
    for pixels in batch.views.pixels:
        assert any(torch.equal(pixels, image) for image in expected)


def test_resume_with_another_visual_tokenizer_fails(config_of, parts_dir: Path, tmp_path):
    # The same one in another folder is accepted.
    shutil.copytree(parts_dir / "visual", tmp_path / "visual")

    def train(steps: int, folder: Path) -> dict[str, Any]:
        return PretrainTask.train(
            config_of(
                tmp_path / "run",
                trainer={"max_steps": steps},
                visual_encoder={"path": str(folder)},
            )
        )

    train(1, tmp_path / "visual")
    assert train(2, parts_dir / "visual")["steps"] == 2
    torch.manual_seed(9)
    save_dynamic_tokenizer(DynamicTokenizer(parts.SIZES), tmp_path / "visual")
    with pytest.raises(CheckpointError, match="visual tokenizer"):
        train(3, tmp_path / "visual")


def test_checkpoint_with_lora_opens_as_a_system(config_of, parts_dir: Path, tmp_path):
    # The merged language model; the trained token merger for understanding, stage 1's tokenizer for
    # codes; a new run starts from it.
    config = config_of(tmp_path / "out", model={"lora": LORA}, trainer={"max_steps": 2})
    PretrainTask.train(config)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    lavit = Lavit.from_pretrained(checkpoint, dtype="fp32", load_decoder=False, log=None)
    task = task_of(config)
    task.prepare()
    task.load_weights(checkpoint)
    understanding = lavit.images.understanding_tokenizer.causal_encoder.state_dict()
    for name, value in task.module.causal_encoder.state_dict().items():
        assert torch.equal(value, understanding[name]), name
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        expected = task.module.llm.eval()(ids).logits
        torch.testing.assert_close(lavit.llm(ids).logits, expected)
    assert isinstance(lavit.describe(Image.new("RGB", (20, 20))), str)

    saved = load_state_dict(checkpoint / "visual_weight.safetensors")
    assert {name.partition(".")[0] for name in saved} == {"causal_encoder", "vit_proj"}
    bias = "causal_encoder.blocks.0.norm0.bias"
    before = load_dynamic_tokenizer(parts_dir / "visual").state_dict()[bias]
    assert not torch.equal(saved[bias], before)
    started = task_of(config_of(tmp_path / "new", visual_encoder={"start": str(checkpoint)}))
    started.prepare()
    assert torch.equal(started.weights()[bias], saved[bias])
    with pytest.raises(CheckpointError, match="visual_weight.safetensors"):
        task_of(config_of(tmp_path, visual_encoder={"start": str(parts_dir / "words")})).prepare()


def test_codes_of_shards_do_not_depend_on_the_batch_size(parts_dir: Path, tmp_path):
    # Pre-tokenised images have the codes that the pre-training reads, of different numbers.
    encoder = {
        "_target_": "seed_multimodal.models.lavit.codes.lavit_codes",
        "pretrained_model_name_or_path": str(parts_dir / "visual"),
    }
    files = {"files": str(parts_dir / "captions.tar")}
    contents = []
    for size in (3, 1):
        folder = str(tmp_path / f"by{size}")
        settings = RunSettings(
            "caption", files, folder, encoder, device="cpu", workers=0, batch_size=size
        )
        assert run(settings) == 0
        records = open_records(folder)
        contents.append([records.read(index).fields for index in range(len(records))])
    assert contents[0] == contents[1]
    codes = [fields["image_ids"] for fields in contents[0]]
    assert len({len(image) for image in codes}) > 1
    assert all(0 <= code < parts.CODES for image in codes for code in image)


def test_train_skips_unusable_records(config_of, parts_dir: Path, tmp_path):
    # Codes out of range, an empty text, a text that is too long.
    records = [
        {"text": "a cat", "image_ids": [99]},
        {"text": "", "image_ids": [1]},
        {"text": "word " * 120, "image_ids": [1]},
        {"text": "a red cat", "image_ids": [1, 2]},
    ]
    parts.write_json_lines(tmp_path / "bad.jsonl", records)
    source = parts.data_of(parts_dir)["sources"][1]
    source |= {"files": str(tmp_path / "bad.jsonl"), "cycles": 1}
    record = PretrainTask.train(
        config_of(tmp_path / "out", data={"sources": [source]}, trainer={"max_steps": 3})
    )
    counts = record["data"]["sources"]["codes"]
    assert counts["sequences"] == 1
    assert [entry["count"] for entry in counts["skipped"].values()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer": {"pretrained_model_name_or_path": str(NANO / "seed_tokenizer")}}, "codes"),
        ({"visual_encoder": {"selection": "top"}}, "selection"),
        ({"model": {"quantization": "8bit"}}, "lora"),
        ({"optim": {"part_rates": {"vit_prj": 1e-4}}}, "vit_prj"),
    ],
)
def test_task_with_parts_that_do_not_fit(config_of, tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        task_of(config_of(tmp_path, **changes)).prepare()


def test_task_with_images_of_another_size(config_of, tmp_path):
    # Views of 224 pixels for an encoder of 16: an error by the name of the source.
    config = config_of(tmp_path)
    del config["data"]["sources"][0]["options"]
    with pytest.raises(ConfigError, match="captions"):
        task_of(config)


def test_configuration_is_the_published_recipe():
    # Two parts text and one part images; images understood and generated equally often.
    arguments = ["output_dir=x", "deepspeed=configs/deepspeed/stage2_bf16.json"]
    settings = PretrainTask.read(
        compose(parse(arguments), ROOT / "MultiModalLLM" / "configs", "train_lavit")
    )
    assert settings.visual_encoder.selection == "draw"
    assert settings.deepspeed is not None
    assert settings.optim.learning_rate == 1e-5
    assert set(settings.optim.part_rates.values()) == {1e-4}
    weights = {source.name: source.weight for source in settings.data.sources}
    assert weights["text"] == 2 * (weights["read"] + weights["drawn"])
    ratios = {
        source.name: source.options.get("img_first_ratio") for source in settings.data.sources
    }
    assert (ratios["read"], ratios["drawn"]) == (1.0, 0.0)
