"""`seed` commands that read and draw images, and `seed convert`, on a tiny system.

Every command with recorded arguments: tests/contract/test_programs.py.
"""

import io
import json
import os
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image
from repository import ROOT
from tensors import equal

from seed_multimodal.cli.main import main

CAT = str(ROOT / "images" / "cat.jpg")
FOX = str(ROOT / "images" / "fox.png")


@pytest.fixture
def bad(tmp_path) -> str:
    path = tmp_path / "broken.png"
    path.write_bytes(Path(FOX).read_bytes()[:300])
    return str(path)


@pytest.fixture
def seed(run_seed, tiny_folder):
    return lambda *flags, model=tiny_folder: run_seed(model, *flags)


def records(lines: list[str]) -> list[dict]:
    return [json.loads(line) for line in lines]


def pixels(path: str | Path) -> bytes:
    return Image.open(path).tobytes()


# ---- images ⇄ codes


def test_tokenize_prints_and_writes_codes_as_they_come(tiny_folder, tmp_path, monkeypatch):
    # A run of thousands that is killed has written what it printed.
    out = tmp_path / "codes.jsonl"
    lines_when_printed = []

    class Printed(io.StringIO):
        def write(self, text) -> int:
            lines_when_printed.append(len(out.read_text().splitlines()))
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Printed())
    flags = f"--json --model {tiny_folder} --device cpu --batch-size 1 --out {out}"
    assert main(["tokenize", CAT, FOX, *flags.split()]) == 0
    assert sys.stdout.getvalue() == out.read_text() and {*lines_when_printed} == {1, 2}
    printed = records(out.read_text().splitlines())
    assert [record["image"] for record in printed] == [CAT, FOX]
    for record in printed:
        assert len(record["codes"]) == 32 and {*record["codes"]} <= {*range(16)}


@pytest.mark.parametrize("command, key", [("tokenize", "codes"), ("describe", "description")])
def test_bad_images_are_named_and_the_others_done(seed, bad, command, key):
    # One torn image among thousands must not end a batch.
    images = (CAT, bad, "nowhere.png", FOX)
    code, lines, errors = seed(command, *images, "--json")
    assert code == 1 and [record["image"] for record in records(lines)] == [CAT, FOX]
    assert all(record[key] for record in records(lines))
    assert "broken.png" in errors and "nowhere.png" in errors
    # A batch of one gives the same.
    assert seed(command, *images, "--json", "--batch-size", 1)[:2] == (1, lines)


@pytest.mark.parametrize(
    "flags, named",
    [
        (("describe", "nowhere.png"), "nowhere.png"),
        (("reconstruct", ROOT), "is a directory"),
        (("ask", ROOT / "README.md", os.devnull, "What?"), "is a text"),
        (("edit", os.devnull, "Put it at night."), "empty"),
    ],
)
def test_wrong_files_are_named_before_a_model_loads(run_seed, flags, named):
    # A model of 13 billion parameters takes minutes to load.
    code, lines, errors = run_seed("absent", *flags)
    assert code == 1 and lines == [] and named in errors


@pytest.mark.parametrize("link", [None, os.symlink, os.link, "file URL"])
@pytest.mark.parametrize(
    "flags", [("tokenize",), ("reconstruct",), ("detect", "fox"), ("edit", "Put it at night.")]
)
def test_a_result_never_replaces_its_input(seed, tmp_path, monkeypatch, flags, link):
    monkeypatch.chdir(tmp_path)
    shutil.copy(FOX, "a.png")
    image = "a.png"
    out = "./a.png"
    if link == "file URL":
        image = Path(image).absolute().as_uri()
    elif link is not None:
        out = "b.png"
        link(image, out)
    command, *text = flags
    code, _, errors = seed(command, image, *text, "--out", out)
    assert code == 2 and "a.png" in errors
    assert Path("a.png").read_bytes() == Path(FOX).read_bytes()


def test_reconstruct_from_the_first_codes(seed, tmp_path):
    flags = ("--steps", 2, "--json", "--out")
    code, lines, _ = seed("reconstruct", CAT, FOX, "--codes", "4,8,32", *flags, tmp_path / "a")
    assert code == 0
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {
        f"{stem}_rebuilt_{n}.png" for stem in ("cat", "fox") for n in (4, 8, 32, "codes")
    }
    seed("reconstruct", FOX, *flags, tmp_path / "whole.png")
    rebuilt = records(lines)[1]["rebuilt"]
    assert pixels(rebuilt["32"]) == pixels(tmp_path / "whole.png") != pixels(rebuilt["4"])


@pytest.mark.parametrize(
    "content, code, named",
    [
        ("not json", 2, "codes.jsonl"),
        ('{"image": "a"}', 2, "codes.jsonl"),
        (f"{[1] * 32}\n{[1] * 31}\n{[99] * 32}", 1, "codes_2, codes_3"),
        (
            "\n".join(f'{{"image": "a.png", "codes": {codes}}}' for codes in ([1] * 32, [1])),
            1,
            "a.png (2)",
        ),
    ],
)
def test_reconstruct_names_wrong_codes(seed, tmp_path, content, code, named):
    # A file that is none ends the command, a wrong line only its image.
    (tmp_path / "codes.jsonl").write_text(content)
    flags = ("--codes-file", tmp_path / "codes.jsonl", "--out", tmp_path)
    actual, lines, errors = seed("reconstruct", *flags)
    assert (actual, len(lines)) == (code, 2 - code) and named in errors


# ---- results


# Names of images whose results would overwrite each other, or could not be written or printed.
NAMES = [
    *("Fox.png", "sub/fox.png", "sub/FOX.gif"),  # equal where case is ignored
    *("a.png", "sub/a.png", "a_rebuilt_2.png", "a_2.png"),  # equal with a number
    *("\u00e9.png", "e\u0301.png"),  # equal letters, composed and not
    *("é" * 120 + "a.png", "é" * 120 + "b.png", "x" * 251 + ".png"),  # too long with a tag
    *("caf\udce9.png", "caf\udcea.png", "a\nb.png", "a\x1bb.png"),  # not UTF-8, not printable
]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_results_of_any_names_are_kept_apart_and_printed(
    tiny_folder, tmp_path, monkeypatch, encoding
):
    # One name in a folder of thousands must neither end the batch nor replace another's result.
    (tmp_path / "sub").mkdir()
    for name in NAMES:
        shutil.copy(FOX, tmp_path / name)
    images = [str(tmp_path / name) for name in NAMES]
    stdout = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    flags = f"--steps 1 --model {tiny_folder} --device cpu --json --out {tmp_path}/out"
    assert main(["reconstruct", *images, *flags.split()]) == 0
    printed = records(stdout.buffer.getvalue().decode(encoding).splitlines())
    assert [record["image"] for record in printed] == images
    written = [path.name for path in (tmp_path / "out").iterdir()]
    assert {Path(record["rebuilt"]).name for record in printed} == {*written}
    assert len({unicodedata.normalize("NFC", name).casefold() for name in written}) == len(NAMES)
    assert all(name.isprintable() and len(os.fsencode(name)) <= 255 for name in written)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.avif", "a.TIF", "a.pdf"])
def test_out_is_a_file_of_any_format_that_pillow_writes(seed, tmp_path, name):
    file = tmp_path / name
    assert seed("draw", "a fox", "--steps", 1, "--out", file)[1] == [f"a fox: {file}"]
    assert file.is_file()


def test_out_is_standard_output(tiny_folder, capsysbinary):
    # `seed draw … --out - | display`: nothing else may be printed there.
    flags = f"--model {tiny_folder} --device cpu --out -".split()
    assert main(["draw", "a fox", "--steps", "1", *flags]) == 0
    assert Image.open(io.BytesIO(capsysbinary.readouterr().out)).size == (16, 16)
    assert main(["tokenize", CAT, FOX, *flags]) == 0
    lines = capsysbinary.readouterr().out.decode().splitlines()
    assert [record["image"] for record in records(lines)] == [CAT, FOX]


# ---- with the language model


def test_draw_names_files_after_texts_and_depends_on_the_seed(seed, tmp_path):
    # Names never leave the folder; equal texts do not overwrite each other.
    out = tmp_path / "deep" / "er"
    flags = ("--steps", 2, "--json", "--out")
    code, lines, _ = seed("draw", "a/b: ../c", "a/b: ../c", "--seed", 1, *flags, out)
    first, second = (record["image"] for record in records(lines))
    assert code == 0 and pixels(first) == pixels(second)
    assert [first, second] == [f"{out}/a_b__.._c.png", f"{out}/a_b__.._c_2.png"]
    seed("draw", "a/b: ../c", "--seed", 2, *flags, tmp_path / "other.png")
    assert pixels(first) != pixels(tmp_path / "other.png")


def test_draw_and_edit_save_several_images(seed, tmp_path):
    flags = ("--seed", 1, "--steps", 2, "--json", "--out", tmp_path)
    code, lines, _ = seed("draw", "a red apple", "a fish", "-n", 3, *flags)
    apples, fishes = (record["image"] for record in records(lines))
    names = ["a_red_apple.png", "a_red_apple_2.png", "a_red_apple_3.png"]
    assert code == 0 and [Path(path).name for path in apples] == names
    assert len({*map(pixels, apples)}) == 3 and len(fishes) == 3
    code, lines, _ = seed("edit", CAT, FOX, "Make it green.", "--num-images", 2, *flags)
    assert code == 0 and [len(record["edited"]) for record in records(lines)] == [2, 2]


# A system and what it cannot do → how stderr names it once, and in the summary of failures.
NOTED = {
    "nano draw zebra": "zebra",
    "nano draw fox ": "item 2",  # an empty text
    "nano edit {image} flip": "cannot make",
    "nano-x detect {image} zebra": "zebra",
}


@pytest.mark.parametrize("command", NOTED)
def test_what_cannot_be_done_is_noted(seed, command):
    # A result alone looks as if the request was followed.
    model, *flags = command.format(image=FOX).split(" ")
    code, lines, errors = seed(*flags, model=model)
    assert len(lines) == 1 and errors.count(NOTED[command]) == 1 + code


# ---- seed chat


def images_of(record) -> list[dict]:
    return [part for part in record["answer"] if "image" in part]


def test_chat_keeps_turns_and_saves_images(seed, tmp_path, monkeypatch):
    out = ("--out", tmp_path)
    flags = "--num-beams 2 --max-new-tokens 40 --force-image --json".split()
    messages = ("--message", "What is this?", "--message", "Now?")
    code, lines, _ = seed("chat", "--image", CAT, *messages, *flags, *out)
    assert code == 0
    assert [record["message"] for record in records(lines)] == ["What is this?", "Now?"]
    first, second = (images_of(record)[0] for record in records(lines))
    for part in (first, second):
        assert len(part["codes"]) == 32 and Image.open(part["image"]).size == (16, 16)
    assert first["image"] == f"{tmp_path}/image_0.png" != second["image"]
    # Another conversation does not overwrite these files; without --json it prints their names.
    before = len(list(tmp_path.iterdir()))
    monkeypatch.setattr(sys, "stdin", open(CAT))  # noqa: SIM115
    _, lines, _ = seed("chat", "--image", "-", "--message", "Draw!", "--force-image", *out)
    assert f"{tmp_path}/image_{before}.png" in "\n".join(lines)
    # Of nano's "a fox: yes - In the middle." the answer is printed.
    command = ("chat", "--image", FOX, "--message", "Where is the fox?")
    _, lines, _ = seed(*command, model="nano")
    (record,) = records(seed(*command, "--json", model="nano")[1])
    assert record["reasoning"] == "a fox: yes" and record["answer"] == [{"text": lines[0].strip()}]


def test_chat_reads_lines(seed, bad, monkeypatch):
    commands = [f"/image {bad}", f"/image {CAT}", "What is this?", "/reset"]
    commands += ["/image", "/draw", "", "/draw Hello", "/quit", "no"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(commands)))
    code, lines, errors = seed("chat", "--json")
    assert code == 0
    assert [record["message"] for record in records(lines)] == ["What is this?", "Hello"]
    assert "broken.png" in errors
    assert errors.count("/reset") == 3  # the help, also at commands that lack something
    assert images_of(records(lines)[1])


def test_names_are_printed_in_one_line(seed, tmp_path):
    # Programs read a result a line.
    image = tmp_path / "a\nb.png"
    shutil.copy(FOX, image)
    code, lines, _ = seed("tokenize", str(image))
    assert code == 0 and len(lines) == 1 and "a\\nb.png: " in lines[0]


def test_debug_shows_the_traceback():
    from seed_multimodal.errors import CheckpointError

    with pytest.raises(CheckpointError):
        main(f"describe {CAT} --model /no/such/model --debug".split())


# ---- convert


def test_convert_writes_safetensors_once(capsys, tmp_path):
    from safetensors.torch import load_file

    old = tmp_path / "old.pt"
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.int64)}
    torch.save({"model": tensors}, old)
    assert main(["convert", str(old), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 6
    loaded = load_file(tmp_path / "old.safetensors")
    assert loaded.keys() == tensors.keys()
    assert equal(tensors, loaded)
    assert main(["convert", str(old)]) == 2 and "old.safetensors" in capsys.readouterr().err
    assert main(["convert", str(old), "--force"]) == 0
