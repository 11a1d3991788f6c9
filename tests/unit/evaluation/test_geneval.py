"""GenEval: its rules on recorded detections, and the command on nano's scenes."""

from pathlib import Path

import pytest
from data_files import lines
from PIL import Image
from tiny import read_json
from yaml_tables import read_tables

from seed_multimodal.cli.main import main
from seed_multimodal.evaluation.detection import GENEVAL_LIMITS, Detection
from seed_multimodal.evaluation.geneval import kept_detections, read_object_prompts, rule_faults
from seed_nano.world.scene import Scene, render

CASES = read_json(Path(__file__).with_name("geneval_detections.json"))


@pytest.mark.parametrize("case", CASES, ids=[case["case"] for case in CASES])
def test_rules_on_recorded_detections(case, tmp_path):
    # The verdicts of GenEval's own rules.
    [prompt] = read_object_prompts(lines(tmp_path / "p.jsonl", [case["line"]]))
    limit = GENEVAL_LIMITS.threshold
    if prompt.item.tag == "counting":
        limit = GENEVAL_LIMITS.counting_threshold
    # Class, score, box, and the colour if there is one.
    detections = [Detection(*row) for row in case["detections"]]
    assert rule_faults(prompt, kept_detections(detections, limit)) == case["faults"]


BOX = (0, 0, 9, 9)
OVERLAPS = read_tables(__file__)


@pytest.mark.parametrize("case", OVERLAPS.values(), ids=OVERLAPS)
def test_kept_detections_drops_what_overlaps_a_better_one(case):
    # Zero-shot detectors find an object several times: it would be counted so often.
    box, overlap = tuple(case["box"]), case["overlap"]
    better = Detection("cup", 0.9, BOX)
    worse = Detection("cup", 0.8, box)
    other = Detection("bed", 0.7, box)
    for max_overlap, expected in (
        (overlap + 1e-6, [better, worse, other]),
        (overlap, [better, worse, other] if overlap == 1 else [better, other]),
    ):
        assert kept_detections([other, worse, better], 0.7 - 1e-6, max_overlap) == expected
    # A score at the threshold does not count.
    assert kept_detections([other, worse, better], 0.8) == [better]


def test_kept_detections_are_sixteen_of_a_class():
    cups = [Detection("cup", 0.9 - index / 100, (20 * index, 0, 9, 9)) for index in range(20)]
    bed = Detection("bed", 0.5, BOX)
    assert kept_detections([*cups, bed], 0.1) == [*cups[:16], bed]


# ---- the command, with nano as its own judge


def geneval(folder, *more: str) -> int:
    argv = f"eval geneval --data {folder} --judge nano --device cpu --out {folder / 'out'}".split()
    return main([*argv, "--num-images", "2", *more])


def read(folder, name):
    return read_json(folder / "out" / name)


RIGHT = {
    # The kind of a prompt in nano's words, its objects, and a drawing that shows them.
    "colors": (
        [{"class": "fox", "count": 1, "color": "noto"}],
        Scene("noto", "meadow", "large", ("fox",)),
    ),
    "counting": (
        [{"class": "crab", "count": 3}],
        Scene("noto", "meadow", "many", ("crab",), (3,)),
    ),
    "position": (
        [
            {"class": "fox", "count": 1},
            {"class": "tree", "count": 1, "position": ["left of", 0]},
        ],
        Scene("noto", "meadow", "left of", ("tree", "fox")),
    ),
}


@pytest.fixture
def nano_set(tmp_path) -> Path:
    """Prompts, each with a right and a wrong drawing."""
    prompts = (
        {"tag": tag, "prompt": tag, "include": objects} for tag, (objects, _) in RIGHT.items()
    )
    lines(tmp_path / "evaluation_metadata.jsonl", prompts)
    wrong = Scene("noto", "sea", "large", ("ufo",))
    for index, (_, scene) in enumerate(RIGHT.values()):
        folder = tmp_path / "drawings" / f"{index:05d}" / "samples"
        folder.mkdir(parents=True)
        for number, shown in enumerate((scene, wrong)):
            Image.fromarray(render(shown)).save(folder / f"{number:04d}.png")
    return tmp_path


def test_geneval_judges_a_folder_of_drawings(nano_set):
    # The first drawing of each prompt shows it, the second does not.
    drawings = ["--image-folder", str(nano_set / "drawings")]
    assert geneval(nano_set, *drawings, "--limit", "2") == 0
    assert geneval(nano_set, *drawings) == 0  # resumes
    summary = read(nano_set, "summary.json")
    assert list(summary["kinds"]) == list(RIGHT)
    assert {kind["value"] for kind in summary["kinds"].values()} == {0.5}
    assert summary["score"]["n"] == summary["images"] == 6
    assert summary["prompts_correct"] == 1  # one of its drawings is enough
    results = read(nano_set, "results.json")
    assert [result["correct"] for result in results] == [True, False] * 3
    assert results[3]["filename"] == "00001/samples/0001.png"
    assert (nano_set / "out" / "sheet.png").is_file()


def test_geneval_judges_replaced_drawings_again(nano_set):
    # Scores would be those of images that are gone.
    folder = nano_set / "drawings"
    more = ("--image-folder", str(folder), "--limit", "2")
    assert geneval(nano_set, *more) == 0
    # The first prompt's right drawing becomes wrong, the second prompt has none any more.
    right, wrong = sorted((folder / "00000" / "samples").iterdir())
    right.write_bytes(wrong.read_bytes())
    for file in (folder / "00001" / "samples").iterdir():
        file.unlink()
    for n_lines in (4, 5):  # at last the missing one alone is tried again
        assert geneval(nano_set, *more) == 1
        words = (nano_set / "out" / "samples-0.jsonl").read_text().split()
        assert len([word for word in words if word.startswith('{"id"')]) == n_lines
    # Missing images are as many wrong ones as other prompts have.
    assert [result["correct"] for result in read(nano_set, "results.json")] == [False] * 4
    summary = read(nano_set, "summary.json")
    assert (summary["bad"], summary["images"]) == (1, 4)
    assert summary["kinds"]["counting"]["value"] == 0
