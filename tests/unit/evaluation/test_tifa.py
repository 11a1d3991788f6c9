"""GenEval 2 and DPG-Bench: readers, scores, judges, and the commands on nano's scenes."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_images import noise
from tiny.language import write_hub_tokenizer

from seed_multimodal.cli.main import main
from seed_multimodal.errors import CheckpointError, DataError
from seed_multimodal.evaluation.judges import HubJudge, Question, answer_forms, load_judge
from seed_multimodal.evaluation.tifa import DrawingQuestion, dpg_score, read_dpg, read_geneval2
from seed_nano.report.prompts import DPG_COLUMNS, dpg_rows, make_prompts
from seed_nano.world.scene import Scene, render

RIGHT = Scene("noto", "meadow", "two kinds", ("fox", "tree"), (2, 1))
WRONG = Scene("fluent", "sea", "large", ("ufo",))


def picture(scene: Scene) -> Image.Image:
    return Image.fromarray(render(scene))


def write_csv(path: Path, rows: list) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([DPG_COLUMNS, *rows])
    return path


LINE = {
    "prompt": "two foxes",
    "atom_count": 1,
    "vqa_list": [["How many foxes are there?", "two"]],
    "skills": ["count"],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": 1}, "item 0: has no text 'prompt'"),
        ({"skills": []}, "as many 'skills' as questions"),
        ({"vqa_list": ["How many?"]}, "pairs of a question and its answer"),
        ({"vqa_list": [], "skills": []}, "'vqa_list' is empty"),
    ],
)
def test_read_geneval2_names_the_faulty_item(change, message, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({**LINE, **change}))
    with pytest.raises(DataError, match=message):
        read_geneval2(tmp_path / "p.jsonl")


def test_read_dpg_takes_prompts_of_files_and_numbers_of_any_order(tmp_path):
    rows = [
        ("a", "short text", "", "2", "1", "", "", "entity - part (fox, tail)", "Is there a tail?"),
        ("a", "short text", "", "1", "0", "", "", "entity - whole (fox)", "Is there a fox?"),
        ("b", "another", "", "1", "0", "", "", "global - ()", "Is it an icon?"),
    ]
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "a.txt").write_text("A long text about a fox.\n")
    first, second = read_dpg(write_csv(tmp_path / "dpg_bench.csv", rows))
    assert first.caption == "A long text about a fox." and second.caption == "another"
    assert [(item.number, item.parents) for item in first.questions] == [(2, (1,)), (1, ())]
    assert first.questions[0].category == "entity - part"


@pytest.mark.parametrize(
    ("number", "dependency", "message"),
    [
        ("one", "0", "line 2: proposition_id and dependency are no numbers"),
        ("1", "x", "are no numbers"),
        ("1", "3", "question 1 of a depends on one that is missing"),
    ],
)
def test_read_dpg_names_the_faulty_row(number, dependency, message, tmp_path):
    rows = [("a", "text", "", number, dependency, "", "", "entity - whole (fox)", "Is it?")]
    with pytest.raises(DataError, match=message):
        read_dpg(write_csv(tmp_path / "d.csv", rows))


def test_read_dpg_without_a_column(tmp_path):
    (tmp_path / "d.csv").write_text("item_id,text\na,b\n")
    with pytest.raises(DataError, match="no column 'proposition_id'"):
        read_dpg(tmp_path / "d.csv")


def test_dpg_score_needs_what_a_question_depends_on():
    questions = [
        DrawingQuestion("Is there a fox?", "yes", "entity - whole", 1),
        DrawingQuestion("Is it red?", "yes", "attribute - color", 2, (1,)),
        DrawingQuestion("Is the red dark?", "yes", "attribute - other", 3, (2,)),
        DrawingQuestion("Is there a tree?", "yes", "entity - whole", 4),
    ]
    assert dpg_score(questions, [0.9, 0.8, 0.7, 0.2]) == 0.75
    assert dpg_score(questions, [0.9, 0.4, 0.7, 0.6]) == 0.5
    assert dpg_score(questions, [0.5, 0.9, 0.9, 0.6]) == 0.25


def test_answer_forms():
    assert answer_forms("Yes") == ["yes", "Yes"]
    assert answer_forms("four") == ["four", "Four", "4"]
    assert answer_forms("2") == ["2"]  # a second form would count twice


# ---- a judge of transformers


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory) -> Path:
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

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = AutoTokenizer.from_pretrained(
        write_hub_tokenizer(folder / "words", ["is there a fox? yes no Yes No two four"] * 4)
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 2
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14),
        text_config=LlamaConfig(**sizes, vocab_size=len(tokenizer), num_key_value_heads=2),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}"
        "<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}",
    )
    processor.save_pretrained(folder)
    return folder


def test_hub_judge_adds_up_first_tokens(llava_folder):
    judge = load_judge(str(llava_folder), "cpu")
    assert isinstance(judge, HubJudge)
    image = noise(1, (40, 30))
    question = Question("is there a fox?", [["yes"], ["yes", "no"]])
    [[yes, either]] = judge.probabilities(image, [question])
    # The same by hand.
    inputs = judge.processor(
        images=image,
        text="<image>is there a fox? Answer in one word.",
        return_tensors="pt",
        add_special_tokens=False,
    )
    with torch.no_grad():
        scores = judge.model(**inputs).logits[0, -1].softmax(-1)
    encode = judge.processor.tokenizer.encode
    tokens = {word: {encode(word)[0], encode(f" {word}")[0]} for word in ("yes", "no")}
    assert yes == pytest.approx(sum(float(scores[token]) for token in tokens["yes"]), abs=1e-5)
    both = tokens["yes"] | tokens["no"]
    assert either == pytest.approx(sum(float(scores[token]) for token in both), abs=1e-5)


def test_a_detector_answers_no_questions(clip_folder):
    with pytest.raises(CheckpointError, match="clip is no image-text model, and no system"):
        load_judge(str(clip_folder), "cpu")


# ---- the commands, with nano as its own judge


def run(name: str, data: Path, drawings: Path, *more: str) -> dict:
    out = data.parent / "out"
    argv = f"eval {name} --data {data} --judge nano --device cpu --out {out}".split()
    assert main([*argv, "--image-folder", str(drawings), *more]) == 0
    summary: dict = json.loads((out / "summary.json").read_text())
    assert (out / "sheet.png").is_file()
    return summary


def test_geneval2_of_right_and_wrong_drawings(tmp_path, capsys):
    prompt = next(prompt for prompt in make_prompts(0) if prompt.tag == "color_attr").questions()
    prompt["prompt"] = "two noto foxes and a tree"
    prompt["vqa_list"] = [
        ["Is there a fox in the picture?", "Yes"],
        ["How many foxes are there?", "two"],
        ["Which style is it drawn in?", "noto"],
    ]
    prompt["skills"] = ["object", "count", "attribute"]
    lines = [json.dumps(prompt), json.dumps({**prompt, "prompt": "the same again"})]
    (tmp_path / "geneval2_data.jsonl").write_text("\n".join(lines))
    for number, scene in enumerate((RIGHT, WRONG)):
        picture(scene).save(tmp_path / f"{number}.png")
    # Below the file's folder, or where GenEval 2's program would find it.
    paths = {prompt["prompt"]: "0.png", "the same again": os.path.relpath(tmp_path / "1.png")}
    (tmp_path / "images.json").write_text(json.dumps(paths))

    summary = run("geneval2", tmp_path / "geneval2_data.jsonl", tmp_path / "images.json")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    [[right], [wrong]] = [result["scores"] for result in results]
    assert min(right) > 0.9 and max(wrong) < 0.2
    # Small ones count in the geometric mean, so that they are not rounded.
    [[judged]] = load_judge("nano", "cpu").probabilities(
        picture(WRONG), [Question("How many foxes are there?", [answer_forms("two")])]
    )
    assert wrong[1] == pytest.approx(judged, rel=1e-4) and wrong[1] != round(wrong[1], 6)
    assert summary["soft_tifa_am"]["value"] == pytest.approx(
        100 * (sum(right) + sum(wrong)) / 6, abs=0.01
    )
    geometric = [(a * b * c) ** (1 / 3) for a, b, c in (right, wrong)]
    assert summary["soft_tifa_gm"]["value"] == pytest.approx(50 * sum(geometric), abs=0.01)
    assert list(summary["am_per_skill"]) == ["attribute", "count", "object"]


def test_dpg_of_a_grid_with_a_right_and_a_wrong_drawing(tmp_path, capsys):
    data = write_csv(tmp_path / "dpg_bench.csv", dpg_rows("a", RIGHT))
    grid = Image.new("RGB", (128, 128))
    grid.paste(picture(RIGHT), (0, 0))
    grid.paste(picture(WRONG), (64, 0))
    (tmp_path / "drawings").mkdir()
    grid.save(tmp_path / "drawings" / "a.png")
    summary = run("dpg", data, tmp_path / "drawings", "--num-images", "2")
    assert summary["dpg"]["value"] == 50 and summary["dpg"]["n"] == 2
    assert summary["per_category"] == {"entity": 50, "other": 50}
