"""Pictures and edits that a de-tokenizer learns from: folders, tars, lists; damaged ones; the cache of features."""

from __future__ import annotations

import io
import json
import resource
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_detokenizer import TOWER, config, losses, write_parts

from seed_multimodal.data.stream.order import EpochOrder, MixedOrder, drawn_indices
from seed_multimodal.errors import CheckpointError, DataError
from seed_multimodal.seed_x.adapter import SDXLAdapter
from seed_multimodal.seed_x.diffusion import SdxlDetokenizer
from seed_multimodal.seed_x.vision import QwenVit
from seed_multimodal.training.pixel_decoder.features import LatentMoments, load_autoencoder
from seed_multimodal.training.seed_x.detokenizer import train_detokenizer
from seed_multimodal.training.seed_x.tower_features import TowerFeatures


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("detokenizer"))


def tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def trained(parts: Path, output: Path, source: dict[str, Any], stage: int = 1, **changes: Any) -> dict[str, Any]:
    return train_detokenizer(config(parts, output, stage, data={"sources": [{"name": "mine", **source}]},
                                    trainer={"max_steps": 2}, **changes))


# ---- sources


@pytest.mark.slow
def test_a_tar_a_folder_and_a_list_give_the_same_pictures(parts: Path, tmp_path: Path) -> None:
    """Without captions in any of them; the losses say that pixels, order and size conditions are the same."""
    files = sorted((parts / "pictures").iterdir())
    tar(tmp_path / "shard.tar", {file.name: file.read_bytes() for file in files})
    lines = [{"image": str(file)} for file in files]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = []
    for name, source in (("folder", parts / "pictures"), ("tar", tmp_path / "shard.tar"),
                         ("list", tmp_path / "list.jsonl")):
        assert trained(parts, tmp_path / name, {"files": str(source)})["bad_samples"] == 0
        seen.append(losses(tmp_path / name))
    assert seen[0] == seen[2] and all(0 < loss < 3 for loss in seen[1]), "shards have an order of their own"


@pytest.mark.slow
def test_odd_pictures_are_drawn_and_broken_ones_named(parts: Path, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    odd = {"one_pixel": Image.new("RGB", (1, 1), "red"), "wide": Image.new("RGB", (500, 3), "blue"),
           "tall": Image.new("L", (2, 400), 9), "clear": Image.new("RGBA", (17, 19), (1, 2, 3, 0)),
           "palette": Image.new("P", (33, 16)), "grey16": Image.new("I;16", (20, 20), 40_000)}
    for name, picture in odd.items():
        picture.save(folder / f"{name}.png")
    good = png(Image.new("RGB", (40, 40), "green"))
    for name, content in (("cut", good[:60]), ("empty", b""), ("text", b"<html>not found</html>")):
        (folder / f"{name}.png").write_bytes(content)
    record = trained(parts, tmp_path / "run", {"files": str(folder)}, optim={"learning_rate": 1e-4})
    assert record["steps"] == 2
    said = capsys.readouterr().out
    assert record["bad_samples"] == said.count("skipped: ") > 0
    assert all(f"{name}.png" not in said for name in odd)


@pytest.mark.slow
def test_a_cut_tar_is_refused_or_its_lost_picture_named(parts: Path, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    members = {file.name: file.read_bytes() for file in sorted((parts / "pictures").iterdir())}
    whole = tar(tmp_path / "whole.tar", members).read_bytes()
    cut = tmp_path / "cut.tar"
    for size in (700, 100):
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError, match="cut.tar") as caught:
            trained(parts, tmp_path / f"run{size}", {"files": str(cut)})
        assert "\n" not in str(caught.value)
    cut.write_bytes(whole[:4 * 1536 + 600])  # a header and two blocks for each picture; the fifth has lost its end
    capsys.readouterr()
    record = trained(parts, tmp_path / "run", {"files": str(cut)})
    said = capsys.readouterr().out
    assert record["bad_samples"] == said.count("skipped: ") == 1 and "cut.tar" in said


@pytest.mark.slow
@pytest.mark.parametrize("line", [
    {"source_image": "before/0.png"}, {"target_image": "after/0.png"}, {"source_image": None, "target_image": "x"},
    {"source_image": "before/none.png", "target_image": "after/0.png"},
    {"source_image": "edits.jsonl", "target_image": "after/0.png"}, {"source_image": 3, "target_image": 4}])
def test_a_pair_with_one_side_missing(line: dict[str, Any], parts: Path, tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    """Among good ones it is named, counted and replaced; it is never an edit from nothing. Where the first line is such
    a one, the list's keys are doubted at once."""
    good = [{"source_image": f"before/{n}.png", "target_image": f"after/{n}.png"} for n in (1, 2)]
    lines = [json.dumps(one) + "\n" for one in (*good, line)]
    (tmp_path / "edits.jsonl").write_text("".join(lines))
    source = {"files": str(tmp_path / "edits.jsonl"), "image_root": str(parts), "image_key": "target_image",
              "condition_key": "source_image"}
    record = trained(parts, tmp_path / "run", source, 2)
    said = capsys.readouterr().out
    assert record["bad_samples"] == 1 and said.count("skipped: ") == 1 and "edits.jsonl" in said
    (tmp_path / "edits.jsonl").write_text(lines[-1] * 3)
    with pytest.raises(DataError, match="samples in a row|has no picture: nothing under key|is 4, not a path"):
        trained(parts, tmp_path / "none", source, 2)


# ---- the cache


def test_a_cache_serves_several_models_and_sizes(parts: Path, tmp_path: Path) -> None:
    """Features of another tower, picture size, precision or number of tokens lie beside; none is taken for another."""
    torch.manual_seed(77)
    other, kept, cpu = QwenVit(TOWER).eval(), tmp_path / "kept", torch.device("cpu")
    own = QwenVit.from_pretrained(parts / "tower")
    small, large = (torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8) for side in (16, 32))
    vae = load_autoencoder(parts / "sdxl", SdxlDetokenizer)
    cases = [(TowerFeatures, own, {}, small), (TowerFeatures, other, {}, small),
             (TowerFeatures, own, {"tokens": 4}, small), (TowerFeatures, own, {"tokens": 2}, small),
             (TowerFeatures, QwenVit.from_pretrained(parts / "tower", dtype=torch.bfloat16), {}, small),
             (LatentMoments, vae, {}, small), (LatentMoments, vae, {}, large)]
    plain = [kind(model, cpu, **options)(pixels) for kind, model, options, pixels in cases]
    for _ in range(2):  # made, and read
        for (kind, model, options, pixels), wanted in zip(cases, plain, strict=True):
            found = kind(model, cpu, cache=kept, **options)(pixels)
            assert found.dtype == wanted.dtype
            torch.testing.assert_close(found, wanted)
    assert len(list(kept.iterdir())) == 6, "five of towers and one of the autoencoder"


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_features_are_written(parts: Path, tmp_path: Path) -> None:
    """One sentence, no torn file; with room again the same folder is filled."""
    features = LatentMoments(load_autoencoder(parts / "sdxl", SdxlDetokenizer), torch.device("cpu"), tmp_path / "kept")
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with files_of_at_most(1000), pytest.raises(CheckpointError, match="cannot be written .the disk or quota is full"):
        features(pixels)
    assert not [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    made = features(pixels)
    features.release()
    assert features.held == 0 and torch.equal(features(pixels), made)


@pytest.mark.slow
def test_a_picture_that_changed_after_its_features_were_made(parts: Path, tmp_path: Path) -> None:
    """Neither model is there any more: a sentence, not another picture's features; the next start makes them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (20, 20), (number * 60, 0, 0)).save(folder / f"{number}.png")
    given = config(parts, tmp_path / "run", data={
        "cache": str(tmp_path / "kept"), "sources": [{"name": "mine", "files": str(folder)}]})
    train_detokenizer({**given, "trainer": {**given["trainer"], "max_steps": 2}})
    for number in range(4):
        Image.new("RGB", (20, 20), (0, 0, number * 60 + 3)).save(folder / f"{number}.png")
    (tmp_path / "run" / "summary.json").unlink()
    record = json.loads((tmp_path / "run" / "features.json").read_text())
    (tmp_path / "run" / "features.json").write_text(json.dumps({**record, "draws": 16}))
    with pytest.raises(CheckpointError, match="no longer kept there; pictures or folder have changed"):
        train_detokenizer(given)
    train_detokenizer(given)
    assert len(losses(tmp_path / "run")) == 4


def test_what_a_run_draws() -> None:
    """Only that is made first; of several epochs each sample once, as of mixtures."""
    order = EpochOrder(10, 3)
    assert drawn_indices(order, 4, 10).tolist() == sorted(order.parts(0, 4)[0][1].tolist())
    assert drawn_indices(order, 35, 10).tolist() == list(range(10))
    mixed = MixedOrder([5, 100], [1.0, 1.0], 0)
    drawn = drawn_indices(mixed, 20, 105)
    assert (drawn < 5).sum() == 5 and (drawn >= 5).sum() == 10


# ---- conditions


@pytest.mark.slow
def test_dropout_of_everything_leaves_nothing_to_learn_about_pictures(parts: Path, tmp_path: Path) -> None:
    """Always without embeddings and condition: another tower changes no loss but through its empty picture."""
    never, always = ({"dropout": {"embeds": 0.0, "picture": 0.0, "both": share}} for share in (0.0, 1.0))
    for name, model in (("never", never), ("always", always)):
        train_detokenizer(config(parts, tmp_path / name, 2, model={**model, "trained": "all"}))
    blind, seeing = (SDXLAdapter.from_pretrained(tmp_path / name / "adapter", parts / "sdxl")
                     for name in ("always", "never"))
    assert not blind.unet.conv_in.weight[:, 4:].any(), "channels of a condition that is never there stay zero"
    assert seeing.unet.conv_in.weight[:, 4:].any()
