"""Benchmarks' own files: every layout that is taken, pictures by COCO's names, damage named with its place."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from PIL import Image

from seed_multimodal.data.formats.benchmark_files import Annotations, Questions
from seed_multimodal.data.formats.caption_files import read_captions
from seed_multimodal.data.formats.pictures import find_picture
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.errors import DataError, ImageError


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_vqa_files(tmp_path):
    questions = Questions(write(tmp_path / "q.json", {
        "info": {"questions": 3}, "data_subtype": "val2014", "license": {},
        "questions": [{"image_id": 9, "question": "What is it?", "question_id": 9000},
                      {"image_id": 9, "question": "What colour?", "question_id": 9001}]}))
    assert questions.keys == [9000, 9001]
    assert questions.read(1).text == "What colour?" and questions.read(1).picture == 9
    annotations = Annotations(write(tmp_path / "a.json", {"annotations": [
        {"question_id": 9001, "answer_type": "other", "question_type": "what color",
         "answers": [{"answer": "red", "answer_confidence": "yes", "answer_id": 1}] * 10}]}))
    found = annotations.read(9001)
    assert found.answers == ["red"] * 10 and (found.answer_type, found.question_type) == ("other", "what color")
    with pytest.raises(DataError, match="1 of 2 questions are not annotated in it, first question_id 9000"):
        annotations.require(questions)


def test_a_list_as_lavis_writes_it_serves_as_questions_and_as_annotations(tmp_path):
    path = write(tmp_path / "vqa.json", [
        {"image": "a.jpg", "question": "q?", "question_id": "one", "answer": ["x", "y"]},
        {"image": "b.jpg", "question": "q?", "question_id": "two", "answer": "z"}])
    assert Questions(path).read(0).picture == "a.jpg"
    assert Annotations(path).read("one").answers == ["x", "y"] and Annotations(path).read("two").answers == ["z"]


def test_gqas_own_file(tmp_path):
    path = write(tmp_path / "testdev_balanced_questions.json", {
        "201307251": {"semantic": [], "question": "Is it overcast?", "imageId": "n161313", "answer": "no",
                      "types": {"structural": "verify", "semantic": "attr"}},
        "20": 7, "201307252": {"question": "Who is it?", "imageId": "n1", "answer": "girl", "types": None}})
    questions, annotations = Questions(path), Annotations(path)
    assert [(questions.read(row).key, questions.read(row).picture) for row in (0, 2)] == [
        ("201307251", "n161313.jpg"), ("201307252", "n1.jpg")]
    assert annotations.read("201307252").answers == ["girl"]
    found = annotations.read("201307251")
    assert (found.answers, found.answer_type, found.question_type) == (["no"], "verify", "attr")
    annotations.require(questions)
    with pytest.raises(BadRecord, match="item 1: holds a int"):
        questions.read(1)
    with pytest.raises(DataError, match="cannot be read as GQA's questions"):
        Questions(write(tmp_path / "cut.json", path.read_text()[:200]))


def test_vizwiz_names_questions_by_their_pictures(tmp_path):
    path = write(tmp_path / "val.json", [{"image": "VizWiz_val_00000001.jpg", "question": "What is this?",
                                          "answers": [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10}])
    assert Questions(path).keys == ["VizWiz_val_00000001.jpg"]
    assert Annotations(path).read("VizWiz_val_00000001.jpg").answers == ["unanswerable"] * 10


COCO = {"images": [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "annotations": [{"id": 1, "image_id": 7, "caption": "one"}, {"id": 2, "image_id": 8, "caption": "two"},
                        {"id": 3, "image_id": 7, "caption": "three"}]}
KARPATHY = {"dataset": "coco", "images": [
    {"filepath": "val2014", "filename": "COCO_val2014_000000000007.jpg", "cocoid": 7, "split": "test",
     "sentences": [{"raw": "one", "tokens": ["one"]}, {"raw": "three", "tokens": ["three"]}]},
    {"filepath": "val2014", "filename": "x.jpg", "cocoid": 8, "split": "val", "sentences": [{"raw": "two"}]}]}
LAVIS = [{"image": "val2014/COCO_val2014_000000000007.jpg", "caption": ["one", "three"]}]
LAVIS_TRAIN = [{"image": "val2014/COCO_val2014_000000000007.jpg", "caption": one} for one in ("one", "three")]


@pytest.mark.parametrize(("value", "picture"), [
    (COCO, "COCO_val2014_000000000007.jpg"), (KARPATHY, "val2014/COCO_val2014_000000000007.jpg"),
    (LAVIS, "val2014/COCO_val2014_000000000007.jpg"), (LAVIS_TRAIN, "val2014/COCO_val2014_000000000007.jpg")])
def test_caption_files(tmp_path, value, picture):
    first, *others = read_captions(write(tmp_path / "c.json", value))
    assert (first.key, first.picture, first.captions) == (7, picture, ["one", "three"])
    assert [one.captions for one in others] == ([["two"]] if value is COCO else [])


def test_the_first_item_may_be_the_bad_one(tmp_path):
    found = read_captions(write(tmp_path / "k.json", {"images": [17, *KARPATHY["images"]]}))
    assert [one.captions for one in found] == [[], ["one", "three"]] and "item 0: holds a int" in found[0].problem
    named = {"images": [{"id": 7, "file_name": [3]}, *COCO["images"][1:]], "annotations": COCO["annotations"]}
    found = read_captions(write(tmp_path / "c.json", named))
    assert "item 0: names no picture" in found[0].problem and ["two"] in [one.captions for one in found]


def test_a_picture_that_stands_twice_in_karpathys_file_is_one(tmp_path):
    found = read_captions(write(tmp_path / "k.json", {"images": KARPATHY["images"] * 2}))
    assert [(one.key, one.captions) for one in found] == [(7, ["one", "three"] * 2)]


def test_captions_of_two_pictures_with_one_id_are_not_put_together(tmp_path):
    numbered = write(tmp_path / "a.json", [{"image": f"{place}/1.jpg", "caption": text} for place, text in (
        ("a", "a fox"), ("b", "a cat"), ("b", "one cat"), ("a", "one fox"))])
    assert [(one.key, one.captions) for one in read_captions(numbered)] == [
        (1, ["a fox", "one fox"]), ("b/1.jpg", ["a cat", "one cat"])]
    named = write(tmp_path / "b.json", [{"image": name, "image_id": 7, "caption": "a fox"}
                                        for name in ("x.jpg", "y.jpg")])
    whole, bad = read_captions(named)
    assert whole.captions == ["a fox"] and "item 1: has the id 7 of another picture, x.jpg" in bad.problem
    coco = write(tmp_path / "c.json", {"images": [{"id": 7, "file_name": "x.jpg"}, {"id": 7, "file_name": "y.jpg"}],
                                       "annotations": [{"image_id": 7, "caption": "a fox"}]})
    whole, bad = read_captions(coco)
    assert (whole.picture, whole.captions) == ("x.jpg", ["a fox"]) and "another picture, x.jpg" in bad.problem


def test_ground_truth_without_file_names_and_lines_of_text(tmp_path):
    truth = {"annotations": [{"image_id": 7, "caption": "one", "id": 0}], "images": [{"id": 7}]}
    (found,) = read_captions(write(tmp_path / "coco_karpathy_test_gt.json", truth))
    assert (found.key, found.picture, found.captions) == (7, 7, ["one"])
    texts = read_captions(write(tmp_path / "t.txt", "\ufeffa fox\n\n a hill \nfour\u2028and\x0cmore"))
    assert [(one.key, one.captions) for one in texts] == [(1, ["a fox"]), (3, ["a hill"]),
                                                          (4, ["four\u2028and\x0cmore"])]


@pytest.mark.parametrize("pictures", [
    [{"image": "val/a.jpg", "img_id": 7}], [{"image": "val/COCO_val2014_000000000007.jpg"}],
    [{"image": "val/a.jpg", "image_id": 7, "caption": "another"}]])
def test_captions_may_stand_in_a_file_of_their_own(tmp_path, pictures):
    path, truth = write(tmp_path / "p.json", pictures), write(tmp_path / "gt.json", COCO)
    (found,) = read_captions(path, truth=truth)
    assert (found.key, found.picture, found.captions) == (7, pictures[0]["image"], ["one", "three"])
    with pytest.raises(DataError, match="gt.json: has no captions for 1 of 2 pictures of .*p.json, first 9: "):
        read_captions(write(path, [*pictures, {"image": "9.jpg"}]), truth=truth)


def test_a_list_of_texts_to_draw(tmp_path):
    (found,) = read_captions(write(tmp_path / "coco_t2i_eval.json", [{"image": "b/000000000009.jpg", "text": "a fox"}]))
    assert (found.key, found.picture, found.captions) == (9, "b/000000000009.jpg", ["a fox"])


def test_pictures_are_found_by_cocos_names(tmp_path):
    (tmp_path / "val2014").mkdir()
    for name in ("val2014/COCO_val2014_000000000007.jpg", "000000000008.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    for number in (7, 8):
        assert f"{number:012d}" in find_picture(number, tmp_path, tmp_path / "q.json", "here").name
    with pytest.raises(ImageError, match=r"^q.json: item 3: its picture is not there: .*COCO_val2014_000000000009.jpg"):
        find_picture(9, tmp_path, tmp_path / "q.json", "q.json: item 3")


@pytest.mark.parametrize(("value", "sentence"), [
    ("", "is not a json list"), ('{"questions": [{"question_id": 1}', "is not a json list"),
    ({"annotations": []}, "or under 'questions'"), ({"questions": []}, "holds no record")])
def test_what_is_no_file_of_questions_is_refused(tmp_path, value, sentence):
    with pytest.raises(DataError, match=f"q.json: .*{sentence}"):
        Questions(write(tmp_path / "q.json", value))


@pytest.mark.parametrize(("item", "sentence"), [
    (1, "holds a int"), ({"question": "q?"}, "has no question_id"), ({"question_id": True}, "has no question_id"),
    ({"question_id": 1}, "has the question_id 1 of item 0"), ({"question_id": 2, "image": "a"}, "has no question"),
    ({"question_id": 2, "question": "q?"}, "names no picture"),
    ({"question_id": 2, "question": "\ud83d"}, "surrogate")])
def test_a_bad_question_is_one_bad_sample(tmp_path, item, sentence):
    good = [{"question_id": number, "question": "q?", "image": "a.jpg"} for number in (1, 9)]
    questions = Questions(write(tmp_path / "q.json", [good[0], item, good[1]]))
    assert len(questions) == 3 and [questions.read(row).key for row in (0, 2)] == [1, 9]
    with pytest.raises(BadRecord, match=f"q.json: item 1: .*{sentence}"):
        questions.read(1)
    annotations = [{"question_id": number, "answers": ["x"]} for number in (1, 2, 9)]
    Annotations(write(tmp_path / "a.json", annotations)).require(questions)


@pytest.mark.parametrize(("value", "sentence"), [
    ({"images": [{"id": 1}]}, "is not a json list"),
    ({"images": [{**KARPATHY["images"][0], "split": "train"}]}, "no picture of the split 'test'; there are train")])
def test_what_is_no_file_of_captions_is_refused(tmp_path, value, sentence):
    with pytest.raises(DataError, match=f"c.json: .*{sentence}"):
        read_captions(write(tmp_path / "c.json", value))


@pytest.mark.parametrize(("value", "sentence"), [
    ([LAVIS[0], {"image": "a.jpg"}], "item 1: has no caption"),
    ([LAVIS[0], {"caption": "x"}], "item 1: names no picture"),
    ([LAVIS[0], {"image": "a.jpg", "caption": [None]}], "item 1: has no caption"),
    ([LAVIS[0], {"image": "a.jpg", "caption": " "}], "item 1: has no caption"),
    ({"images": [KARPATHY["images"][0], {"sentences": [], "cocoid": 1, "split": "test"}]}, "item 1: has no sentences"),
    ({**COCO, "images": [{"id": None}]}, "item 0: has no id")])
def test_a_bad_item_of_captions_is_one_bad_sample(tmp_path, value, sentence):
    found = read_captions(write(tmp_path / "c.json", value))
    assert [one.captions for one in found if one.key == 7] == [["one", "three"]]
    (bad,) = [one for one in found if one.problem]
    with pytest.raises(BadRecord, match=f"c.json: {sentence}"):
        bad.checked()


@pytest.mark.parametrize("kind", ["jsonl", "base64", "parquet", "paths"])
def test_lists_of_lines_and_rows_with_pictures_in_them(tmp_path, kind):
    held = tmp_path / "b 07.png"
    Image.effect_noise((40, 40), 90).save(held)
    pictures = {"jsonl": "b 07.png", "base64": base64.b64encode(held.read_bytes()).decode(), "paths": "b 07.png",
                "parquet": {"bytes": held.read_bytes(), "path": "b 07.png"}}
    rows = [{"image": pictures[kind], "caption": caption, "question": "q?", "question_id": number}
            for number, caption in enumerate((["one", "two"], None))]
    if kind in ("parquet", "paths"):
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, bad = read_captions(path)
    assert found.captions == ["one", "two"] and found.key == ("line 1" if kind == "base64" else "b 07.png")
    assert ("line 2" if path.suffix == ".jsonl" else "row 1") + ": has no caption" in bad.problem
    data = find_picture(found.picture, None, path, found.name)
    assert data == held.read_bytes() if isinstance(data, bytes) else data == held
    questions = Questions(path)
    assert len(questions) == 2 and find_picture(questions.read(1).picture, None, path, "here") == data


def test_missing_files_name_the_nearest(tmp_path):
    write(tmp_path / "questions.json", [])
    with pytest.raises(DataError, match="did you mean .*questions.json"):
        Questions(tmp_path / "question.json")
    with pytest.raises(DataError, match="there is no such file"):
        read_captions(tmp_path / "nothing.json")
