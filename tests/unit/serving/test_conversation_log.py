"""The page's log of conversations and votes: the original's format, whole lines."""

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from full_disk import file_size_limit
from PIL import Image

from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.serving.conversation_log import ConversationLog
from seed_multimodal.serving.turns import Picture, Turn


@pytest.fixture()
def turns(tmp_path) -> list[Turn]:
    """A question about an image, and its answer with an image."""
    for name in ("user", "drawn"):
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(tmp_path / f"{name}.png")
    image = Picture(url="data:image/png;base64,…")
    drawing = Picture([5, 6])
    only_shown = Picture()
    for name, picture in {"user": image, "drawn": drawing, "marked": only_shown}.items():
        picture.path = str(tmp_path / f"{name}.png")
    answer = Turn("assistant", ["Here: ", drawing, only_shown], ["a note"], "a cat: no")
    answer.settings = {"seed": 3}
    return [Turn("user", [image, "Put it at night."]), answer]


def records(folder) -> list[dict]:
    (file,) = folder.glob("*-conv.json")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_add_writes_the_originals_keys_and_images(turns, tmp_path):
    # Tools that read the original's logs read these, too.
    log = ConversationLog(tmp_path / "log")
    log.add("upvote", "nano", turns)
    log.add("downvote", "nano", turns)
    assert (tmp_path / "log" / time.strftime("%Y-%m-%d-conv.json")).is_file()
    first, second = records(log.folder)
    user, drawn = (
        hashlib.md5((tmp_path / f"{name}.png").read_bytes()).hexdigest() + ".png"
        for name in ("user", "drawn")
    )
    question = {"text": "<image>Put it at night.", "images": [user], "images_ids": [None]}
    answer = {"text": "Here: <image>", "images": [drawn], "images_ids": [[5, 6]]}
    answer["reasoning"] = "a cat: no"
    state = {
        "system": "",
        "roles": ["USER", "ASSISTANT"],
        "messages": [
            {"role": "USER", "message": question},
            {"role": "ASSISTANT", "message": answer},
        ],
        "offset": 0,
        "sep": "\n",
        "sep2": None,
    }
    others = {"ip": "", "model": "nano", "settings": {"seed": 3}}
    assert first == {"tstamp": first["tstamp"], "type": "upvote", "state": state, **others}
    assert second["type"] == "downvote" and abs(first["tstamp"] - time.time()) < 60
    assert {path.name for path in (log.folder / "images").iterdir()} == {user, drawn}


def test_add_from_threads_writes_whole_lines(turns, tmp_path):
    log = ConversationLog(tmp_path / "log")
    turns[1].parts[0] = "long " * 20_000
    kinds = [f"kind {index}" for index in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda kind: log.add(kind, "nano", turns), kinds))
    assert sorted(record["type"] for record in records(log.folder)) == sorted(kinds)


def test_add_on_a_full_disk_leaves_whole_lines(turns, tmp_path):
    # A torn line would end the reading of the whole file.
    log = ConversationLog(tmp_path / "log")
    log.add("common", "nano", turns)
    (file,) = log.folder.glob("*-conv.json")
    with (
        file_size_limit(file.stat().st_size + 100),
        pytest.raises(DataError),
    ):
        log.add("upvote", "nano", turns)
    log.add("downvote", "nano", turns)
    assert [record["type"] for record in records(log.folder)] == ["common", "downvote"]


def test_a_folder_that_is_not_writable_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"{tmp_path}/file"):
        ConversationLog(tmp_path / "file")
