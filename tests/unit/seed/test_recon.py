"""demo_recon.py on a tiny SEED-1: files, seeds, sizes, samplers, missing weights, torn images."""

import numpy as np
from PIL import Image

from seed_multimodal.compat.demo_recon import recon_script


def run(folder, out, flags: str) -> int:
    """The exit code; `0.png` and so on are images of the folder."""
    common = f"--model {folder} --device cpu --out {out} --ddim_steps 2"
    words = [str(folder / word) if word.endswith(".png") else word for word in flags.split()]
    return recon_script("", [*common.split(), *words])


def pixels(folder, count) -> np.ndarray:
    files = [folder / "samples" / f"{index:04d}.png" for index in range(count)]
    return np.stack([np.asarray(Image.open(file), dtype=np.int32) for file in files])


def test_recon_numbers_its_files_and_prints_them(folder, tmp_path, capsys):
    assert run(folder, tmp_path, "--image 0.png 1.png --n_samples 2") == 0
    lines = capsys.readouterr().out.splitlines()
    samples = [str(tmp_path / "samples" / f"{index:04d}.png") for index in range(4)]
    grids = [str(tmp_path / f"grid-{index:03d}.png") for index in range(2)]
    # Of each image its 32 codes, its samples and their grid.
    assert [len(lines[row].split()) for row in (0, 4)] == [32, 32]
    assert lines[1:4] == [*samples[:2], grids[0]]
    assert lines[5:] == [*samples[2:], grids[1]]
    assert Image.open(grids[0]).size == (2 * 18 + 2, 16 + 4)

    # A second run goes on with the next number; a torn image is named.
    torn = tmp_path / "torn"
    torn.write_bytes(b"no image")
    ignored = "--prompt dog --from-file x --config y.yaml --C 4 --f 8"  # without effect
    assert run(folder, tmp_path, f"--image {torn} 2.png --n_samples 1 --skip_grid {ignored}") == 1
    assert torn.name in capsys.readouterr().err
    assert pixels(tmp_path, 5)[4].any()


def test_recon_with_iterations_and_fixed_code(folder, tmp_path):
    # `--fixed_code` starts each iteration from the same noise.
    flags = "--image 0.png --n_samples 2 --n_iter 2 --n_rows 3 --seed 5"
    assert run(folder, tmp_path / "free", flags) == 0
    assert run(folder, tmp_path / "fixed", f"{flags} --fixed_code") == 0
    free = pixels(tmp_path / "free", 4)
    fixed = pixels(tmp_path / "fixed", 4)
    assert np.array_equal(free[:2], fixed[:2])
    assert np.array_equal(fixed[:2], fixed[2:])
    assert all(np.abs(free[n] - free[m]).max() > 5 for n in range(4) for m in range(n))


def test_recon_with_sizes_and_samplers(folder, tmp_path):
    # `--dpm_solver` is another sampler; sizes are pixels.
    flags = "--image 0.png --n_samples 1 --skip_grid"
    assert run(folder, tmp_path, f"{flags} --W 32 --precision full --plms") == 0
    assert run(folder, tmp_path, f"{flags} --W 32 --dpm_solver") == 0
    plms, dpm = pixels(tmp_path, 2)
    assert plms.shape == (16, 32, 3)
    assert np.abs(plms - dpm).max() > 1
