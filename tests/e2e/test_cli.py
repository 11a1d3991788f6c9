"""The console command, the scripts with the original names, the quickstart: on a tiny system with random weights."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import warm_python
from PIL import Image

from seed_multimodal import disk
from seed_multimodal.cli import build_parser, main
from seed_multimodal.commands import pictures
from seed_multimodal.commands.chat import Talk
from seed_multimodal.commands.common import Outcomes, OutputNames
from seed_multimodal.errors import CheckpointError, GenerationError, RequestError
from seed_multimodal.language.answer import TextPart
from seed_multimodal.systems.chat import Answer, DrawnPart
from seed_multimodal.systems.seed_llama import SeedLlama
from seed_multimodal.weights import load_state_dict
from seed_nano import quickstart
from seed_nano.world.splits import held_out
from seed_nano.world.things import write_known_words
from seed_nano.world.words import scene_of

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "images"
CAT, FOX = str(IMAGES / "cat.jpg"), str(IMAGES / "fox.png")


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> str:
    return str(tiny_folder)


def talk_of(folder: str, out: Path) -> Talk:
    return Talk(SeedLlama.from_pretrained(folder, device="cpu", log=None),
                build_parser().parse_args(["chat", "--out", str(out)]))


@pytest.fixture
def bad(tmp_path) -> str:
    path = tmp_path / "broken.png"
    path.write_bytes(Path(FOX).read_bytes()[:300])
    return str(path)


def run(capsys, *arguments: str) -> tuple[int, list[str], str]:
    """Exit code, lines of stdout, stderr."""
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def script(name: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([warm_python.PYTHON, str(ROOT / "scripts" / name), "--device", "cpu", *arguments], cwd=cwd,
                          capture_output=True, text=True, timeout=170)


# ---- pictures ⇄ codes


def test_tokenize_gives_32_codes_a_picture(capsys, tiny, tmp_path):
    out = tmp_path / "codes.jsonl"
    code, lines, errors = run(capsys, "tokenize", CAT, FOX, "--model", tiny, "--json", "--out", str(out))
    records = [json.loads(line) for line in lines]
    assert code == 0
    assert [record["picture"] for record in records] == [CAT, FOX]
    assert all(len(r["codes"]) == 32 and all(0 <= c < 16 for c in r["codes"]) for r in records)
    assert [json.loads(line) for line in out.read_text().splitlines()] == records
    assert "Running on cpu" in errors  # where it ran is said, but not among the results


def test_one_bad_picture_does_not_stop_the_others(capsys, tiny, bad):
    code, lines, errors = run(capsys, "tokenize", CAT, bad, "nowhere.png", FOX, "--model", tiny, "--batch-size", "1")
    assert code == 1
    assert [line.split(":")[0] for line in lines] == [CAT, FOX]
    assert "broken.png" in errors and "nowhere.png" in errors and "2 of 4 done, 2 refused" in errors
    assert "Traceback" not in errors


def test_batches_do_not_change_codes(capsys, tiny):
    _, together, _ = run(capsys, "tokenize", CAT, FOX, CAT, "--model", tiny)
    _, single, _ = run(capsys, "tokenize", CAT, FOX, CAT, "--model", tiny, "--batch-size", "1")
    assert together == single


def test_reconstruct_from_pictures_and_from_their_codes_is_the_same(capsys, tiny, tmp_path):
    codes = tmp_path / "codes.jsonl"
    run(capsys, "tokenize", CAT, FOX, "--model", tiny, "--out", str(codes))
    code, lines, _ = run(capsys, "reconstruct", CAT, FOX, "--model", tiny, "--out", str(tmp_path / "a"), "--json")
    assert code == 0
    paths = [Path(json.loads(line)["rebuilt"]) for line in lines]
    assert [p.name for p in paths] == ["cat_rebuilt.png", "fox_rebuilt.png"]
    code, _, _ = run(capsys, "reconstruct", "--codes", str(codes), "--model", tiny, "--out", str(tmp_path / "b"))
    assert code == 0
    for path in paths:
        assert Image.open(path).tobytes() == Image.open(tmp_path / "b" / path.name).tobytes()


def test_reconstruct_from_the_first_codes(capsys, tiny, tmp_path):
    flags = ("--model", tiny, "--steps", "2", "--json", "--out")
    code, lines, _ = run(capsys, "reconstruct", CAT, FOX, "--codes", "4,8,32", *flags, str(tmp_path / "a"))
    records = [json.loads(line) for line in lines]
    assert code == 0 and [list(record["rebuilt"]) for record in records] == 2 * [["4", "8", "32"]]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(
        f"{stem}_rebuilt_{end}.png" for stem in ("cat", "fox") for end in (4, 8, 32, "codes"))
    assert all(Image.open(record["sheet"]).width > 3 * 128 for record in records)
    run(capsys, "reconstruct", FOX, *flags, str(tmp_path / "whole.png"))
    code, lines, _ = run(capsys, "reconstruct", FOX, "--codes", "8", *flags, str(tmp_path / "eight.png"))
    assert json.loads(lines[0])["from_codes"] == 8
    pixels = {name: Image.open(path).tobytes() for name, path in (
        ("whole", tmp_path / "whole.png"), ("eight", tmp_path / "eight.png"), *records[1]["rebuilt"].items())}
    _, lines, _ = run(capsys, "reconstruct", FOX, "--codes", "8, 8", *flags, str(tmp_path / "again.png"))
    assert json.loads(lines[0])["rebuilt"] == str(tmp_path / "again.png")  # one number, given twice
    assert pixels["whole"] == pixels["32"] and pixels["eight"] == pixels["8"] and len(set(pixels.values())) == 3


@pytest.mark.parametrize(("given", "words"), [
    (("--codes", "33"), "The number of codes to draw from must be at most 32, not 33."),
    (("--codes", "8,16", "--out", "one.png"), "one file for 2 pictures"),
    (("--codes", "nowhere.jsonl"), "--codes takes numbers of codes here, as 8 or 4,8,16,32, not 'nowhere.jsonl'"),
    (("--codes=-1",), "not '-1'"), (("--codes", "4.5"), "not '4.5'"), (("--codes", ""), "not ''"),
])
def test_numbers_of_codes_that_cannot_be_are_refused(capsys, tiny, given, words):
    code, lines, errors = run(capsys, "reconstruct", FOX, "--model", tiny, *given)
    assert (code, lines) == (2, []) and words in errors
    for odd in ("0", "8,", "8,-1"):
        with pytest.raises(SystemExit):
            main(["draw", "a cat", "--model", tiny, "--codes", odd])
    assert capsys.readouterr().err.count("argument --codes: must be a whole number, 1 or more") == 3


def test_codes_are_drawn_as_strips(capsys, tiny, tmp_path):
    from seed_multimodal.images.sheet import UNKNOWN, above_strip, code_colour, code_strip

    code, _, _ = run(capsys, "tokenize", CAT, FOX, "--model", tiny, "--save-plot", str(tmp_path / "codes.png"))
    assert code == 0 and Image.open(tmp_path / "codes.png").width > 6 * 88
    assert code_colour(5, 16) == code_colour(21, 16) and len({code_colour(code, 64) for code in range(64)}) == 64
    strip = code_strip([3, 7, 3, 9], 16, first=3, cell=4, gap=1)
    cells = [strip.getpixel((x, 2)) for x in (2, 7, 12, 17)]
    assert cells[0] == cells[2] == (*code_colour(3, 16), 255) != cells[1] and cells[3] == UNKNOWN
    assert above_strip(Image.new("RGB", (8, 4)), strip, 6).size == (19, 10 + 6 + 4)


@pytest.mark.parametrize("name", ["codes", "folder.png", "", "file.txt/codes.png"])
def test_a_place_that_no_strips_can_be_written_to_is_refused_first(capsys, tiny, tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.txt").touch()
    place = str(tmp_path / name) if name else ""
    code, lines, errors = run(capsys, "tokenize", CAT, "--model", tiny, "--save-plot", place)
    assert (code, lines) == (2, []) and errors.count("\n") == 1


def test_codes_are_kept_when_their_strips_cannot_be_drawn(capsys, tiny, tmp_path, bad, monkeypatch):
    plot, out = tmp_path / "codes.png", tmp_path / "codes.jsonl"
    assert run(capsys, "tokenize", bad, "--model", tiny, "--save-plot", str(plot))[0] == 1 and not plot.exists()
    plot.write_bytes(b"of yesterday")
    monkeypatch.setattr(disk.os, "fsync", full)
    code, _, errors = run(capsys, "tokenize", CAT, "--model", tiny, "--save-plot", str(plot), "--out", str(out))
    assert code == 2 and f"{plot}: cannot be written (the disk or quota is full" in errors
    assert len(json.loads(out.read_text())["codes"]) == 32 and plot.read_bytes() == b"of yesterday"


def test_the_strips_of_very_many_pictures_are_the_first_ones(capsys, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_STRIPS", 2)
    plot = str(tmp_path / "codes.png")
    code, lines, errors = run(capsys, "tokenize", CAT, FOX, CAT, "--model", tiny, "--save-plot", plot)
    assert (code, len(lines)) == (0, 3) and f"{plot} shows the first 2 of 3 pictures." in errors
    assert Image.open(plot).height < 3 * 88


def full(*_: object) -> None:
    """A disk without room."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_reconstruct_refuses_bad_codes_one_by_one(capsys, tiny, tmp_path):
    codes = tmp_path / "codes.jsonl"
    codes.write_text(json.dumps([1] * 32) + "\n" + json.dumps([1] * 31) + "\n" + json.dumps([99] * 32) + "\n"
                     + json.dumps(["x"] * 32) + "\n")
    code, lines, errors = run(capsys, "reconstruct", "--codes", str(codes), "--model", tiny, "--out", str(tmp_path))
    assert (code, len(lines)) == (1, 1)
    assert all(f"codes_{n}" in errors for n in (2, 3, 4)) and "1 of 4 done" in errors


@pytest.mark.parametrize("content", ["not json", '{"picture": "a"}', ""])
def test_reconstruct_refuses_a_file_that_holds_no_codes(capsys, tiny, tmp_path, content):
    codes = tmp_path / "codes.jsonl"
    codes.write_text(content)
    code, _, errors = run(capsys, "reconstruct", "--codes", str(codes), "--model", tiny)
    assert code == 2 and "codes.jsonl" in errors and errors.count("\n") == 1


def test_a_folder_may_be_called_like_a_picture_and_must_be_writable(capsys, tiny, tmp_path):
    old = tmp_path / "fox.png"
    old.write_bytes(b"a picture")
    code, _, errors = run(capsys, "reconstruct", FOX, "--model", tiny, "--out", f"{old}/")
    assert code == 2 and errors == f"seed: {old}: cannot be written (Not a directory).\n"
    assert old.read_bytes() == b"a picture"
    code, lines, _ = run(capsys, "reconstruct", FOX, "--model", tiny, "--out", f"{tmp_path}/new.png/", "--steps", "1")
    assert code == 0 and lines == [f"{FOX}: {tmp_path}/new.png/fox_rebuilt.png"]


def test_results_never_share_a_name(capsys, tiny, tmp_path):
    code, lines, _ = run(capsys, "reconstruct", CAT, CAT, "--model", tiny, "--out", str(tmp_path / "out"))
    assert code == 0 and len(list((tmp_path / "out").iterdir())) == 2
    code, _, errors = run(capsys, "reconstruct", CAT, FOX, "--model", tiny, "--out", str(tmp_path / "one.png"))
    assert code == 2 and "one file for 2 pictures" in errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apple.gif", "apple.pgn", "apple.SVG"])
def test_a_file_of_no_picture_format_is_refused_before_drawing(capsys, tiny, tmp_path, name):
    out = tmp_path / name
    code, lines, errors = run(capsys, "draw", "a cat", "--model", tiny, "--out", str(out))
    assert code == 2 and not lines and not out.exists()
    assert f"{out.suffix} is no picture format" in errors and f"{out}/ for a folder" in errors
    for folder in (f"{out}/", str(out), str(tmp_path / "drawn.v2")):  # said to be one; is one by now; not like a file
        code, lines, _ = run(capsys, "draw", "a cat", "--model", tiny, "--out", folder)
        assert code == 0 and (Path(folder) / "a_cat.png").is_file()


@pytest.mark.parametrize("name", ["trial.run", "drawn.v2", "results.old", "a.exp", "2026.nov", "night.log"])
def test_a_folder_may_have_a_dot_in_its_name(tmp_path, name):
    assert OutputNames(str(tmp_path / name), "", 2).next("a cat") == tmp_path / name / "a_cat.png"


# ---- words and pictures


def test_describe_and_ask(capsys, tiny, bad):
    code, lines, errors = run(capsys, "describe", CAT, bad, "--model", tiny, "--json")
    assert code == 1 and "broken.png" in errors
    assert set(json.loads(lines[0])) == {"picture", "description"} and len(lines) == 1
    code, lines, _ = run(capsys, "ask", CAT, FOX, "What is this?", "--model", tiny, "--json", "--max-new-tokens", "4")
    assert code == 0 and [json.loads(line)["question"] for line in lines] == ["What is this?"] * 2


def test_draw_follows_the_seed(capsys, tiny, tmp_path):
    pictures = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        code, _, _ = run(capsys, "draw", "a red apple", "--model", tiny, "--seed", seed, "--steps", "2",
                         "--out", str(tmp_path / f"{name}.png"))
        assert code == 0
        pictures[name] = Image.open(tmp_path / f"{name}.png").tobytes()
    assert pictures["a"] == pictures["b"] != pictures["c"]


def test_draw_from_the_first_codes(capsys, tiny, tmp_path):
    code, lines, _ = run(capsys, "draw", "a red apple", "--model", tiny, "--steps", "2", "--json", "--codes", "8,32",
                         "--out", str(tmp_path))
    record = json.loads(lines[0])
    run(capsys, "draw", "a red apple", "--model", tiny, "--steps", "2", "--out", str(tmp_path))
    drawn = {count: Image.open(path).tobytes() for count, path in record["picture"].items()}
    assert code == 0 and drawn["8"] != drawn["32"] == Image.open(tmp_path / "a_red_apple.png").tobytes()
    assert Path(record["sheet"]).name == "a_red_apple_codes.png"


def test_unknown_words_are_told_beside_the_results(capsys, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "nano")
    settings = json.loads((tmp_path / "nano" / "system.json").read_text())
    (tmp_path / "nano" / "system.json").write_text(json.dumps({**settings, "known_words": "known.json"}))
    write_known_words(tmp_path / "nano" / "known.json")
    code, lines, errors = run(capsys, "draw", "a zebra", "--model", str(tmp_path / "nano"), "--steps", "1", "--json",
                              "--out", str(tmp_path))
    assert code == 0 and [json.loads(line)["text"] for line in lines] == ["a zebra"]
    assert "This system does not know 'zebra': it learned " in errors


def test_draw_names_files_after_their_words(capsys, tiny, tmp_path):
    code, _, _ = run(capsys, "draw", "a/b: ../c", "a/b: ../c", "--model", tiny, "--out", str(tmp_path / "deep" / "er"))
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == ["a_b__.._c.png", "a_b__.._c_2.png"]


def test_edit_saves_a_picture(capsys, tiny, tmp_path):
    code, lines, _ = run(capsys, "edit", CAT, "Make it green.", "--model", tiny, "--out", str(tmp_path), "--json")
    record = json.loads(lines[0])
    assert code == 0 and Path(record["edited"]).name == "cat_edited.png"
    assert Image.open(record["edited"]).size == (16, 16)


def test_the_limit_of_tokens_and_beams_are_followed_everywhere(capsys, tiny, tmp_path):
    whole = ("--model", tiny, "--out", str(tmp_path), "--json")
    for words in (("draw", "a cat"), ("edit", CAT, "Make it green.")):
        code, _, errors = run(capsys, *words, *whole, "--max-new-tokens", "20")
        assert code == 2 and "A picture needs 33 new tokens: max_new_tokens 20 is too small" in errors
        assert run(capsys, *words, *whole, "--max-new-tokens", "40", "--num-beams", "2")[0] == 0
    code, lines, _ = run(capsys, "chat", "--message", "hello", *whole, "--num-beams", "2", "--max-new-tokens", "8")
    assert code == 0 and json.loads(lines[0])["answer"]
    code, _, _ = run(capsys, "ask", CAT, "What?", "--model", tiny, "--temperature", "0.7", "--top-p", "0")
    assert code == 0


def test_a_place_that_cannot_be_written_is_told(capsys, tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, errors = run(capsys, "edit", CAT, "Make it green.", "--model", tiny, "--out", str(tmp_path / "file" / "x"))
    assert code == 2 and "cannot be written" in errors and "Traceback" not in errors


def test_chat_remembers_turns(capsys, tiny, tmp_path):
    code, lines, _ = run(capsys, "chat", "--model", tiny, "--image", CAT, "--message", "What is this?",
                         "--message", "And now?", "--out", str(tmp_path), "--json")
    turns = [json.loads(line) for line in lines]
    assert code == 0 and [turn["message"] for turn in turns] == ["What is this?", "And now?"]
    assert all(set(part) <= {"text", "codes", "picture", "broken"} for turn in turns for part in turn["answer"])


def test_chat_saves_the_pictures_of_its_answers(capsys, tiny, tmp_path):
    code, lines, _ = run(capsys, "chat", "--model", tiny, "--force-image", "--message", "Draw!", "--message", "Again!",
                         "--out", str(tmp_path), "--json")
    drawn = [part for line in lines for part in json.loads(line)["answer"] if "picture" in part]
    assert code == 0 and [Path(part["picture"]).name for part in drawn[:1]] == ["turn_1.png"] and len(drawn) >= 2
    assert all(len(part["codes"]) == 32 and Image.open(part["picture"]).size == (16, 16) for part in drawn)
    code, lines, _ = run(capsys, "chat", "--model", tiny, "--force-image", "--message", "Draw!", "--out", str(tmp_path))
    assert code == 0 and "[picture: " in "\n".join(lines)


def test_chat_puts_one_blank_between_words_and_pictures(capsys, tiny, tmp_path):
    events = [{"type": "image", "codes": [1], "image": None}, {"type": "text", "text": "Here"},
              {"type": "text", "text": " it is."}, {"type": "image", "codes": [1], "image": None},
              {"type": "image_broken", "reason": "31 codes"}, {"type": "done", "answer": Answer(())}]
    talk = talk_of(tiny, tmp_path)
    for _ in range(2):
        talk._follow(iter(events))
    assert capsys.readouterr().out == 2 * "[picture: not drawn] Here it is. [picture: not drawn] [31 codes]\n"


def test_chat_replaces_a_preview_by_the_picture(capsys, tiny, tmp_path):
    def shown(grey: int, kind: str = "image_preview") -> dict:
        return {"type": kind, "codes": [1] * (32 if kind == "image" else 8), "image": Image.new("L", (4, 4), grey)}

    talk = talk_of(tiny, tmp_path)
    parts, _ = talk._follow(iter([shown(9), shown(80), shown(200, "image"), shown(9), shown(100, "image")]))
    names = [tmp_path / "turn_1.png", tmp_path / "turn_1_2.png"]
    assert [part["picture"] for part in parts] == list(map(str, names)) and len(list(tmp_path.iterdir())) == 2
    assert [Image.open(name).getpixel((0, 0)) for name in names] == [200, 100]
    assert capsys.readouterr().out.startswith(f"[after 8 codes: {names[0]}] [after 8 codes: {names[0]}] [picture: ")


def test_chat_leaves_no_preview_of_a_picture_that_never_came(capsys, tiny, tmp_path):
    def events(end: type[BaseException] | None) -> Iterator[dict]:
        for kind in ("image", "image_preview"):
            yield {"type": kind, "codes": [1] * 8, "image": Image.new("L", (4, 4))}
        if end:
            raise end
        yield {"type": "image_broken", "reason": "31 codes"}
        yield {"type": "done", "answer": Answer(())}

    for number, end in enumerate((None, KeyboardInterrupt, GenerationError)):
        talk = talk_of(tiny, tmp_path / str(number))
        with pytest.raises(end) if end else contextlib.nullcontext():
            talk._follow(events(end))
        assert [file.name for file in (tmp_path / str(number)).iterdir()] == ["turn_1.png"]
        assert "turn_1_2.png" in capsys.readouterr().out


def test_chat_says_what_it_does_not_know(capsys, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/imgae a.png\n/image\n/images\n/reset now\n/usr/bin is a folder.\n"))
    code, lines, errors = run(capsys, "chat", "--model", tiny, "--out", str(tmp_path), "--json")
    assert code == 0 and [json.loads(line)["message"] for line in lines] == ["/usr/bin is a folder."]
    assert "There is no command /imgae. Type a message;" in errors and "no command /images." in errors
    assert "/image needs a file" in errors and "/reset must be alone on its line." in errors
    assert "no command /reset" not in errors and "A new conversation" not in errors


def test_chat_reads_lines_and_survives_a_bad_picture(capsys, tiny, tmp_path, monkeypatch, bad):
    typed = f"/image {bad}\n/image {CAT}\nWhat is this?\n/reset\n\nHello\n/quit\nnever said\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    code, lines, errors = run(capsys, "chat", "--model", tiny, "--out", str(tmp_path), "--json")
    assert code == 0 and "broken.png" in errors
    assert [json.loads(line)["message"] for line in lines] == ["What is this?", "Hello"]


def test_chat_prints_plainly(capsys, tiny, tmp_path):
    _, as_json, _ = run(capsys, "chat", "--model", tiny, "--message", "Hello", "--out", str(tmp_path / "a"), "--json")
    _, plain, _ = run(capsys, "chat", "--model", tiny, "--message", "Hello", "--out", str(tmp_path / "b"))
    said = [part["text"] for part in json.loads(as_json[0])["answer"] if "text" in part]
    assert all(text in "\n".join(plain) for text in said)


# ---- refusals


@pytest.mark.parametrize(("words", "program", "hint"), [
    (["reconstruct", CAT, "--output", "x"], "seed reconstruct", "--output x (did you mean '--out'?)"),
    (["draw", "a cat", "--modle=nano"], "seed draw", "--modle=nano (did you mean '--model'?)"),
    (["data", "check", "x.json", "--imgs", "."], "seed data check", "--imgs . (did you mean '--images'?)"),
    (["convert", "a.pt", "b.safetensors", "c"], "seed convert", "unrecognized arguments: c\n"),
])
def test_an_unknown_option_ends_with_the_usage_of_its_command(capsys, words, program, hint):
    with pytest.raises(SystemExit) as ended:
        main(words)
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert errors.startswith(f"usage: {program} ") and f"{program}: error: " in errors and hint in errors


def test_a_folder_of_pictures_that_is_not_there_is_one_sentence(capsys, tmp_path):
    records = tmp_path / "talk.json"
    records.write_text('[{"image": "a.png", "conversations": []}]')
    code, lines, errors = run(capsys, "data", "check", str(records), "--images", str(tmp_path / "nowhere"))
    assert (code, lines) == (2, []) and errors == f"seed: --images {tmp_path}/nowhere: there is no such folder.\n"


def test_an_unknown_model_is_one_sentence(capsys):
    code, lines, errors = run(capsys, "describe", CAT, "--model", "/no/such/model")
    assert code == 2 and not lines
    assert errors.startswith("seed: /no/such/model") and errors.count("\n") == 1
    with pytest.raises(CheckpointError):
        main(["describe", CAT, "--model", "/no/such/model", "--debug"])


def test_options_out_of_range_are_one_sentence(capsys, tiny):
    for flags in (["--temperature", "-1"], ["--device", "toaster"], ["--dtype", "float3"]):
        code, _, errors = run(capsys, "describe", CAT, "--model", tiny, *flags)
        assert code == 2 and "Traceback" not in errors and errors.splitlines()[-1].startswith("seed: ")


def test_a_damaged_system_is_one_sentence(capsys, tiny, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny, folder)
    weights = folder / "seed_tokenizer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    code, _, errors = run(capsys, "tokenize", CAT, "--model", str(folder))
    assert code == 2 and "model.safetensors" in errors and "Traceback" not in errors


@pytest.mark.process
def test_the_command_runs_as_a_module_and_without_torch():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "seed_multimodal", "--help"], cwd=ROOT / "src",
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "reconstruct" in done.stdout
    assert "| torch\n" not in done.stderr and "| transformers\n" not in done.stderr


# ---- convert


def test_convert_writes_safetensors_once(capsys, tmp_path):
    old = tmp_path / "old.pt"
    torch.save({"model": {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.int64)}}, old)
    code, lines, _ = run(capsys, "convert", str(old), "--dtype", "float16", "--json")
    assert code == 0 and json.loads(lines[0])["parameters"] == 6
    loaded = load_state_dict(tmp_path / "old.safetensors")
    assert loaded["a"].dtype == torch.float16 and torch.equal(loaded["b"], torch.ones(2, dtype=torch.int64))
    code, _, errors = run(capsys, "convert", str(old))
    assert code == 2 and "exists already" in errors
    assert run(capsys, "convert", str(old), "--force")[0] == 0


def test_convert_refuses_unsafe_content(capsys, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "trap.bin").write_bytes(pickle.dumps(Trap()))
    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    for name in ("trap.bin", "trap.pt"):
        code, _, errors = run(capsys, "convert", str(tmp_path / name))
        assert code == 2 and name in errors and "Traceback" not in errors
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "trap.safetensors").exists()


def test_convert_refuses_half_a_file(capsys, tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "half.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "half.pt").read_bytes()[:700])
    code, _, errors = run(capsys, "convert", str(tmp_path / "half.pt"))
    assert code == 2 and "half.pt" in errors


# ---- scripts with the original names


@pytest.mark.process
@pytest.mark.parametrize(("name", "folder"), [
    ("seed_tokenizer_inference.py", "seed_tokenizer"), ("seed_llama_inference_8B.py", "seed_llama_8b_sft"),
    ("seed_llama_inference_14B.py", "seed_llama_14b_sft")])
def test_without_the_released_weights_one_sentence_says_what_to_do(name, folder):
    if (ROOT / "pretrained" / folder).exists():
        pytest.skip("the released weights are on this disk")
    done = script(name)
    assert done.returncode == 2 and done.stdout == ""
    assert f"pretrained/{folder}" in done.stderr and "--model nano" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.process
def test_tokenizer_script_makes_the_round_trip(tiny, tmp_path):
    done = script("seed_tokenizer_inference.py", "--model", tiny, "--image", FOX, "--prompt", "What?", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    codes = done.stdout.splitlines()[0].split()
    assert len(codes) == 32 and Image.open(tmp_path / "cat.jpg").size == (16, 16)


@pytest.mark.process
def test_llama_script_answers_draws_and_edits(tiny, tmp_path):
    done = script("seed_llama_inference_8B.py", "--model", tiny, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"dog.jpg", "cat_sunglasses.jpg"}


@pytest.mark.process
def test_llama_script_takes_a_request(tiny, tmp_path):
    done = script("seed_llama_inference_14B.py", "--model", tiny, "--image", CAT, "--prompt", "What?", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# ---- quickstart


@pytest.mark.process
@pytest.mark.slow
def test_quickstart_writes_sheets_images_and_json(tiny, tmp_path, capsys):
    out = tmp_path / "quick"
    assert quickstart.main(["--model", tiny, "--out", str(out), "--device", "cpu"]) == 0
    result = json.loads((out / "quickstart.json").read_text())
    assert [len(codes) for codes in result["codes"]] == [32] * len(quickstart.READ)
    assert [cell["request"] for cell in result["draw"]] == list(quickstart.DRAWN)
    assert all(cell["answer"].startswith("never trained on: ") for cell in result["draw"])
    assert [cell["request"] for cell in result["talk"] if cell["request"]] == list(quickstart.CHAT)
    assert all((out / f"{name}_{number + 1}.png").is_file() for name in ("look", "draw", "edit", "grow")
               for number in range(len(result[name])))
    sheet = Image.open(out / "contact_sheet.png")
    assert sheet.width > 1000 and sheet.height > 1000
    assert "contact_sheet.png" in capsys.readouterr().out


def test_quickstart_refuses_a_place_that_cannot_be_written_before_it_works(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert quickstart.main(["--model", "nowhere", "--out", str(tmp_path / "file")]) == 2  # before the model is read
    assert capsys.readouterr().err == f"quickstart: {tmp_path / 'file'}: cannot be written (Not a directory).\n"


def test_drawn_gives_each_image_the_words_before_it():
    image = DrawnPart([0] * 32, Image.new("RGB", (8, 8), (9, 200, 9)))
    cells = quickstart.drawn(Answer((TextPart("One."), image, TextPart("Two."), TextPart("Three."), image)))
    assert [(cell.caption, cell.arrow) for cell in cells] == [("One.", False), ("Two. Three.", True)]
    assert quickstart.drawn(Answer((TextPart("One."),))) == []


def test_never_trained_on_names_what_is_held_out():
    notes = {words: quickstart.never_trained_on(words) for words in (*quickstart.READ, *quickstart.DRAWN)}
    assert all(held_out(scene_of(words)) and len(note) > 20 for words, note in notes.items())
    assert notes["a large fluent horse on the sea"] == "never trained on: horse on the sea"
    assert notes["two twemoji crabs on the sea"] == "never trained on: two crabs"


def test_a_text_of_many_words_is_named_by_its_first_ones(capsys):
    outcomes = Outcomes(1)
    with outcomes.one("word " * 5000):
        raise RequestError("The prompt is too long.")
    assert outcomes.finish() == 1
    assert len(capsys.readouterr().err) < 600
