"""Building the nano set from a few SVGs of our own: determinism, rendering, families, splits, edits, and the check."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seed_multimodal.data.formats.tar import tar_records
from seed_multimodal.data.formats.writer import write_shard
from seed_multimodal.data.nano.__main__ import main
from seed_multimodal.data.nano.build import BuildOptions, build_from, encode_webp
from seed_multimodal.data.nano.check import check_folder
from seed_multimodal.data.nano.concepts import Concept, fold_code, fold_label, gender_of, plain_label
from seed_multimodal.data.nano.families import assign_splits, name_families
from seed_multimodal.data.nano.grammar import with_article
from seed_multimodal.data.nano.load import load_nano
from seed_multimodal.data.nano.near import near_pairs
from seed_multimodal.data.nano.packages import SOURCES, Drawing, fetch, plain_code
from seed_multimodal.data.nano.render import main_colour, render_svg
from seed_multimodal.errors import DataError

STYLES = ("twemoji", "noto", "fluent")
THINGS = 60
TAGS = tuple(f"thing number {n}" for n in range(12, THINGS))


def svg(style: int, number: int) -> str:
    """A drawing that depends on style and thing."""
    shape = (
        f'<circle cx="16" cy="16" r="{9 + style}" fill="{{}}"/>',
        f'<path d="M4 28 L16 {4 + style} L28 28 Z" fill="{{}}"/>',
        f'<rect x="4" y="4" width="{24 - 3 * style}" height="18" rx="{style}" fill="{{}}"/>',
    )[number % 3].format(f"#{(number * 40503 * 97) % 0xC00000:06x}")
    x, y, red = 2 + (number * 7) % 20, 2 + (number * 5) % 22, number * 4 % 256
    bar = f'<rect x="{x}" y="{y}" width="6" height="6" fill="#{red:02x}20b0"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{shape}{bar}</svg>'


def concept(number: int) -> Concept:
    gender = (None, "man", "woman")[number % 3] if number < 12 else None
    label = f"{gender} number {number // 3}" if gender else f"thing number {number}"
    return Concept(
        code=f"{0x2000 + number:x}", label=label, group="objects", subgroup="tool", tags=TAGS,
        tone=None, gender=gender, base=f"{0x2000 + number:x}", order=number,
    )


def tiny(out: Path, size: int = 16) -> Path:
    concepts = {c.code: c for c in map(concept, range(THINGS))}
    drawings = [Drawing(style, code, svg(s, n)) for s, style in enumerate(STYLES) for n, code in enumerate(concepts)]
    build_from(drawings, concepts, out, BuildOptions(size=size, styles=STYLES))
    return out


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("nano") / "set")


def test_two_builds_are_byte_equal(built: Path, tmp_path: Path) -> None:
    again = tiny(tmp_path / "again")
    names = sorted(p.name for p in built.iterdir())
    assert names == sorted(p.name for p in again.iterdir())
    assert len(names) == 4
    for name in names:
        assert (built / name).read_bytes() == (again / name).read_bytes(), name


def test_tiny_set_is_sound_and_whole(built: Path) -> None:
    nano = load_nano(built)
    assert len(nano) == THINGS * len(STYLES)
    assert nano.images().shape == (len(nano), 16, 16, 3)
    assert check_folder(built) == []
    assert nano.split("train") and nano.split("val") and nano.split("test_concept") and nano.split("test_combo")
    assert {e.kind for e in nano.edits} == {"style", "person", "swap"}


def test_pictures_are_stored_losslessly(built: Path) -> None:
    nano = load_nano(built)
    code = concept(7).code
    assert np.array_equal(nano.images()[nano.index[f"noto-{code}"]], render_svg(svg(1, 7), 16, "7"))


def test_tags_of_train_never_name_held_out_things(built: Path) -> None:
    """Every concept is tagged with the names of many others; the held-out ones must be gone from train alone."""
    nano = load_nano(built)
    held = {r.label for r in nano.records if r.split in ("val", "test_concept")} & set(TAGS)
    unseen = [r for r in nano.records if r.split == "val"]
    assert held and {tag for r in nano.records if r.split in ("train", "test_combo") for tag in r.tags} & held == set()
    assert unseen and all(r.tags == list(TAGS[:4]) or r.label in TAGS[:5] for r in unseen)


def test_tones_of_one_thing_become_edits_captions_and_questions(tmp_path: Path) -> None:
    concepts = {}
    for number, tone in enumerate(("light", "medium", "dark")):
        one = concept(33)
        concepts[f"2021-1f3f{number}"] = replace(one, code=f"2021-1f3f{number}", tone=tone)
    drawings = [Drawing("noto", code, svg(1, n)) for n, code in enumerate(concepts)]
    build_from(drawings, concepts, tmp_path / "set", BuildOptions(size=16, styles=("noto",), all_tones=True))
    nano = load_nano(tmp_path / "set")
    assert len({r.family for r in nano.records}) == 1 and check_folder(tmp_path / "set") == []
    assert nano.records[2].captions[0] == "a noto drawing of a thing number 33 with dark skin tone"
    assert [(qa.kind, qa.answer) for qa in nano.records[0].qa if qa.kind == "tone"] == [("tone", "light")]
    tones = [e for e in nano.edits if e.kind == "tone"]
    assert len(tones) == 6
    assert all(nano.records[nano.index[e.target]].tone in e.instruction for e in tones)


def edit_lines(folder: Path, name: str, change) -> None:
    path = folder / name
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    change(rows)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))


@pytest.mark.parametrize("plant", ["edit", "conversation", "sentence"])
def test_check_finds_a_planted_link(built: Path, tmp_path: Path, plant: str) -> None:
    folder = tmp_path / "leaky"
    shutil.copytree(built, folder)
    nano = load_nano(folder)
    held = nano.records[nano.split("val")[0]]
    shown = nano.records[nano.split("train")[0]].key

    def change(rows: list) -> None:
        if plant == "edit":
            rows.append([shown, held.key, "Make it.", "Here it is.", "style", "train"])
        elif plant == "conversation":
            rows.append({"split": "train", "messages": [["user", {"image": held.key}, "hi"], ["assistant", "hello"]]})
        else:
            said = f"Please draw {held.captions[0]}."
            rows.append({"split": "train", "messages": [["user", {"image": shown}, said]]})

    edit_lines(folder, "edits.jsonl.gz" if plant == "edit" else "conversations.jsonl.gz", change)
    problems = [p for p in check_folder(folder) if "sha256" not in p]
    assert problems
    assert any((held.label if plant == "sentence" else held.key) in p for p in problems)


def repack(folder: Path, change) -> None:
    """Rewrite the shard with changed records, keeping the manifest's checksum right."""
    shard = next(folder.glob("*.tar.gz"))
    records = [(r.key, dict(r.members)) for r in tar_records(shard, unpack=True)]
    change(dict(records))
    write_shard(shard, records)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][shard.name]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("plant", ["label", "pixels", "family", "answer"])
def test_check_finds_a_planted_record(built: Path, tmp_path: Path, plant: str) -> None:
    folder = tmp_path / "leaky"
    shutil.copytree(built, folder)
    nano = load_nano(folder)
    train, held = (nano.records[nano.split(s)[0]] for s in ("train", "test_concept"))

    def change(members: dict[str, dict[str, bytes]]) -> None:
        if plant == "pixels":
            members[train.key]["webp"] = members[held.key]["webp"]
            return
        data = json.loads(members[train.key]["json"])
        if plant == "answer":
            data["qa"][0][1] = held.label
        else:
            data[plant] = getattr(held, plant)
        members[train.key]["json"] = json.dumps(data).encode()

    repack(folder, change)
    assert any(train.key in p or held.label in p or held.family in p for p in check_folder(folder))


def test_check_finds_a_held_out_style_in_train(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "leaky"
    shutil.copytree(built, folder)
    nano = load_nano(folder)
    combo = nano.records[nano.split("test_combo")[0]]
    twin = next(r for r in nano.records if r.split == "train" and r.family == combo.family)

    def change(members: dict[str, dict[str, bytes]]) -> None:
        data = json.loads(members[twin.key]["json"])
        data["style"] = combo.style
        members[twin.key]["json"] = json.dumps(data).encode()

    repack(folder, change)
    assert any(combo.key in p and "same style" in p for p in check_folder(folder))


def test_command_exit_codes(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(built)]) == 0
    assert "sound" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "nothing")]) == 2
    assert "no nano data set there" in capsys.readouterr().err
    assert main(["build", "--out", str(tmp_path / "x"), "--styles", "crayon", "--cache", str(tmp_path)]) == 2
    assert "unknown style 'crayon'" in capsys.readouterr().err


def test_sheet_command(built: Path, tmp_path: Path) -> None:
    assert main(["sheet", str(built), "--out", str(tmp_path / "sheet.png")]) == 0
    assert Image.open(tmp_path / "sheet.png").width > 500
    (tmp_path / "taken").touch()
    assert main(["sheet", str(built), "--out", str(tmp_path / "taken" / "sheet.png")]) == 2


def test_package_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    (tmp_path / SOURCES["noto"].filename).write_bytes(b"not the package")
    with pytest.raises(DataError, match="sha512 is not the pinned one"):
        fetch(SOURCES["noto"], tmp_path)


def test_rendering() -> None:
    dot = '<svg xmlns="http://www.w3.org/2000/svg" width="40mm" height="20mm" viewBox="0 0 40 20">{}</svg>'
    red = render_svg(dot.format('<rect x="2" y="2" width="10" height="5" fill="#d00"/>'), 32, "red")
    assert red is not None and red.shape == (32, 32, 3)
    drawn = np.argwhere(red.min(2) < 250)
    assert drawn.min(0).tolist() == [8, 1] and drawn.max(0).tolist() == [22, 30]  # cropped, fitted, centred
    assert main_colour(red)[0] == "red" and main_colour(red)[1] > 0.8  # the edges are blended with white
    assert render_svg(dot.format(""), 32, "blank") is None
    assert render_svg(dot.format('<rect x="2" y="2" width="10" height="5" fill="#fff"/>'), 32, "white") is None
    with pytest.raises(DataError, match="broken: its SVG cannot be rendered"):
        render_svg("<svg", 32, "broken")


@pytest.mark.parametrize(("fill", "name"), [
    ("#dd2e44", "red"), ("#f4900c", "orange"), ("#fdcb58", "yellow"), ("#78b159", "green"), ("#55acee", "blue"),
    ("#aa8ed6", "purple"), ("#ff6eb4", "pink"), ("#c1694f", "brown"), ("#31373d", "black"), ("#99a0a5", "gray"),
    ("#e6e7e8", "white"),
])
def test_main_colour_names(fill: str, name: str) -> None:
    shape = f'<rect width="9" height="9" fill="{fill}"/>'
    picture = render_svg(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{shape}</svg>', 16, name)
    assert picture is not None and main_colour(picture)[0] == name


def test_folding_and_words() -> None:
    assert plain_code("0023-FE0F-20E3") == "23-20e3"
    assert fold_code("1f469-1f3fd-200d-1f373") == fold_code("1f9d1-200d-1f373") == "1f9d1-200d-1f373"
    assert fold_code("1f3c3-200d-2640-200d-27a1") == "1f3c3"
    assert fold_label("woman cook") == fold_label("cook") == "cook"
    assert fold_label("woman") == "person" and fold_label("right arrow") == "right arrow"
    assert plain_label("flag: Côte d’Ivoire") == "flag of cote d'ivoire"
    assert plain_label("man: red hair") == "man with red hair" and plain_label("person: bald") == "bald person"
    assert gender_of("woman cook") == "woman" and gender_of("woman and man holding hands") is None
    assert with_article("apple") == "an apple" and with_article("unicorn") == "a unicorn"
    assert with_article("hourglass done") == "an hourglass done" and with_article("paw prints") == "paw prints"
    assert with_article("woman lifting weights") == "a woman lifting weights" and with_article("garlic") == "garlic"
    assert with_article("grinning face with big eyes") == "a grinning face with big eyes"
    assert with_article("flag of chad") == "the flag of chad"


def test_families_unite_over_any_shared_fact() -> None:
    names = name_families(
        [("a", ["code 1", "label x"]), ("b", ["code 2", "label x"]), ("c", ["code 2"]), ("d", ["code 3"])]
    )
    assert names["a"] == names["b"] == names["c"] == "code 1"
    assert names["d"] == "code 3"


def test_splits_by_family() -> None:
    items = [(f"{style}-{n}", f"family {n}", style, f"label {n}") for n in range(2000) for style in STYLES]
    splits = assign_splits(items)
    share = {name: sum(s == name for s in splits.values()) / len(items) for name in set(splits.values())}
    assert share["val"] == pytest.approx(0.05, abs=0.015) and share["test_concept"] == pytest.approx(0.05, abs=0.015)
    assert share["test_combo"] == pytest.approx(0.054, abs=0.015)
    for n in range(2000):
        found = {splits[f"{style}-{n}"] for style in STYLES}
        assert len(found) == 1 or found == {"train", "test_combo"}
    assert assign_splits(reversed(items)) == splits
    common = assign_splits(items, frozenset(label for _, _, _, label in items))
    assert set(common.values()) == {"train", "test_combo"}


def test_one_style_alone_is_never_a_held_out_combination() -> None:
    splits = assign_splits((f"noto-{n}", f"family {n}", "noto", f"label {n}") for n in range(500))
    assert "test_combo" not in splits.values()


def test_near_pairs_finds_what_brute_force_finds() -> None:
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8))
    images[7] = np.clip(images[3].astype(int) + rng.integers(-2, 3, images[3].shape), 0, 255).astype(np.uint8)
    images[20] = images[3].copy()
    brute = [(i, j) for i in range(30) for j in range(i + 1, 30)
             if np.abs(images[i].astype(int) - images[j].astype(int)).mean() < 2.6]
    assert near_pairs(images) == brute == [(3, 7), (3, 20), (7, 20)]


def test_webp_quality_101_is_lossless_and_80_is_smaller() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    exact, small = encode_webp(noise, 101), encode_webp(noise, 80)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(exact)).convert("RGB")), noise)
    assert len(small) < len(exact)
