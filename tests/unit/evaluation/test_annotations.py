"""Reading questions and captions of benchmark files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from seed_multimodal.errors import DataError, ImageError
from seed_multimodal.evaluation.annotations import find_image_file, read_captions, read_questions

COCO = {
    "images": [
        {"id": 7, "file_name": "COCO_val2014_000000000007.jpg"},
        {"id": 0, "file_name": "b.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "one"},
        {"id": 2, "image_id": 0, "caption": "two"},
        {"id": 3, "image_id": 7, "caption": "three"},
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
LAVIS = [{"image": "val2014/COCO_val2014_000000000007.jpg", "caption": ["one", "three"]}]
LAVIS_TRAIN = [
    {"image": "val2014/COCO_val2014_000000000007.jpg", "caption": text} for text in ("one", "three")
]
NAMED = "val2014/COCO_val2014_000000000007.jpg"


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_read_questions_of_vqa(tmp_path):
    questions = write(
        tmp_path / "q.json",
        {
            "questions": [
                {"question_id": 0, "image_id": 0, "question": "What?"},
                {"question_id": 1, "image_id": 9, "question": "Who? "},
            ]
        },
    )
    assert [
        (sample.key, sample.image, sample.question, sample.references)
        for sample in read_questions(questions)
    ] == [(0, 0, "What?", []), (1, 9, "Who?", [])]
    answers = write(
        tmp_path / "a.json",
        {
            "annotations": [
                {
                    "question_id": id,
                    "answers": [{"answer": "x"}, {"answer": ""}],
                    "answer_type": "other",
                    "question_type": "what",
                }
                for id in (1, 0)
            ]
        },
    )
    first = read_questions(questions, answers)[0]
    assert (first.image, first.references, first.answer_type, first.question_type) == (
        0,
        ["x", ""],
        "other",
        "what",
    )
    write(answers, {"annotations": [{"question_id": 1, "answers": ["x"]}]})
    with pytest.raises(
        DataError, match="has nothing about 1 of 2 samples of .*, first 0: they belong"
    ):
        read_questions(questions, answers)


def test_read_questions_of_lists_gqa_and_vizwiz(tmp_path):
    (listed,) = read_questions(
        write(
            tmp_path / "l.json",
            [{"image": "a.jpg", "question": "q?", "question_id": "one", "answer": ["x", "y"]}],
        )
    )
    assert (listed.key, listed.image, listed.references) == ("one", "a.jpg", ["x", "y"])
    (gqa,) = read_questions(
        write(
            tmp_path / "g.json",
            {
                "201": {
                    "question": "Is it?",
                    "imageId": "n1",
                    "answer": "no",
                    "types": {"structural": "verify", "semantic": "attr"},
                }
            },
        )
    )
    assert (gqa.key, gqa.image, gqa.references, gqa.answer_type, gqa.question_type) == (
        "201",
        "n1.jpg",
        ["no"],
        "verify",
        "attr",
    )
    vizwiz = write(
        tmp_path / "v.json",
        [
            {
                "image": "VizWiz_val_01.jpg",
                "question": "What?",
                "answers": [{"answer": "a fox", "answer_confidence": "yes"}] * 10,
            }
        ],
    )
    for answers in (None, vizwiz):
        (sample,) = read_questions(vizwiz, answers)
        assert (sample.key, sample.image, sample.references) == ("VizWiz_val_01.jpg",) * 2 + (
            ["a fox"] * 10,
        )


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (1, "has no question"),
        ({"question": "q?", "image": "a"}, "no question_id"),
        ({"question_id": 2, "image": "a"}, "no question"),
        ({"question_id": 2, "question": "q?"}, "no image"),
    ],
)
def test_read_questions_with_a_bad_item(tmp_path, item, problem):
    good = [{"question_id": id, "question": "q?", "image": "a.jpg"} for id in (1, 9)]
    samples = read_questions(write(tmp_path / "q.json", [good[0], item, good[1]]))
    assert [sample.key for sample in samples] == [1, "item 1", 9] and not samples[0].problem
    assert "q.json: item 1: " in samples[1].problem and problem in samples[1].problem


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("", "is not json"),
        ({"annotations": []}, "under 'questions'"),
        ({"questions": []}, "holds no json list"),
        (
            [{"question_id": 1, "question": "q?", "image": "a"}] * 2,
            "several questions have one question_id",
        ),
    ],
)
def test_read_questions_of_other_files(tmp_path, value, sentence):
    with pytest.raises(DataError, match=f"q.json: .*{sentence}"):
        read_questions(write(tmp_path / "q.json", value))
    with pytest.raises(DataError, match="did you mean .*q.json"):
        read_questions(tmp_path / "qq.json")


@pytest.mark.parametrize(
    ("value", "image"), [(COCO, NAMED[8:]), (KARPATHY, NAMED), (LAVIS, NAMED), (LAVIS_TRAIN, NAMED)]
)
def test_read_captions(tmp_path, value, image):
    first, *others = read_captions(write(tmp_path / "c.json", value))
    assert (first.key, first.image, first.references) == (7, image, ["one", "three"])
    rest = [(0, "b.jpg", ["two"])] if value is COCO else []
    assert [(sample.key, sample.image, sample.references) for sample in others] == rest


def test_read_captions_of_a_split(tmp_path):
    path = write(tmp_path / "k.json", KARPATHY)
    assert [sample.key for sample in read_captions(path, "val")] == [8]
    with pytest.raises(DataError, match="no image of the split 'train'; there are test, val"):
        read_captions(path, "train")


def test_read_captions_reads_the_split_of_the_truth(tmp_path):
    truth = write(tmp_path / "truth.json", KARPATHY)
    images = write(tmp_path / "images.json", [{"image": "x.jpg", "image_id": 8}])
    (sample,) = read_captions(images, "val", truth)
    assert sample.references == ["two"]


def test_read_captions_of_images_with_equal_numbers(tmp_path):
    path = write(
        tmp_path / "a.json",
        [
            {"image": f"{folder}/1.jpg", "caption": text}
            for folder, text in (("a", "a fox"), ("b", "a cat"), ("b", "one cat"), ("a", "one fox"))
        ],
    )
    assert [(sample.key, sample.references) for sample in read_captions(path)] == [
        (1, ["a fox", "one fox"]),
        ("b/1.jpg", ["a cat", "one cat"]),
    ]


def test_read_captions_of_texts(tmp_path):
    texts = read_captions(write(tmp_path / "t.txt", "\ufeffa fox\n\n a hill \n"))
    assert [(sample.key, sample.image, sample.caption) for sample in texts] == [
        (1, None, "a fox"),
        (3, None, "a hill"),
    ]
    listed = write(
        tmp_path / "l.jsonl",
        "\n".join(
            json.dumps(line)
            for line in (
                {"image": "9.jpg", "text": "a"},
                {"image": "9.jpg", "text": "b"},
                {"text": "c"},
                {"image": "9.jpg", "text": " "},
            )
        ),
    )
    *good, bad = read_captions(listed, each_text=True)
    assert [(sample.key, sample.image, sample.caption) for sample in good] == [
        (9, "9.jpg", "a"),
        ("item 1", "9.jpg", "b"),
        ("item 2", None, "c"),
    ]
    assert "item 3: has no references" in bad.problem


@pytest.mark.parametrize(
    "item",
    [
        {"image": "val/a.jpg", "img_id": 7},
        {"image": NAMED},
        {"image": "val/a.jpg", "image_id": 7, "caption": "another"},
    ],
)
def test_read_captions_with_references_in_another_file(tmp_path, item):
    path = write(tmp_path / "p.json", [item])
    truth = write(tmp_path / "gt.json", {**COCO, "images": [{"id": 7}]})
    (sample,) = read_captions(path, truth=truth)
    assert (sample.key, sample.image, sample.references) == (7, item["image"], ["one", "three"])
    with pytest.raises(DataError, match="has nothing about 1 of 2 samples of .*p.json, first 9: "):
        read_captions(write(path, [item, {"image": "9.jpg"}]), truth=truth)


def test_find_image_file_by_coco_names(tmp_path):
    (tmp_path / "val2014").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / NAMED)
    assert find_image_file(7, tmp_path, tmp_path / "q.json", "here").name == NAMED[8:]
    with pytest.raises(
        ImageError,
        match=r"^q.json: item 3: its image was not found: .*COCO_val2014_000000000009.jpg",
    ):
        find_image_file(9, tmp_path, tmp_path / "q.json", "q.json: item 3")


def test_read_captions_of_texts_names_their_images(tmp_path):
    samples = read_captions(write(tmp_path / "c.json", COCO), each_text=True)
    names = [sample.image for sample in samples]
    assert names == ["COCO_val2014_000000000007.jpg", "b.jpg", "COCO_val2014_000000000007.jpg"]
