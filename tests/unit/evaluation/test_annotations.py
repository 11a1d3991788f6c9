"""Files of benchmarks: each published format, and the faults that its readers name."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data_files import serve_folder, write_any
from random_images import noise
from yaml_tables import read_tables

from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.errors import DataError, ImageError
from seed_multimodal.evaluation.annotations import (
    Sample,
    read_captions,
    read_questions,
    sample_image,
)
from seed_multimodal.evaluation.choices import read_choices
from seed_multimodal.evaluation.geneval import read_object_prompts
from seed_multimodal.evaluation.tifa import read_dpg, read_geneval2
from seed_multimodal.images.io import image_to_bytes, open_image
from seed_nano.report import prompts

READERS = {
    "questions": read_questions,
    "captions": read_captions,
    "geneval": read_object_prompts,
    "geneval2": read_geneval2,
    "seedbench": read_choices,
    "dpg": read_dpg,
}
TABLES = read_tables(__file__)
COCO_NAME = "val2014/COCO_val2014_000000000007.jpg"


@pytest.mark.parametrize("case", TABLES["published"].values(), ids=TABLES["published"])
def test_read_of_each_format(case, tmp_path):
    # As they are published.
    file = write_any(tmp_path / "data.json", case["content"])
    more = {
        name: write_any(tmp_path / f"{name}.json", content)
        for name, content in case.get("more", {}).items()
    }
    samples = READERS[case["reader"]](file, **more)
    expected = [Sample(location="", **fields) for fields in case["samples"]]
    assert [replace(sample, location="") for sample in samples] == expected


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


# ---- faults

QUESTION = {"question_id": 2, "question": "Who?", "image": "a.jpg"}
ANSWERED = {**QUESTION, "answer": "x"}


@pytest.mark.parametrize("case", TABLES["items"], ids=str)
def test_an_unusable_item_does_not_end_the_file(case, tmp_path):
    # One broken line of a million is counted as bad, with its number.
    good = [{**ANSWERED, "question_id": id, "image": f"{id}.jpg", "caption": "a"} for id in (1, 9)]
    file = write_any(tmp_path / "q.json", [good[0], case["item"], good[1]])
    first, bad, last = READERS[case["reader"]](file)
    assert (first.key, last.key) == (1, 9)
    assert not first.problem and not last.problem
    assert re.search(f"q.json: item 1.*{case['problem']}", bad.problem), bad.problem


def test_an_unusable_answer_of_another_file_is_of_its_question(tmp_path):
    questions = [{**QUESTION, "question_id": id} for id in (1, 2, 3)]
    path = write_any(tmp_path / "q.jsonl", questions)
    answers = [{"question_id": 1, "answer": "x"}, {"question_id": 2, "answer": {}}]
    samples = read_questions(path, write_any(tmp_path / "a.json", [*answers, {"answer": "z"}]))
    assert [sample.references for sample in samples] == [["x"], [], []]
    assert not samples[0].problem
    assert "a.json: item 1: references: " in samples[1].problem
    # Nobody knows whose answer the third one is.
    assert re.search("q.jsonl: line 3: .*a.json.*item 1", samples[2].problem)
    # A row for each reference: only one of them would count.
    more = write_any(tmp_path / "b.json", [answers[0], {"question_id": "1", "answer": "y"}])
    with pytest.raises(DataError, match="b.json: .*question_id 1;"):
        read_questions(path, more)


@pytest.mark.parametrize("case", TABLES["answers"], ids=str)
def test_numbers_and_truth_values_are_texts(case, tmp_path):
    question = {**QUESTION, "answer": case["answer"]}
    [sample] = read_questions(write_any(tmp_path / "q.json", [question]))
    assert (sample.references, sample.problem) == (case["references"], "")
    assert not sample.official


ROWS = [{**QUESTION, "question_id": n, "image": f"{n}.png", "answer": n} for n in range(2)]


def write_table(path, **columns):
    values = [{**row, **columns} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)


# Writes the two questions into a folder.
LISTS = {
    "q.csv": lambda path: path.write_text(
        "question_id,question,image,answer\n0,Who?,0.png,0\n1,Who?,1.png,1\n"
    ),
    "q.jsonl": lambda path: path.write_text(" \n\n".join(map(json.dumps, ROWS)) + "\n   \n"),
    "q.parquet": write_table,
    "content.parquet": lambda path: write_table(
        path, image={"bytes": image_to_bytes(noise(0), "PNG"), "path": None}
    ),
    "q.tar": lambda path: write_shard(
        path,
        [
            (f"{n}", {"png": image_to_bytes(noise(0), "PNG"), "json": json.dumps(row).encode()})
            for n, row in enumerate(ROWS)
        ],
    ),
}


@pytest.mark.parametrize("scheme", ["", "http"])
@pytest.mark.parametrize("name", LISTS)
def test_questions_of_any_format(name, scheme, tmp_path, monkeypatch):
    # As the training reads them; images lie beside the list, on the same server, or in it.
    monkeypatch.setenv("SEED_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "lists"
    folder.mkdir()
    LISTS[name](folder / name)
    for number in range(2):
        noise(0).save(folder / f"{number}.png")
    with serve_folder(folder) as url:
        path = f"{url}/{name}" if scheme else str(folder / name)
        samples = read_questions(path)
        assert [(str(sample.key), sample.references) for sample in samples] == [
            ("0", ["0"]),
            ("1", ["1"]),
        ]
        assert not any(sample.problem for sample in samples)
        for sample in samples:
            image = open_image(sample_image(sample, None, path)).image
            assert image.tobytes() == noise(0).tobytes()


DPG = TABLES["dpg"]


def write_dpg(path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(DPG))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", TABLES["files"])
def test_a_file_of_another_layout_is_named_with_the_fault(name, tmp_path):
    # Half of a benchmark would be scored, or all of it as wrong.
    case = TABLES["files"][name]
    if case["reader"] == "dpg":
        file = write_dpg(tmp_path / "data.csv", case["content"])
    else:
        file = write_any(tmp_path / "data.json", case["content"])
    with pytest.raises(DataError, match=f"(?s){file.name}.*{case['problem']}"):
        READERS[case["reader"]](file)


def test_samples_without_a_reference_are_of_another_set(tmp_path):
    # Questions of one split with answers of another would score zero.
    questions = write_any(tmp_path / "q.json", [QUESTION, {**QUESTION, "question_id": 3}])
    answers = write_any(tmp_path / "a.json", [{"question_id": 3, "answer": "x"}])
    with pytest.raises(DataError, match=r"a\.json.*q\.json.* 2\b"):
        read_questions(questions, answers)
    captions = write_any(tmp_path / "c.json", [{"image": "9.jpg"}])
    coco = TABLES["published"]["coco"]["content"]
    with pytest.raises(DataError, match=r"gt\.json.*c\.json.* 9\b"):
        read_captions(captions, truth=write_any(tmp_path / "gt.json", coco))


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


def test_sample_image_by_coco_names(tmp_path):
    # Annotations name images by numbers, COCO's files have twelve digits and the split.
    (tmp_path / "val2014").mkdir()
    noise(0).save(tmp_path / COCO_NAME)
    file = tmp_path / "q.json"
    assert sample_image(Sample(7, "", 7), tmp_path, file) == tmp_path / COCO_NAME
    assert sample_image(Sample(7, "", "7"), None, file) == tmp_path / COCO_NAME  # of a .csv
    with pytest.raises(ImageError, match=r"q\.json: item 3: .*COCO_val2014_000000000009\.jpg"):
        sample_image(Sample(9, "q.json: item 3", 9), tmp_path, file)
