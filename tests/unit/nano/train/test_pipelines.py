"""The pipelines of nano, nano-x and nano-lavit at toy size: killed, resumed, and the systems they
train."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lavis_runs import log_of, require_lavis
from llm_runs import environment
from PIL import Image
from real_processes import run_process, wait_until
from repository import NANO, ROOT
from tiny import read_json

from seed_multimodal import MultimodalSystem
from seed_multimodal.disk import folder_lock
from seed_multimodal.errors import SeedError
from seed_nano.train.__main__ import main
from seed_nano.world.scene import render
from seed_nano.world.splits import scene_at
from seed_nano.world.wide import wide_at

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(900)]


def arguments(system: str, work: Path, *options: str) -> list[str]:
    start = [] if system == "nano" else [f"start={NANO}"]
    return [*f"{system} --preset test --work {work}".split(), *start, *options]


def killed_and_resumed(system: str, work: Path, capfd, checkpoint: str, *options: str):
    """Kill a run, but not its child process, at the first checkpoint, and resume it."""
    run = subprocess.Popen(
        [sys.executable, "-m", "seed_nano.train", *arguments(system, work, *options)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    wait_until(lambda: any(work.glob(checkpoint)), run, 300)
    assert run.poll() is None, f"ended with {run.returncode} before {checkpoint}"
    run.kill()
    run.wait()
    assert main(arguments(system, work, *options)) == 0
    assert "resumes from" in capfd.readouterr().out


def test_nano_is_killed_resumed_and_answers(tmp_path, capfd):
    # One pipeline of three in the suite; the others at night.
    require_lavis()
    work = tmp_path / "work"
    system = tmp_path / "work" / "system"
    more = ("train_clip.save_every_steps=1", "train_clip.steps=30", "--only", "clip")
    killed_and_resumed("nano", work, capfd, "clip.checkpoints/checkpoint-*", *more)

    settings = [
        "train_clip.steps=30",
        "train_stage1.accumulate=2",
        *(f"train_{name}.save_every_steps=4" for name in ("pretrain", "sft")),
    ]
    assert main(arguments("nano", work, "--jobs", "2", "--no-report", *settings)) == 0
    output = capfd.readouterr().out
    assert "[clip] already done" in output
    assert all(output.count(f"== {name}\n") == 1 for name in ("vae", "llm_sft"))

    seed = MultimodalSystem.from_pretrained(system)
    image = Image.new("RGB", (80, 50), (200, 30, 30))
    codes = seed.tokenize([image])
    assert (codes[0] // 2).tolist() == list(range(32))  # 64 codes: two per position
    assert seed.reconstruct([image], num_inference_steps=2)[0].size == (64, 64)
    assert isinstance(seed.describe(image, max_new_tokens=8), str)
    assert seed.draw("a red square", num_inference_steps=2).size == (64, 64)

    # The loss of stage 2 has two parts that the originals' has not; their networks are not saved.
    assert max(log_of(work / "stage1", "stage1")) == 4  # steps, each of two micro-steps
    lines = log_of(work / "stage2", "stage2")
    line = lines[max(lines)]
    parts = [line[f"loss_{name}"] for name in ("embed", "distil_image", "readout", "labels")]
    assert line["loss"] == pytest.approx(sum(parts), rel=1e-4)
    saved = torch.load(work / "stage2" / "checkpoint_0.pth", weights_only=True)["model"]
    assert not any(name.startswith(("label_heads", "readout")) for name in saved)

    # Finished stages are skipped; without its record a training resumes from its last checkpoint.
    vae = work / "autoencoder/vae/diffusion_pytorch_model.safetensors"
    for file in (vae, work / "vae.done.json"):
        file.unlink()
    again = ("--only", "vae,unet,llm_pretrain,records", *settings, "train_unet.lr=0.5")
    assert main(arguments("nano", work, *again)) == 0
    output = capfd.readouterr().out
    assert vae.is_file() and "resumes from" in output and output.count("already done") == 3
    assert "train_unet.learning_rate: 0.001 -> 0.5" in output and "vae was run again" in output
    assert main(arguments("nano", work, "--only", "records", "records.captions=13", *settings)) == 0
    assert read_json(work / "records.done.json")["captions"] == 13


@pytest.mark.nightly
def test_nano_x_is_killed_resumed_and_answers(tmp_path, capfd):
    work = tmp_path / "work"
    killed_and_resumed(
        "nano-x", work, capfd, "sft/checkpoint-2", "--no-report", "train_sft.steps=8"
    )

    seed = MultimodalSystem.from_pretrained(work / "system", log=None)
    image, wide = (
        Image.fromarray(pixels)
        for pixels in (render(scene_at(0, 0, "val")), render(wide_at(0, 0, "val"), 128))
    )
    assert isinstance(seed.describe(wide, max_new_tokens=4), str)
    assert seed.detect(image, "the dog", max_new_tokens=4).image.size == (64, 64)
    assert seed.draw("a noto dog").size == seed.edit(image, "Put it at night.").size == (64, 64)


@pytest.mark.nightly
def test_nano_lavit_is_killed_resumed_and_answers(tmp_path, capfd):
    work = tmp_path / "work"
    killed_and_resumed(
        "nano-lavit", work, capfd, "language/checkpoint-2", "--no-report", "train_llm.steps=8"
    )

    lavit = MultimodalSystem.from_pretrained(work / "system", log=None)
    image = Image.fromarray(render(scene_at(0, 0, "val")))
    # An untrained model's likeliest token is no code.
    hot = {"do_sample": True, "temperature": 10.0, "top_k": 0}
    assert lavit.draw("a dog on a meadow", ratio="3:2", **hot).size == (80, 56)
    assert lavit.compose([image, "Put it at night."], **hot).size == (64, 64)


def test_pipeline_stops_other_stages_if_one_fails(tmp_path):
    # clip cannot save, vae would train for hours.
    (tmp_path / "clip.checkpoints").write_text("not a folder")
    options = ("--jobs", "2", "--only", "vae,clip", "train_vae.steps=1000000")
    command = [sys.executable, "-m", "seed_nano.train", *arguments("nano", tmp_path, *options)]
    run = run_process(command, env=environment(), cwd=ROOT, timeout=300)
    assert run.returncode == 2
    assert "clip.checkpoints" in run.stderr
    assert not (tmp_path / "vae.done.json").exists()


def test_main_fails_without_a_start_or_if_a_stage_is_running(tmp_path, capsys):
    words = f"nano-lavit --preset test --work {tmp_path} start=nothing --only start"
    assert main(words.split()) == 2
    assert "start" in capsys.readouterr().err
    # Two runs would write one folder.
    with folder_lock(tmp_path, SeedError, name=".start.lock"):
        assert main(arguments("nano", tmp_path, "--only", "start")) == 2
    assert "stage start" in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.parametrize(
    "row",
    [
        "study quantizer.kind=fsq quantizer.levels=[4,2] quantizer.queries=16 tokenizer.code_dim=2 "
        "tokenizer.codes=128 quantizer.causal=false",
        "study quantizer.kind=lfq tokenizer.code_dim=5",
        "study tokenizer.sections=false",
        "study-grid",
        "study-lavit",
    ],
)
def test_study_measures_a_tokenizer(tmp_path, capsys, row):
    # Any tokenizer goes through the language model, its evaluation and the study's table.
    require_lavis()
    system, *settings = row.split()
    command = [*f"{system} --preset test --work {tmp_path}".split(), f"start={NANO}", *settings]
    assert main(command) == 0
    figures = read_json(tmp_path / "measures.done.json")
    assert figures["codes"]["image_bits"] > 0
    for split in ("val", "styles"):
        assert figures[split]["bits"]["value"] > 0
        assert 0 <= figures[split]["caption"]["all"]["value"] <= 1
        drawn = figures[split]["drawing"]
        assert (drawn is None) == (system == "study-lavit")
    if "fsq" in row:
        assert figures["codes"]["codebook"] == 128
        config = read_json(tmp_path / "system" / "seed_tokenizer" / "config.json")
        assert (config["quantizer"], config["fsq_levels"], config["num_query"]) == (
            "fsq",
            [4, 2],
            16,
        )
        assert config["qformer"]["causal_queries"] == 0
        assert list(figures["prefix"]) == ["1", "2", "4", "8", "16"]
    assert main(command) == 0
    assert "[measures] already done" in capsys.readouterr().out
