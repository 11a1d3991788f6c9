"""Seed1 and demo_recon.py: pictures to codes to pictures, files and numbers, seeds, what is missing or wrong."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny_seed1
import torch
import warm_python
from PIL import Image

from seed_multimodal.commands.recon import make_grid, next_name, recon_script
from seed_multimodal.config import instantiate
from seed_multimodal.errors import CheckpointError, CodesError, ConfigError, ImageError
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.systems.seed1 import Seed1, find_diffusion

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pretrained/` would hold: the released files, their sizes, and a diffusion folder beside them."""
    place = tmp_path_factory.mktemp("pretrained")
    model = tiny_seed1.tokenizer()
    tiny_seed1.released_folder(model, place)
    model.save_pretrained(place / "ours")
    (place / "ours" / "config.json").rename(place / "config.json")
    tiny_seed1.diffusion_folder(place / "stable-diffusion-v1-4")
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> Seed1:
    return Seed1.from_pretrained(folder, device="cpu", log=None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place, files = tmp_path_factory.mktemp("pictures"), []
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
        files.append(place / f"{number}.png")
    return files


def _pixels(pictures: list) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=np.int32) for picture in pictures])


def test_pictures_to_codes_to_pictures(model: Seed1, pictures: list[Path]) -> None:
    codes = model.tokenize(pictures)
    assert codes.shape == (3, 32) and codes.dtype == torch.long and len(codes.unique(dim=0)) == 3
    pixels = seed_image_processor(16).batch([Image.open(p).convert("RGB") for p in pictures])
    assert torch.equal(codes, model.tokenizer.encode(pixels))
    assert model.embeds(codes).shape == (3, 7, 16) and model.embeds(codes[0].tolist()).shape == (1, 7, 16)
    drawn = model.reconstruct(pictures, num_inference_steps=3)
    assert [picture.size for picture in drawn] == [(16, 16)] * 3
    assert np.abs(_pixels(drawn) - _pixels(model.draw(codes, num_inference_steps=3, batch_size=2))).max() <= 1
    alone = model.reconstruct(Image.open(pictures[1]), num_inference_steps=3)
    assert np.abs(_pixels(alone)[0] - _pixels(drawn)[1]).max() <= 1
    seeds = _pixels(model.draw(codes[[0, 0]], seed=[1, 2], num_inference_steps=3))
    assert np.abs(seeds[0] - seeds[1]).max() > 5


def test_the_yaml_builds_it(folder: Path, model: Seed1, pictures: list[Path]) -> None:
    built = instantiate(ROOT / "configs" / "tokenizer" / "seed1.yaml", folder=str(folder), device="cpu",
                        diffusion=str(folder / "stable-diffusion-v1-4"))
    assert torch.equal(built.tokenize(pictures), model.tokenize(pictures))
    assert built.codec.can_draw


def test_bad_input_is_one_sentence(model: Seed1, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"broken\.png"):
        model.tokenize([pictures[0], tmp_path / "broken.png"])
    with pytest.raises(CodesError, match="outside the codebook 0..49"):
        model.draw([50] * 32)
    with pytest.raises(CodesError, match="1 pictures were given with 2 seeds"):
        model.draw([1] * 32, seed=[1, 2])
    with pytest.raises(ConfigError, match="^SEED-1.* makes no picture from its first codes alone; SEED-2 does.$"):
        model.draw([1] * 32, first=8)


def test_parts_are_found_and_missed(folder: Path, tmp_path: Path) -> None:
    assert find_diffusion(folder) == folder / "stable-diffusion-v1-4"
    assert find_diffusion(folder / "seed_tokenizer.pth") == folder / "stable-diffusion-v1-4"
    assert find_diffusion(folder, tmp_path) == tmp_path
    tokenizer_only = Seed1.from_pretrained(folder, device="cpu", load_decoder=False, log=None)
    assert tokenizer_only.tokenize(ROOT / "images" / "cat.jpg").shape == (1, 32)
    with pytest.raises(CheckpointError, match="cannot draw"):
        tokenizer_only.draw([0] * 32)
    with pytest.raises(CheckpointError, match=r"nowhere: there is no such SEED-1 tokenizer; put causal_qformer\.pth"):
        Seed1.from_pretrained(tmp_path / "nowhere", log=None)
    undrawn = Seed1.from_pretrained(folder, device="cpu", diffusion=tmp_path / "no-sd", log=None)
    with pytest.raises(CheckpointError, match="no-sd: there is no such folder; .*hf download"):
        undrawn.draw([0] * 32)


# ---- demo_recon.py


def _run(folder: Path, out: Path, *flags: object) -> int:
    return recon_script(["--model", str(folder), "--device", "cpu", "--out", str(out), "--ddim_steps", "2",
                         *map(str, flags)])


@pytest.mark.slow
def test_demo_prints_codes_and_numbers_its_files(folder: Path, model: Seed1, pictures: list[Path], tmp_path: Path,
                                                 capsys: pytest.CaptureFixture) -> None:
    assert _run(folder, tmp_path, "--image", *pictures[:2], "--n_samples", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    codes = model.tokenize(pictures[:2]).tolist()
    assert [lines[0], lines[4]] == [" ".join(map(str, row)) for row in codes]
    files = [tmp_path / "samples" / f"{number:04d}.png" for number in range(4)]
    grids = [tmp_path / f"grid-{number:03d}.png" for number in range(2)]
    assert lines[1:4] == [str(p) for p in (*files[:2], grids[0])] and lines[5:] == [str(p) for p in
                                                                                   (*files[2:], grids[1])]
    drawn = model.draw([codes[0]] * 2, seed=[42, 43], num_inference_steps=2, guidance_scale=7.5)
    assert np.abs(_pixels([Image.open(p) for p in files[:2]]) - _pixels(drawn)).max() <= 1
    assert Image.open(grids[0]).size == (2 * 18 + 2, 16 + 4)
    assert _run(folder, tmp_path, "--image", pictures[2], "--n_samples", 1, "--skip_grid") == 0
    assert (tmp_path / "samples" / "0004.png").is_file() and len(list(tmp_path.glob("grid-*"))) == 2
    assert _run(folder, tmp_path, "--image", pictures[2], "--n_samples", 1, "--skip_save") == 0
    assert len(list((tmp_path / "samples").iterdir())) == 5 and Image.open(tmp_path / "grid-002.png").size == (16, 16)


def test_demo_iterations_and_fixed_code(folder: Path, pictures: list[Path], tmp_path: Path) -> None:
    flags = ("--image", pictures[0], "--n_samples", 2, "--n_iter", 2, "--n_rows", 3, "--seed", 5)
    for name, extra in (("free", ()), ("fixed", ("--fixed_code",))):
        assert _run(folder, tmp_path / name, *flags, *extra) == 0
        assert Image.open(tmp_path / name / "grid-000.png").size == (3 * 18 + 2, 2 * 18 + 2)
    free, fixed = (_pixels([Image.open(tmp_path / name / "samples" / f"000{n}.png") for n in range(4)])
                   for name in ("free", "fixed"))
    assert np.array_equal(free[:2], fixed[:2]) and np.array_equal(fixed[:2], fixed[2:])
    assert all(np.abs(free[n] - free[m]).max() > 5 for n in range(4) for m in range(n))


def test_demo_size_and_sampler(folder: Path, pictures: list[Path], tmp_path: Path) -> None:
    flags = ("--image", pictures[0], "--n_samples", 1, "--skip_grid")
    assert _run(folder, tmp_path, *flags, "--W", 32, "--C", 4, "--f", 2, "--precision", "full", "--plms") == 0
    assert Image.open(tmp_path / "samples" / "0000.png").size == (32, 16)
    assert _run(folder, tmp_path, *flags) == 0 and _run(folder, tmp_path, *flags, "--dpm_solver") == 0
    plms, dpm = (_pixels([Image.open(tmp_path / "samples" / f"000{n}.png")]) for n in (1, 2))
    assert np.abs(plms - dpm).max() > 1


def test_demo_goes_on_after_a_bad_picture(folder: Path, pictures: list[Path], tmp_path: Path,
                                          capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert _run(folder, tmp_path / "out", "--image", tmp_path / "broken.png", pictures[0], "--n_samples", 1,
                "--prompt", "a dog", "--from-file", "x", "--config", "y.yaml") == 1
    told = capsys.readouterr().err
    assert "broken.png" in told and (tmp_path / "out" / "samples" / "0000.png").is_file()
    assert all(f"--{flag} has no effect" in told for flag in ("prompt", "from-file", "config"))


@pytest.mark.parametrize(("flags", "said"), [
    (("--ddim_eta", "0.5"), "--ddim_eta must be 0"), (("--n_samples", "0"), "--n_samples must be at least 1"),
    (("--laion400m",), "--laion400m: that model"), (("--f", "8"), "--f 8: this diffusion model has 2"),
    (("--scale", "nan"), "--scale must be a number"), (("--seed", str(2**63)), "--seed must be a number of 64 bits"),
    (("--W", "20"), "width must be a multiple of 8 pixels"), (("--dtype", "int3"), "Unknown dtype 'int3'")])
def test_demo_refusals(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: tuple, said: str) -> None:
    assert _run(folder, tmp_path, *flags) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("demo_recon.py: ") and said in last
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("blocked", ["file", "file/x", "out/samples"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_drawn(
        folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, blocked: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / blocked.removesuffix("/x")).write_text("in the way")
    out = tmp_path / blocked.removesuffix("/samples")
    assert _run(folder, out, "--ddim_steps", 10**9, "--n_samples", 1) == 2
    shown, told = capsys.readouterr()
    assert not shown and told.endswith("cannot be written (Not a directory).\n") and told.count("\n") == 1


@pytest.mark.process
def test_without_weights_one_sentence_says_what_to_get(tmp_path: Path, folder: Path) -> None:
    done = subprocess.run([warm_python.PYTHON, str(ROOT / "demo_recon.py"), "--model", "nothing-here"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    sentence = done.stderr.strip()
    assert "\n" not in sentence and "Traceback" not in sentence
    for wanted in ("causal_qformer.pth", "seed_tokenizer.pth", "eva_vit_g.pth", "nothing-here", "hf download"):
        assert wanted in sentence


def test_a_single_checkpoint_file_is_explained(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "sd-v1-4.ckpt").write_bytes(b"anything")
    assert _run(folder, tmp_path / "out", "--ckpt", tmp_path / "sd-v1-4.ckpt") == 2
    assert "a single .ckpt file is not read" in capsys.readouterr().err


def test_grid_and_names(tmp_path: Path) -> None:
    tiles = [Image.new("RGB", (4, 3), (number, 0, 0)) for number in range(1, 6)]
    grid = np.asarray(make_grid(tiles, 3))
    assert grid.shape == (2 * 5 + 2, 3 * 6 + 2, 3)
    assert grid[2, 2, 0] == 1 and grid[2, 8, 0] == 2 and grid[7, 8, 0] == 5 and not grid[7:, 14:].any()
    assert not grid[:2].any() and not grid[:, :2].any()
    (tmp_path / "0001.png").touch()  # 0000.png was deleted: nothing is written over what is left
    assert next_name(tmp_path, "{:04d}.png") == tmp_path / "0002.png"
    assert next_name(tmp_path, "grid-{:03d}.png") == tmp_path / "grid-000.png"
