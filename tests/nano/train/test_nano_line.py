"""The whole nano line at toy size by its own script, in real processes, ending in a system that loads and answers."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm_python
from PIL import Image

from seed_multimodal import SeedLlama
from seed_nano.train.__main__ import main

ROOT = Path(__file__).resolve().parents[3]
PLAIN = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENVIRONMENT = {**PLAIN, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
               "PYTHON": warm_python.PYTHON}


def run(*command: str, environment: dict[str, str] = ENVIRONMENT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380, cwd=ROOT)


def need_lavis() -> None:
    try:
        importlib.metadata.version("salesforce-lavis")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("salesforce-lavis is not installed: bash install.sh --lavis")


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_line_ends_in_a_system_that_answers(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_lavis()
    work, out = tmp_path / "work", tmp_path / "system"
    first = run("bash", "scripts/nano_speedrun.sh", "--config", "configs/nano/test.yaml",
                "--work", str(work), "--out", str(out), "--no-report")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    index = json.loads((out / "seed_tokenizer/diffusion_model/model_index.json").read_text())
    assert index["_class_name"] == "StableUnCLIPImg2ImgPipeline"
    assert (out / "seed_tokenizer/diffusion_model/image_encoder/tower.json").is_file()
    for stage, steps in (("stage1", 4), ("stage2", 10)):
        assert json.loads((work / stage / f"{stage}.done.json").read_text())["steps"] == steps
    assert json.loads((work / "tokenizer.done.json").read_text())["codebook"] == 64
    for stage in ("llm_pretrain", "llm_sft"):
        assert json.loads((work / stage / "summary.json").read_text())["steps"] == 4

    line = ["--config", str(ROOT / "configs/nano/test.yaml"), "--work", str(work), "--out", str(out)]
    assert main([*line, "--only", "llm,unet2,unet,tokenizer,clip,vae"]) == 0
    told = capsys.readouterr().out
    assert told.count("already done") == 5
    assert [row[3:] for row in told.splitlines() if row.startswith("== ")] == [
        "vae", "clip", "tokenizer", "unet", "unet2", "llm"]  # in order, however they are named
    (work / "stage2" / "stage2.done.json").unlink()
    assert main([*line, "--only", "tokenizer"]) == 2
    assert "stage2 is not trained to its end" in capsys.readouterr().err

    seed = SeedLlama.from_pretrained(out)
    picture = Image.new("RGB", (80, 50), (200, 30, 30))
    codes = seed.tokenize([picture])
    assert codes.shape == (1, 32) and (codes[0] // 2).tolist() == list(range(32))  # 64 codes: two a position
    rebuilt = seed.reconstruct([picture], num_inference_steps=2)
    assert len(rebuilt) == 1 and rebuilt[0].size == (64, 64)
    assert isinstance(seed.describe(picture, max_new_tokens=8), str)
    unet = out / "seed_tokenizer/diffusion_model/unet/config.json"
    assert not json.loads(unet.read_text(encoding="utf-8")).get("_name_or_path")
    assert seed.draw("a red square", num_inference_steps=2).size == (64, 64)


@pytest.mark.process
def test_without_lavis_the_script_says_what_to_install(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # -S: without site-packages
    python.chmod(0o755)
    refused = run("bash", "scripts/nano_speedrun.sh", "--pico", "--work", str(tmp_path / "work"),
                  environment={**ENVIRONMENT, "PYTHON": str(python)})
    assert refused.returncode == 2 and "bash install.sh --lavis" in refused.stderr and not (tmp_path / "work").exists()


@pytest.mark.process
@pytest.mark.parametrize(("option", "sentence"), [
    ("--config", "--config needs a file or folder"), ("--work", "--work needs a file or folder"),
    ("train_vea.steps=3", "did you mean 'train_vae'?"), ("--cpus", "Unknown option --cpus")])
def test_the_script_refuses_wrong_words_once(option: str, sentence: str) -> None:
    refused = run("bash", "scripts/nano_speedrun.sh", "--pico", option)
    assert refused.returncode == 2 and refused.stderr.count(sentence) == 1 and refused.stderr.count("\n") == 1


def standing_in(folder: Path) -> dict[str, str]:
    """An environment whose Python notes each of nano's stages in `folder` and sleeps instead (one of stages `FAILS`:
    ends with 3), and is Python otherwise."""
    python = folder / "python"
    python.write_text(f"""#!/bin/sh
case "$*" in
  *seed_nano.train*--only*) echo "$$ $*" >> "{folder}/started"
    case "$*" in *"--only ${{FAILS:-none}} "*) exit 3 ;; esac
    exec sleep 60 ;;
  *) exec "{sys.executable}" "$@" ;;
esac
""")
    python.chmod(0o755)
    return {**ENVIRONMENT, "PYTHON": str(python)}


def ended(folder: Path) -> bool:
    return not any(Path(f"/proc/{line.split()[0]}").exists() for line in (folder / "started").read_text().splitlines())


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("fails", ["vae", "clip"])
def test_if_one_line_fails_the_other_ends_with_it(tmp_path: Path, fails: str) -> None:
    need_lavis()
    failed = run("bash", "scripts/nano_speedrun.sh", "--config", "configs/nano/test.yaml", "--work", str(tmp_path),
                 environment={**standing_in(tmp_path), "FAILS": fails})
    assert failed.returncode == 3 and ended(tmp_path)


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_both_lines_end_with_the_script(tmp_path: Path) -> None:
    need_lavis()
    (tmp_path / "mine.yaml").write_text("pool: 8\n")
    script = subprocess.Popen(
        ["bash", str(ROOT / "scripts/nano_speedrun.sh"), "--config", "mine.yaml", "--work", "a folder"],
        env=standing_in(tmp_path), cwd=tmp_path)
    end = time.monotonic() + 60
    while time.monotonic() < end and not (
            (tmp_path / "started").is_file() and (tmp_path / "started").read_text().count("\n") == 2):
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 143 and ended(tmp_path)
    started = (tmp_path / "started").read_text()
    assert f"--config {tmp_path}/mine.yaml --work {tmp_path}/a folder --out {tmp_path}/a folder/system" in started
