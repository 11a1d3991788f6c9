"""Unusable records in SEED-X's instruction tuning: skipped, counted and named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tuning_parts as parts

from seed_multimodal.errors import DataError
from seed_multimodal.models.seed_x.train_agent import TuningTask
from seed_multimodal.training.llm.metrics import summary_lines

LONG = "red " * 90


def conversation(*texts: str, image: str = "red.jpg") -> str:
    return json.dumps({"image": image, "data": list(texts)})


def edit(**changes: Any) -> str:
    return json.dumps(
        {
            "source_image": "grey.jpg",
            "target_image": "red.jpg",
            "instruction": "Make it red.",
            **changes,
        }
    )


def chat(*contents: list[Any], roles: tuple[str, ...] = ("user", "assistant")) -> str:
    return json.dumps(
        {
            "messages": [
                {"role": role, "content": content}
                for role, content in zip(roles, contents, strict=True)
            ]
        }
    )


GREY = {"image": "grey.jpg"}
RED = {"image": "red.jpg"}
# The lines of each file, with the reason why a line is skipped (None: it is used).
CONVERSATIONS = [
    (conversation("What is it?", "It is red."), None),
    ("", None),
    ("   ", None),  # not a record
    (conversation("What is it?", "It is <box_start><loc-1><loc-2><loc-3><loc-4><box_end>."), None),
    (conversation("What is it?", "It is red", image="gone.jpg"), "not found below"),
    (conversation("What is it?", "It is red", image="broken.jpg"), "not an image"),
    (conversation("What is it?"), "nothing to learn"),
    (conversation("<image><image> What is it?", "It is red"), "placeholder"),
    (conversation(LONG * 2, "It is red."), " tokens"),  # truncation would drop the answer
    ('{"image": "red.jpg", "data": ["What', "json"),
    ("[1, 2]", "object"),
]
EDITS = [
    (edit(), None),
    (edit(instruction="", image=None), "empty text"),
    (edit(source_image=None), "missing"),
    (edit(target_image="gone.jpg"), "not found below"),
    (edit(instruction=LONG), "not fewer than"),
]
CHATS = [
    (chat([GREY, "Make it red."], [RED]), None),
    (chat([GREY, "Make it <image> red."], [RED]), "placeholder"),
    (chat([GREY, "Make it red."], [LONG, RED]), "do not fit"),
    (chat(["Say red."], roles=("user",)), "wrong role"),
    (chat(["red"], roles=("assistant",)), "wrong role"),
]
FILES = {
    "conversation": ("talks", CONVERSATIONS),
    "edit": ("edits", EDITS),
    "chat": ("turns", CHATS),
}


def write_bad(parts_dir: Path, folder: Path) -> dict[str, Any]:
    """The files and their mixture; the tar is cut short inside its last image."""
    images = folder / "pictures"
    images.mkdir(parents=True)
    for file in (parts_dir / "pictures").iterdir():
        (images / file.name).write_bytes(file.read_bytes())
    (images / "broken.jpg").write_bytes((images / "red.jpg").read_bytes()[:200])
    for name, lines in FILES.values():
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line, _ in lines))
    tar = folder / "captions.tar"
    red = parts.jpeg((200, 30, 30))
    parts.write_tar(
        tar,
        (
            {"jpg": b"none" if position == 3 else red, "txt": caption.encode()}
            for position, caption in enumerate(
                ["a red picture", LONG, "", "a red picture", "cut short"]
            )
        ),
    )
    tar.write_bytes(tar.read_bytes()[: tar.read_bytes().index(b"00004.jpg") + 700])
    data = parts.data_of(parts_dir, packing=True)
    for source in data["sources"]:
        source |= {
            "files": str(folder / Path(source["files"]).name),
            "image_dir": str(images),
            "cycles": 1,
        }
    return data | {"max_bad_in_a_row": 50}


def test_train_counts_and_names_unusable_records(config_of, parts_dir: Path, tmp_path, capsys):
    data = write_bad(parts_dir, tmp_path)
    record = TuningTask.train(config_of(tmp_path / "out", data=data, trainer={"max_steps": 40}))
    sources = record["data"]["sources"]
    summary = summary_lines(record)
    output = capsys.readouterr().out
    for name, (file, lines) in FILES.items():
        skipped = {
            key: value for key, value in sources[name]["skipped"].items() if key != "too long, cut"
        }
        reasons_by_location = {
            location: reason for reason, entry in skipped.items() for location in entry["first"]
        }
        assert sources[name]["sequences"] == sum(
            reason is None and line.strip() != "" for line, reason in lines
        )
        assert sum(entry["count"] for entry in skipped.values()) == sum(
            reason is not None for _, reason in lines
        )
        for position, (_, expected) in enumerate(lines, 1):
            reasons = [
                f"{reason}: {location}"
                for location, reason in reasons_by_location.items()
                if re.search(rf"{file}.jsonl: line {position}\b", location)
            ]
            assert len(reasons) == (expected is not None) and (expected or "") in "".join(
                reasons
            ), (position, reasons_by_location)
    captions = sources["caption"]
    assert captions["sequences"] == 1
    reasons = {
        reason.partition(" into")[0]: entry["first"]
        for reason, entry in captions["skipped"].items()
    }
    for reason, sample in (("its images do not fit", 1), ("empty text", 2), ("broken record", 3)):
        assert any(f"sample {sample:05}" in location for location in reasons[reason]), reasons
    assert re.search(r"captions.tar: .*torn or damaged after sample 00003", output), output
    assert any("gone.jpg" in line for line in summary) and any(
        "do not fit" in line for line in summary
    )


def test_train_fails_without_a_usable_record(config_of, parts_dir: Path, tmp_path):
    data = write_bad(parts_dir, tmp_path)
    data["sources"] = data["sources"][:1]
    data["sources"][0] |= {"cycles": None}
    (tmp_path / "talks.jsonl").write_text(
        conversation("What is it?", "It is red", image="gone.jpg") + "\n"
    )
    with pytest.raises(
        DataError, match=r"Source conversation: no usable record .*talks.jsonl: line"
    ):
        TuningTask.train(config_of(tmp_path / "out", data=data))
