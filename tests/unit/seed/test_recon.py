"""demo_recon.py on a tiny SEED-1: files, seeds, sizes, samplers, missing weights, torn images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import warm_python
from PIL import Image
from real_processes import run_process
from repository import ROOT

from seed_multimodal.compat.seed_llama_programs import recon_script


def run(folder: Path, out: Path, *flags: object) -> int:
    return recon_script(
        [*f"--model {folder} --device cpu --out {out} --ddim_steps 2".split(), *map(str, flags)]
    )


def pixels(*files: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file), dtype=np.int32) for file in files])


def test_recon_writes_numbered_files(folder, tmp_path, capsys):
    assert (
        run(folder, tmp_path, "--image", folder / "0.png", folder / "1.png", "--n_samples", 2) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [len(lines[row].split()) for row in (0, 4)] == [32, 32]
    samples = [str(tmp_path / "samples" / f"{index:04d}.png") for index in range(4)]
    grids = [str(tmp_path / f"grid-{index:03d}.png") for index in range(2)]
    assert lines[1:4] == [*samples[:2], grids[0]] and lines[5:] == [*samples[2:], grids[1]]
    assert Image.open(grids[0]).size == (2 * 18 + 2, 16 + 4)
    assert run(folder, tmp_path, "--image", folder / "2.png", "--n_samples", 1, "--skip_grid") == 0
    assert (tmp_path / "samples" / "0004.png").is_file() and len(list(tmp_path.glob("grid-*"))) == 2
    assert run(folder, tmp_path, "--image", folder / "2.png", "--n_samples", 1, "--skip_save") == 0
    assert len(list((tmp_path / "samples").iterdir())) == 5 and Image.open(
        tmp_path / "grid-002.png"
    ).size == (16, 16)


def test_recon_with_iterations_and_fixed_code(folder, tmp_path):
    flags = (
        "--image",
        folder / "0.png",
        "--n_samples",
        2,
        "--n_iter",
        2,
        "--n_rows",
        3,
        "--seed",
        5,
    )
    assert (
        run(folder, tmp_path / "free", *flags)
        == run(folder, tmp_path / "fixed", *flags, "--fixed_code")
        == 0
    )
    free, fixed = (
        pixels(*(tmp_path / name / "samples" / f"000{n}.png" for n in range(4)))
        for name in ("free", "fixed")
    )
    assert np.array_equal(free[:2], fixed[:2]) and np.array_equal(fixed[:2], fixed[2:])
    assert all(np.abs(free[n] - free[m]).max() > 5 for n in range(4) for m in range(n))


def test_recon_with_sizes_and_samplers(folder, tmp_path):
    flags = ("--image", folder / "0.png", "--n_samples", 1, "--skip_grid")
    assert run(folder, tmp_path, *flags, "--W", 32, "--precision", "full", "--plms") == 0
    assert Image.open(tmp_path / "samples" / "0000.png").size == (32, 16)
    assert run(folder, tmp_path, *flags) == 0 and run(folder, tmp_path, *flags, "--dpm_solver") == 0
    plms, dpm = pixels(*(tmp_path / "samples" / f"000{n}.png" for n in (1, 2)))
    assert np.abs(plms - dpm).max() > 1


def test_recon_with_a_torn_image(folder, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert (
        run(
            folder,
            tmp_path / "out",
            "--image",
            tmp_path / "broken.png",
            folder / "0.png",
            "--n_samples",
            1,
            "--prompt",
            "a dog",
            "--from-file",
            "x",
            "--config",
            "y.yaml",
            "--C",
            4,
            "--f",
            8,
        )
        == 1
    )
    assert (
        "broken.png" in capsys.readouterr().err
        and (tmp_path / "out" / "samples" / "0000.png").is_file()
    )


@pytest.mark.process
def test_recon_without_weights(tmp_path):
    done = run_process(
        [warm_python.PYTHON, str(ROOT / "demo_recon.py"), "--model", "nothing-here"],
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    for wanted in (
        "causal_qformer.pth",
        "seed_tokenizer.pth",
        "eva_vit_g.pth",
        "nothing-here",
        "hf download",
    ):
        assert wanted in done.stderr
