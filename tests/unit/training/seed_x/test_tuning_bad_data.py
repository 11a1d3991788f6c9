"""Files as they are in the world: the tuning goes on, says what it left out and where, and learns nothing else from
it."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from seed_multimodal.errors import DataError
from seed_multimodal.training.llm.metrics import summary_lines
from seed_multimodal.training.seed_x.tuning import TuningTask

LONG = "red " * 90


def talk(*data: str, image: Any = "red.jpg", **more: Any) -> str:
    return json.dumps({"image": image, "data": list(data), **more})


def edit(**changes: Any) -> str:
    return json.dumps({"source_image": "grey.jpg", "target_image": "red.jpg", "instruction": "Make it red.", **changes})


BOX = "<box_start><loc-1><loc-2><loc-3><loc-{}><box_end>"
# The lines of a file, each with the reason it is left out for (None: it is used).
TALKS = [
    (talk("What is it?", "It is red."), None),
    ("", None), ("   ", None),  # no record at all
    (talk("What is it?", f"It is {BOX.format(4)}."), None),
    (talk("What is it?", "It is red", image="gone.jpg"), "not found below"),
    (talk("What is it?", "It is red", image="broken.jpg"), "not an image"),
    (talk("What is it?", "It is red", image="text.jpg"), "not an image"),
    (talk("What is it?"), "nothing to learn"),
    (talk("<image><image> What is it?", "It is red"), "placeholder"),
    (talk(LONG * 2, "It is red."), " tokens"),  # the answer, or the image before it, would be cut away
    ('{"image": "red.jpg", "data": ["What', "json"),
    ("[1, 2]", "object"),
]
EDITS = [
    (edit(), None), (edit(instruction="", image=None), "empty text"), (edit(source_image=None), "missing"),
    (edit(target_image="gone.jpg"), "not found below"), (edit(instruction=LONG), "not fewer than"),
    (edit(instruction="What?", target_image="grey.jpg"), None)]
TURNS = [
    (json.dumps({"messages": [
        {"role": "user", "content": [{"image": "grey.jpg"}, "Make it red."]},
        {"role": "assistant", "content": [{"image": "red.jpg"}]}]}), None),
    (json.dumps({"messages": [
        {"role": "user", "content": [{"image": "grey.jpg"}, "Make it <image> red."]},
        {"role": "assistant", "content": [{"image": "red.jpg"}]}]}), "placeholder"),
    (json.dumps({"messages": [
        {"role": "user", "content": [{"image": "grey.jpg"}, "Make it red."]},
        {"role": "assistant", "content": [LONG, {"image": "red.jpg"}]}]}), "do not fit"),
    (json.dumps({"messages": [{"role": "user", "content": ["Say red."]}]}), "wrong role"),
    (json.dumps({"messages": [{"role": "assistant", "content": ["red"]}]}), "wrong role")]


def write_bad(parts: ModuleType, home: Path, folder: Path) -> dict[str, Any]:
    """The files and their mixture; the tar is cut short inside its last image."""
    images = folder / "pictures"
    images.mkdir(parents=True)
    for file in (home / "pictures").iterdir():
        (images / file.name).write_bytes(file.read_bytes())
    (images / "broken.jpg").write_bytes((images / "red.jpg").read_bytes()[:200])
    (images / "text.jpg").write_bytes(b"no picture")
    for name, lines in (("talks", TALKS), ("edits", EDITS), ("turns", TURNS)):
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line, _ in lines))
    with tarfile.open(folder / "captions.tar", "w") as tar:
        for number, caption in enumerate(["a red picture", LONG, "", "a red picture", "a red picture"]):
            for extension, data in (("jpg", b"none" if number == 3 else parts.jpeg((200, 30, 30))),
                                    ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number:04}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    whole = (folder / "captions.tar").read_bytes()
    (folder / "captions.tar").write_bytes(whole[:whole.index(b"0004.jpg") + 700])
    data = parts.data_of(home)
    for source in data["sources"]:
        source |= {"files": str(folder / Path(source["files"]).name), "image_dir": str(images), "cycles": 1}
    return data | {"max_bad_in_a_row": 50}


@pytest.mark.parametrize("packing", [False, True])
def test_what_cannot_be_used_is_counted_and_named(packing: bool, parts: ModuleType, home: Path, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    data = write_bad(parts, home, tmp_path) | {"packing": packing}
    record = TuningTask.train(parts.config_of(home, tmp_path / "out", data=data, trainer={"max_steps": 40}))
    sources = record["data"]["sources"]
    lines = summary_lines(record)
    said = capsys.readouterr().out
    for name, file, cases in (("conversation", "talks", TALKS), ("edit", "edits", EDITS), ("chat", "turns", TURNS)):
        left = {key: value for key, value in sources[name]["skipped"].items() if key != "too long, cut"}
        places = {place: reason for reason, entry in left.items() for place in entry["first"]}
        used = sum(reason is None and line.strip() != "" for line, reason in cases)
        if packing:  # padded micro-batches take further positions where a whole one is left out
            assert sources[name]["sequences"] == used
            assert sum(entry["count"] for entry in left.values()) == sum(reason is not None for _, reason in cases)
        for number, (_, reason) in enumerate(cases, 1):
            found = [f"{why}: {place}" for place, why in places.items()
                     if re.search(rf"{file}.jsonl: line {number}\b", place)]
            assert (reason is None and not found) or (reason is not None and found and reason in found[0]), (
                name, number, reason, found, places)
    caption = sources["caption"]
    assert caption["sequences"] == 1 or not packing
    reasons = {reason.partition(" into")[0]: entry["first"] for reason, entry in caption["skipped"].items()}
    for reason, sample in (("its images do not fit", 1), ("empty text", 2), ("broken record", 3)):
        assert any(f"sample {sample:04}" in place for place in reasons[reason]), reasons
    assert re.search(r"captions.tar: .*torn or damaged after sample 0003", said), said
    assert any("gone.jpg" in line for line in lines) and any("do not fit" in line for line in lines)


def test_too_much_of_it_ends_the_run(parts: ModuleType, home: Path, tmp_path: Path) -> None:
    data = write_bad(parts, home, tmp_path)
    data["sources"] = data["sources"][:1]
    data["sources"][0] |= {"batch_size": 1, "cycles": None}
    (tmp_path / "talks.jsonl").write_text("".join(f"{line}\n" for line, reason in TALKS if reason == "not found below"))
    with pytest.raises(DataError, match=r"Source conversation: no usable record .*talks.jsonl: line"):
        TuningTask.train(parts.config_of(home, tmp_path / "out", data=data))
