"""Files of benchmarks: each published format, and the faults that its readers name."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from data_files import write_any
from random_images import noise

from seed_multimodal.errors import DataError, ImageError
from seed_multimodal.evaluation.annotations import (
    Sample,
    find_image_file,
    read_captions,
    read_questions,
)
from seed_multimodal.evaluation.choices import read_choices
from seed_multimodal.evaluation.geneval import read_object_prompts
from seed_multimodal.evaluation.tifa import read_dpg, read_geneval2
from seed_nano.report import prompts

COCO_NAME = "val2014/COCO_val2014_000000000007.jpg"
COCO = {
    "images": [{"id": 7, "file_name": COCO_NAME}, {"id": 0, "file_name": "b.jpg"}],
    "annotations": [
        {"image_id": 7, "caption": "one"},
        {"image_id": 0, "caption": "two"},
        {"image_id": 7, "caption": "three"},
    ],
}
KARPATHY = {
    "images": [
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000000007.jpg",
            "cocoid": 7,
            "split": "test",
            "sentences": [{"raw": "one"}, {"raw": "three"}],
        },
        {"filename": "x.jpg", "cocoid": 8, "split": "val", "sentences": [{"raw": "two"}]},
    ]
}
SEVEN = Sample(7, "", COCO_NAME, references=["one", "three"])


def without_locations(samples: list[Sample]) -> list[Sample]:
    return [replace(sample, location="") for sample in samples]


VQA = {"questions": [{"question_id": 0, "image_id": 9, "question": "Who? "}]}
VQA_ANSWERS = {
    "annotations": [
        {"question_id": 5, "answers": [{"answer": "of another set"}]},
        {
            "question_id": 0,
            "answers": [{"answer": "x"}, {"answer": ""}],
            "answer_type": "other",
            "question_type": "what",
        },
    ]
}
VIZWIZ = [{"image": "VizWiz_val_01.jpg", "question": "Who?", "answers": [{"answer": "a fox"}]}]
LISTED = [{"image": "a.jpg", "question": "Who?", "question_id": "one", "answer": ["x", "y"]}]
GQA = {
    "201": {
        "question": "Who?",
        "imageId": "n1",
        "answer": "no",
        "types": {"structural": "verify", "semantic": "attr"},
    }
}


@pytest.mark.parametrize(
    "questions, answers, expected",
    [
        (VQA, None, Sample(0, "", 9, "Who?")),
        (VQA, VQA_ANSWERS, Sample(0, "", 9, "Who?", ["x", ""], "other", "what")),
        (VIZWIZ, VIZWIZ, Sample("VizWiz_val_01.jpg", "", "VizWiz_val_01.jpg", "Who?", ["a fox"])),
        (LISTED, None, Sample("one", "", "a.jpg", "Who?", ["x", "y"])),
        (GQA, None, Sample("201", "", "n1.jpg", "Who?", ["no"], "verify", "attr")),
    ],
    ids=["vqa", "vqa with answers", "vizwiz", "list", "gqa"],
)
def test_read_questions_of_each_format(questions, answers, expected, tmp_path):
    # The files of VQAv2, VizWiz, GQA and LaVIT's lists, as they are published.
    file = write_any(tmp_path / "q.json", questions)
    truth = None if answers is None else write_any(tmp_path / "a.json", answers)
    assert without_locations(read_questions(file, truth)) == [expected]


@pytest.mark.parametrize(
    "content, expected",
    [
        (COCO, [SEVEN, Sample(0, "", "b.jpg", references=["two"])]),
        (KARPATHY, [SEVEN]),
        ([{"image": COCO_NAME, "caption": ["one", "three"]}], [SEVEN]),
        # Images with equal numbers in two folders are two images.
        (
            [{"image": f"{folder}/1.jpg", "caption": folder} for folder in "abba"],
            [
                Sample(1, "", "a/1.jpg", references=["a", "a"]),
                Sample("b/1.jpg", "", "b/1.jpg", references=["b", "b"]),
            ],
        ),
    ],
    ids=["coco", "karpathy", "lavis", "equal numbers"],
)
def test_read_captions_of_each_format(content, expected, tmp_path):
    # An image has all its references, in whichever order its captions are listed.
    assert without_locations(read_captions(write_any(tmp_path / "c.json", content))) == expected


def test_read_captions_of_texts_to_draw(tmp_path):
    # Lines keep their numbers, so that drawings are found again.
    texts = read_captions(
        write_any(tmp_path / "t.txt", "\ufeffa fox\n\n a hill \n"), each_text=True
    )
    assert [(sample.key, sample.caption) for sample in texts] == [(1, "a fox"), (3, "a hill")]
    # Each text is a sample, also the second one of an image, or one without.
    lines = [{"image": "9.jpg", "text": "a"}, {"image": "9.jpg", "text": "b"}, {"text": "c"}]
    listed = read_captions(write_any(tmp_path / "l.jsonl", lines), each_text=True)
    keys = [(sample.key, sample.image) for sample in listed]
    assert keys == [(9, "9.jpg"), ("item 1", "9.jpg"), ("item 2", None)]


def test_read_captions_with_references_in_another_file(tmp_path):
    # NoCaps' file has no file names.
    path = write_any(tmp_path / "p.json", [{"image": "val/a.jpg", "img_id": 7}])
    truth = write_any(tmp_path / "gt.json", {**COCO, "images": [{"id": 7}]})
    expected = replace(SEVEN, image="val/a.jpg")
    assert without_locations(read_captions(path, truth=truth)) == [expected]


# ---- faults

QUESTION = {"question_id": 2, "question": "Who?", "image": "a.jpg"}
BAD_ITEMS = {
    "not an object": (read_questions, 1, "question"),
    "no id": (read_questions, {**QUESTION, "question_id": None}, "question_id"),
    "no caption": (read_captions, {"image": "a.jpg", "caption": " "}, "references"),
}


@pytest.mark.parametrize("read, item, name", BAD_ITEMS.values(), ids=BAD_ITEMS)
def test_an_unusable_item_does_not_end_the_file(read, item, name, tmp_path):
    # One broken line of a million is counted as bad, with its number.
    good = [{**QUESTION, "question_id": id, "image": f"{id}.jpg", "caption": "a"} for id in (1, 9)]
    first, bad, last = read(write_any(tmp_path / "q.json", [good[0], item, good[1]]))
    assert (first.key, bad.key, last.key) == (1, "item 1", 9)
    assert not first.problem
    assert "q.json: item 1" in bad.problem
    assert f"no {name}" in bad.problem


GENEVAL = {"tag": "single_object", "include": [{"class": "cup", "count": 1}], "prompt": "a cup"}
GENEVAL2 = {"prompt": "two foxes", "vqa_list": [["How many foxes?", "two"]], "skills": ["count"]}
CHOICE = {
    "question_id": "7",
    "data_id": "0.png",
    "question": "Which style?",
    **{f"choice_{letter}": letter for letter in "abcd"},
    "answer": "A",
}
DPG = {
    "item_id": "a",
    "text": "text",
    "proposition_id": "1",
    "dependency": "0",
    "tuple": "entity (fox)",
    "question_natural_language": "A fox?",
}


ABOVE_ITSELF = {"class": "cup", "count": 1, "position": ["above", 0]}


def choices(**changes) -> dict:
    return {"questions": [{**CHOICE, **changes}]}


def write_dpg(path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(DPG))
        writer.writeheader()
        writer.writerows(rows)
    return path


BAD_FILES = {
    # Reader, content, what the error names besides the file.
    "no questions": (read_questions, {"questions": []}, "questions"),
    "equal ids": (read_questions, [QUESTION, QUESTION], "question_id"),
    "geneval: no prompt": (read_object_prompts, [{**GENEVAL, "prompt": 1}], "item 0.*prompt"),
    "geneval: itself": (read_object_prompts, [{**GENEVAL, "include": [ABOVE_ITSELF]}], "cup"),
    "geneval2: skills": (read_geneval2, [{**GENEVAL2, "skills": []}], "item 0.*skills"),
    "seedbench: blank choice": (read_choices, choices(choice_d=" "), "item 0.*choice_d"),
    "seedbench: answer": (read_choices, choices(answer="E"), "item 0.*answer"),
    "dpg: missing parent": (read_dpg, [{**DPG, "dependency": "3"}], "question 1 of a"),
}


@pytest.mark.parametrize("read, content, name", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_of_another_layout_is_named_with_the_fault(read, content, name, tmp_path):
    # Half of a benchmark would be scored, or all of it as wrong.
    write_file = write_dpg if read is read_dpg else write_any
    file = write_file(tmp_path / "data.json", content)
    with pytest.raises(DataError, match=f"(?s)data.json.*{name}"):
        read(file)


def test_samples_without_a_reference_are_of_another_set(tmp_path):
    # Questions of one split with answers of another would score zero.
    questions = write_any(tmp_path / "q.json", [QUESTION, {**QUESTION, "question_id": 3}])
    answers = write_any(tmp_path / "a.json", [{"question_id": 3, "answer": "x"}])
    with pytest.raises(DataError, match=r"a\.json.*q\.json.* 2\b"):
        read_questions(questions, answers)
    captions = write_any(tmp_path / "c.json", [{"image": "9.jpg"}])
    with pytest.raises(DataError, match=r"gt\.json.*c\.json.* 9\b"):
        read_captions(captions, truth=write_any(tmp_path / "gt.json", COCO))


def test_read_dpg_takes_prompts_of_files_and_numbers_of_any_order(tmp_path):
    # The published prompts lie in a folder, and questions refer to later ones.
    rows = [
        {**DPG, "proposition_id": "2", "dependency": "1", "tuple": "entity - part (fox, tail)"},
        DPG,
        {**DPG, "item_id": "b"},
    ]
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "a.txt").write_text("A long text about a fox.\n")
    first, second = read_dpg(write_dpg(tmp_path / "dpg_bench.csv", rows))
    assert (first.caption, second.caption) == ("A long text about a fox.", "text")
    assert [(item.number, item.parents) for item in first.questions] == [(2, {1}), (1, set())]
    assert first.questions[0].category == "entity - part"


def test_prompts_of_nano_have_the_formats_of_the_benchmarks(tmp_path):
    # `seed eval` reads nano's prompts as those of the papers.
    assert prompts.main(["--out", str(tmp_path)]) == 0
    assert len(read_object_prompts(tmp_path / "evaluation_metadata.jsonl")) == 553
    assert len(read_geneval2(tmp_path / "geneval2_data.jsonl")) == 553
    assert len(read_dpg(tmp_path / "dpg_bench.csv")) == 100


def test_find_image_file_by_coco_names(tmp_path):
    # Annotations name images by numbers, COCO's files have twelve digits and the split.
    (tmp_path / "val2014").mkdir()
    noise(0).save(tmp_path / COCO_NAME)
    assert find_image_file(7, tmp_path, tmp_path / "q.json", "here") == tmp_path / COCO_NAME
    with pytest.raises(ImageError, match=r"q\.json: item 3: .*COCO_val2014_000000000009\.jpg"):
        find_image_file(9, tmp_path, tmp_path / "q.json", "q.json: item 3")
