"""What answers the questions of GenEval 2 and DPG-Bench; DPG-Bench on nano's scenes."""

import csv

import pytest
import torch
from PIL import Image
from random_images import noise
from tiny import read_json
from tiny.language import write_hub_tokenizer
from tiny.vision import SIZES

from seed_multimodal.cli.main import main
from seed_multimodal.evaluation.judges import HubJudge, Question, answer_forms, load_judge
from seed_nano.report.prompts import DPG_COLUMNS, dpg_rows
from seed_nano.world.scene import Scene, render

RIGHT = Scene("noto", "meadow", "two kinds", ("fox", "tree"), (2, 1))
WRONG = Scene("fluent", "sea", "large", ("ufo",))


def picture(scene) -> Image.Image:
    return Image.fromarray(render(scene))


def test_answer_forms():
    # A judge that says "2" answers "two"; a form that is listed twice would count twice.
    assert answer_forms("Yes") == ["yes", "Yes"]
    assert answer_forms("four") == ["four", "Four", "4"]
    assert answer_forms("2") == ["2"]  # a second form would count twice


def write_llava(folder):
    """A tiny LLaVA with random weights."""
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(
        write_hub_tokenizer(folder / "words", ["is there a fox? yes no Yes No two four"] * 4)
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 32}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14),
        text_config=LlamaConfig(**sizes, vocab_size=len(tokenizer), num_key_value_heads=2),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}"
        "<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}",
    )
    processor.save_pretrained(folder)


def test_hub_judge_adds_up_first_tokens(tmp_path):
    # `--judge` takes image-text models of transformers.
    write_llava(tmp_path)
    judge = load_judge(str(tmp_path), torch.device("cpu"))
    assert isinstance(judge, HubJudge)
    image = noise(1, (40, 30))
    answers = [["yes"], ["no"], ["yes", "no"]]
    [[yes, no, either]] = judge.probabilities(image, [Question("is there a fox?", answers)])
    assert 0 < yes < 1 and 0 < no < 1
    assert either == pytest.approx(yes + no, abs=1e-5)


def test_dpg_of_a_grid_with_a_right_and_a_wrong_drawing(tmp_path):
    # A file holds the drawings of an item as tiles.
    data = tmp_path / "dpg_bench.csv"
    with data.open("w", newline="") as file:
        csv.writer(file).writerows([DPG_COLUMNS, *dpg_rows("a", RIGHT)])
    grid = Image.new("RGB", (128, 128))
    grid.paste(picture(RIGHT), (0, 0))
    grid.paste(picture(WRONG), (64, 0))
    grid_folder = tmp_path / "drawings"
    grid_folder.mkdir()
    grid.save(grid_folder / "a.png")
    out = tmp_path / "out"
    flags = f"--data {data} --judge nano --device cpu --out {out} --num-images 2"
    assert main(["eval", "dpg", *flags.split(), "--image-folder", str(grid_folder)]) == 0
    summary = read_json(out / "summary.json")
    assert (out / "sheet.png").is_file()
    assert (summary["dpg"]["value"], summary["dpg"]["n"]) == (50, 2)
    assert summary["per_category"] == {"entity": 50, "other": 50}
