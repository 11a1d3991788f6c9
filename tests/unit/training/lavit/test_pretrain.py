"""LaVIT's unified pre-training: rows and losses, learning rates, resume, checkpoints."""

import io
import shutil

import pretrain_parts as parts
import pytest
import torch
from llm_runs import LORA, compose, task_of
from PIL import Image
from repository import NANO
from systems import load
from tensors import equal
from tiny.lavit import write_tokenizer_of

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.models.lavit.modeling import DynamicTokenizer
from seed_multimodal.recipes.lavit.train_llm import PretrainTask
from seed_multimodal.state_dicts import load_state_dict


def test_losses_of_packed_rows_equal_those_of_single_sequences(config_of, parts_dir, tmp_path):
    # Placeholders of images become as many positions as the image has tokens, drawn by each
    # sample's seed.
    sums = []
    for packing, rows in ((True, 2), (False, 1)):
        data = parts.data_of(parts_dir, length=240, packing=packing, rows=rows)
        for source in data["sources"]:
            source |= {"cycles": 1, "batch_size": 1}
        task = task_of(PretrainTask, config_of(tmp_path, data=data))
        task.prepare()
        ready = map(task.prepare_batch, task.data)
        with torch.no_grad():
            losses = [task.loss_parts(task.module, batch) for batch in ready]
        names = ("sum", "image_sum", "text_count", "image_count")
        sums.append([sum(float(getattr(part, name)) for part in losses) for name in names])
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    assert min(sums[0]) > 0


def test_images_are_prepared_as_the_vision_encoder_of_the_tokenizer_says(
    config_of, parts_dir, tmp_path
):
    # Cropped and with its mean, as in a system; EVA's are squashed.
    model = write_tokenizer_of("dinov2", tmp_path, parts.SIZES, side=32)
    captions = parts.data_of(parts_dir)["sources"][0]
    captions["options"]["base_resolution"] = 32
    config = config_of(
        tmp_path / "out",
        data={"sources": [captions]},
        visual_encoder={"path": str(tmp_path / "tokenizer")},
    )
    task = task_of(PretrainTask, config)
    task.prepare()
    batch = next(batch for batch in task.data if batch.views is not None)
    files = [parts.image_of(colour, index) for index, colour in enumerate(parts.COLOURS.values())]
    images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    expected = [model.config.vit.preprocessing.read(image) for image in images]
    for pixels in batch.views.pixels:
        assert any(torch.equal(pixels, image) for image in expected)


def test_resume_with_another_visual_tokenizer_fails(config_of, parts_dir, tmp_path):
    # The same one in another folder is accepted.
    shutil.copytree(parts_dir / "visual", tmp_path / "visual")

    def train(steps, folder):
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
    DynamicTokenizer(parts.SIZES).save_pretrained(tmp_path / "visual")
    with pytest.raises(CheckpointError, match="visual tokenizer"):
        train(3, tmp_path / "visual")


def test_checkpoint_with_lora_opens_as_a_system(config_of, tmp_path):
    # The merged language model; the trained token merger for understanding, stage 1's tokenizer for
    # codes; a new run starts from it.
    config = config_of(tmp_path / "out", model={"lora": LORA}, trainer={"max_steps": 2})
    PretrainTask.train(config)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    lavit = load(checkpoint, dtype="fp32", load_decoder=False)
    task = task_of(PretrainTask, config)
    task.prepare()
    task.load(checkpoint)
    understanding = lavit.images.understanding_tokenizer
    expected = task.module.causal_encoder.state_dict()
    assert equal(expected, understanding.causal_encoder.state_dict())
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        expected = task.module.llm.eval()(ids).logits
        torch.testing.assert_close(lavit.llm(ids).logits, expected)
    assert isinstance(lavit.describe(Image.new("RGB", (20, 20))), str)

    saved = load_state_dict(checkpoint / "visual_weight.safetensors")
    assert {name.partition(".")[0] for name in saved} == {"causal_encoder", "vit_proj"}
    bias = "causal_encoder.blocks.0.norm0.bias"
    started = task_of(
        PretrainTask, config_of(tmp_path / "new", visual_encoder={"start": str(checkpoint)})
    )
    started.prepare()
    assert torch.equal(started.published(started.module.state_dict())[bias], saved[bias])


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"tokenizer": {"pretrained_model_name_or_path": str(NANO / "seed_tokenizer")}}, "codes"),
        ({"optim": {"part_rates": {"vit_prj": 1e-4}}}, "vit_prj"),
    ],
)
def test_task_with_parts_that_do_not_fit(config_of, tmp_path, changes, named):
    # By the name of the setting, before hours of reading data.
    with pytest.raises(ConfigError, match=named):
        task_of(PretrainTask, config_of(tmp_path, **changes)).prepare()


def test_configuration_is_the_published_recipe():
    # Two parts text and one part images.
    arguments = ["output_dir=x", "deepspeed=configs/deepspeed/stage2_bf16.json"]
    settings = PretrainTask.run_type.read(compose(arguments, name="train_lavit"))
    assert settings.visual_encoder.selection == "draw"
    assert settings.optim.learning_rate == 1e-5
    assert set(settings.optim.part_rates.values()) == {1e-4}
    weights = {source.name: source.weight for source in settings.data.sources}
    assert weights["text"] == 2 * (weights["read"] + weights["drawn"])
