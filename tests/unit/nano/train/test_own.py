"""A system of one's own images: what is learned, held out and left out; the whole pipeline."""

import json
import random
import re
import tarfile

import pytest
from llm_runs import environment
from PIL import Image
from real_processes import run_checked
from systems import load

from seed_multimodal.cli.main import main
from seed_multimodal.errors import ConfigError, DataError
from seed_nano.train.own import OwnWorkspace, view_of, write_data
from seed_nano.train.workspace import load_settings

SHORT = "train_images.steps=2 train_images.warmup=1 train_sft.steps=2 train_sft.warmup=1 device=cpu"


@pytest.fixture
def data(tmp_path):
    """Twelve images of two colours with captions, a broken one, and a conversation about each."""
    folder = tmp_path / "toys"
    folder.mkdir()
    chats = []
    for number in range(12):
        colour = ("red", "blue")[number % 2]
        image = Image.new("RGB", (80, 60), colour)
        image.putpixel((number // 2 % 5, 0), (255, 255, 255))  # two of each are copies
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} page")
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}]
        turns.append({"from": "gpt", "value": colour})
        chats.append({"image": f"toys/{number}.png", "conversations": turns})
    Image.new("RGB", (400, 20), "blue").save(folder / "11.png")
    (folder / "broken.png").write_text("no image")
    (folder / "broken.txt").write_text("a broken page")
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    return folder


def space_of(data, tmp_path, *overrides):
    (tmp_path / "own.yaml").write_text(f"data: {data}\nchats: {tmp_path / 'chats.json'}\n")
    settings = load_settings("own", tmp_path / "own.yaml", [*SHORT.split(), *overrides])
    return OwnWorkspace(settings, tmp_path / "run", tmp_path / "system")


def test_held_out_images_are_in_no_conversation(data, tmp_path, capsys):
    space = space_of(data, tmp_path)
    counts = write_data(space)
    learned, held_out = (space.images(part) for part in ("learned", "held_out"))
    assert {row["image"] for row in learned}.isdisjoint(row["image"] for row in held_out)
    assert len(learned) + len(held_out) == 12 and 2 <= len(held_out) <= 4
    assert counts["chats"] == len(learned)
    text = (tmp_path / "run/data/chats.jsonl").read_text()
    assert all(row["image"] in text for row in learned)
    assert not any(row["image"] in text for row in held_out)
    # Too little is said before anything is trained, and what is left out.
    printed = capsys.readouterr().out
    assert "[data] 1 images are more than 3 times as wide" in printed and "11.png …" in printed
    assert "broken.png" in printed and f"only {len(learned)} images" in printed
    assert f"{len(held_out)} conversations about held-out images" in printed


@pytest.mark.parametrize("form", ["../toys/{}", "{}", "/{}", "gone/{}"])
def test_chats_find_their_images_and_keep_held_out_ones_out(data, tmp_path, form, capsys):
    # By a path with `..`, by the name in the folder, absolutely; what is nowhere is named.
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "red"}]
    base = f"{data}/" if form == "/{}" else ""
    rows = [
        {"image": base + form.strip("/").format(f"{n}.png"), "messages": turns} for n in range(12)
    ]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/chats.json").write_text(json.dumps(rows))
    space = space_of(data, tmp_path, f"chats={tmp_path / 'lists/chats.json'}")
    kept = write_data(space)["chats"]
    if form == "gone/{}":
        assert kept == 0 and capsys.readouterr().out.count("gone/") >= 12
    else:
        assert kept == len(space.images("learned")) < 12


def test_conversations_about_held_out_images_of_a_tar_are_left_out(data, tmp_path):
    # These name the pictures as files: their content is the same.
    (data / "broken.png").unlink()
    with tarfile.open(tmp_path / "toys.tar", "w") as tar:
        for file in sorted(data.iterdir()):
            tar.add(file, file.name)
    space = space_of(tmp_path / "toys.tar", tmp_path)
    assert write_data(space)["chats"] == len(space.images("learned")) < 12


@pytest.mark.parametrize("setting", ["held_out=0", "held_out=1", "views=0"])
def test_settings_without_which_nothing_is_learned_are_refused(data, tmp_path, setting):
    with pytest.raises(ConfigError, match=setting[:-2]):
        space_of(data, tmp_path, setting)


def test_an_image_is_held_out_where_others_are_broken(data, tmp_path):
    # Of few images, the broken ones may be those that would be held out.
    for number in range(3, 12):
        (data / f"{number}.png").write_text("no image")
    space = space_of(data, tmp_path)
    write_data(space)
    assert space.images("held_out")


def test_system_messages_of_chats_are_learned(data, tmp_path):
    file = tmp_path / "chats.json"
    chats = json.loads(file.read_text())
    file.write_text(json.dumps([{**chat, "system_prompt": "Be brief."} for chat in chats]))
    space = space_of(data, tmp_path)
    n_kept = write_data(space)["chats"]
    rows = map(json.loads, (space.work / "data/chats.jsonl").read_text().splitlines())
    assert [row.get("system") for row in rows][:n_kept] == ["Be brief."] * n_kept


def test_a_changed_conversation_is_noticed(data, tmp_path):
    before = space_of(data, tmp_path).config.data_state
    file = tmp_path / "chats.json"
    file.write_text(file.read_text().replace('"red"', '"RED"'))
    assert space_of(data, tmp_path).config.data_state != before


def test_copies_of_an_image_are_in_one_part(data, tmp_path):
    space = space_of(data, tmp_path)
    write_data(space)
    contents = [
        {open(row["image"], "rb").read() for row in space.images(part)}
        for part in ("learned", "held_out")
    ]
    assert contents[0].isdisjoint(contents[1])


def test_images_without_captions_are_refused(data, tmp_path):
    for file in data.glob("*.txt"):
        file.unlink()
    with pytest.raises(DataError, match="has no caption"):
        write_data(space_of(data, tmp_path))


def test_a_view_shows_all_of_the_image_nearly_in_its_place():
    image = Image.new("RGB", (200, 100), "white")
    image.paste("red", (80, 40, 120, 60))
    for seed in range(20):
        view = view_of(image, 64, random.Random(seed))
        left, top, right, bottom = view.getchannel("G").point(lambda value: 255 - value).getbbox()
        assert abs((left + right) / 2 - 32) < 6 and abs((top + bottom) / 2 - 32) < 6
        assert 9 <= right - left <= 18 and view.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("fault", ["captions", "chats"])
def test_init_like_nano_refuses_what_cannot_be_learned(data, tmp_path, fault, capsys):
    chats = tmp_path / "chats.json"
    if fault == "captions":
        for file in data.glob("*.txt"):
            file.unlink()
    else:
        chats.write_text(json.dumps([{"title": "no chat"}]))
    flags = ["--data", str(data), "--chats", str(chats)]
    assert main(["init", str(tmp_path / "mine"), "--like", "nano", *flags]) == 2
    named = {"captions": "has no caption", "chats": "is not a conversation"}[fault]
    assert named in capsys.readouterr().err and not (tmp_path / "mine").exists()


@pytest.mark.slow
@pytest.mark.process
def test_init_like_nano_trains_a_system_with_a_report(data, tmp_path, capsys):
    folder = tmp_path / "mine"
    flags = ["--data", str(data), "--chats", str(tmp_path / "chats.json")]
    assert main(["init", str(folder), "--like", "nano", *flags]) == 0
    script = folder / "run.sh"
    assert capsys.readouterr().out.rstrip().endswith(f"Next: bash {script}")
    script.write_text(f"{script.read_text().rstrip()} {SHORT}\n")
    done = run_checked(["bash", str(script)], timeout=300, env=environment())
    assert re.search("Not useful yet: describes 0 of [23] held-out images", done.stdout)
    assert (folder / "system/report/sheet.webp").is_file()
    assert load(folder / "system").describe(data / "1.png")

    # New data are named, and tuned parts stay until they are trained again.
    weights = folder / "system/seed_llama/model.safetensors"
    before = weights.read_bytes()
    Image.new("RGB", (80, 60), "green").save(data / "new.png")
    (data / "new.txt").write_text("a green page")
    done = run_checked(["bash", str(script)], timeout=300, env=environment())
    assert "data was run again" in done.stdout and weights.read_bytes() == before
