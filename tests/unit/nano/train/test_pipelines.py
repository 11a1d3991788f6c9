"""The pipelines of nano, nano-x and nano-lavit at toy size: killed, resumed, and the systems they
train."""

import json
import re
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
from tiny import read_json, write_json
from warm_processes import PYTHON

from seed_multimodal import MultimodalSystem
from seed_multimodal.disk import folder_lock
from seed_multimodal.errors import SeedError
from seed_nano import record
from seed_nano.train.__main__ import main
from seed_nano.train.pipeline import Pipeline, Stage
from seed_nano.train.workspace import Workspace, load_settings
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
        [PYTHON, "-m", "seed_nano.train", *arguments(system, work, *options)],
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


# What breaks a rule of the record: files that are removed (None), replaced, or in which a text is,
# and what the message names.
BROKEN = [
    ({"unet.done.json": None}, "stage unet"),
    ({"vae.settings.json": (b'"learning_rate": 0.002', b'"learning_rate": 0.003')}, "train_vae"),
    (
        {
            "config.yaml": (b"start: ''", b"start: pretrained/nano"),
            "vae.settings.json": (b'"start": ""', b'"start": "pretrained/nano"'),
        },
        "starts from pretrained/nano",
    ),
    ({"stage1.yaml": (b"model:", f"judge: {NANO / 'judge'}\nmodel:".encode())}, "stage stage1"),
    ({"stage2/stage2.done.json": (b'"seconds": ', b'"seconds": 9')}, "stage stage2"),
    ({"times.jsonl": (b'"stage": "llm"', b'"stage": "lm"')}, "stage llm"),
    ({"times.jsonl": (b'"cores": 2', b'"cores": 3')}, "3 cores"),
    ({"times.jsonl": (b'"commit": "c0ffee"', b'"commit": "c0ffee+changes"')}, "c0ffee+changes"),
    ({"system/seed_llama/model.safetensors": NANO / "seed_llama/model.safetensors"}, "seed_llama"),
]


def assert_record_is_checked(work: Path, capfd, monkeypatch):
    """A run that is valid and too weak, and the same with one thing changed."""
    # 1. Whatever machine and commit this is.
    times = work / "times.jsonl"
    text = re.sub(r'"cores": \d+', '"cores": 2', times.read_text())
    times.write_text(re.sub(r'"commit": "[^"]*"', '"commit": "c0ffee"', text))
    monkeypatch.setattr(record, "SCENES", 2)
    out = work / "record.json"
    assert record.main(["check", str(work), "--out", str(out)]) == 1
    assert "seed 1, seed 2, captions of seed 0" in capfd.readouterr().out
    (figures,) = read_json(out)["runs"]
    assert figures["minutes"] > 0
    assert figures["cpus"] == [json.loads(text.splitlines()[0])["cpu"]]

    # 2. What breaks a rule.
    for changes, named in BROKEN:
        before = {name: (work / name).read_bytes() for name in changes}
        for name, change in changes.items():
            if change is None:
                (work / name).unlink()
            elif isinstance(change, Path):
                (work / name).write_bytes(change.read_bytes())
            else:
                (work / name).write_bytes(before[name].replace(*change, 1))
                assert change[0] in before[name], name
        assert record.main(["check", str(work)]) == 2, named
        assert named in capfd.readouterr().err
        for name, content in before.items():
            (work / name).write_bytes(content)


def test_nano_is_killed_resumed_and_answers(tmp_path, capfd, monkeypatch):
    # One pipeline of three in the suite; the others at night.
    require_lavis()
    monkeypatch.setattr(sys, "executable", PYTHON)  # of the stages
    work = tmp_path / "work"
    system = tmp_path / "work" / "system"
    more = ("train_clip.save_every_steps=1", "train_clip.steps=30", "--only", "clip")
    killed_and_resumed("nano", work, capfd, "clip.checkpoints/checkpoint-*", *more)

    settings = [
        "train_clip.steps=30",
        "train_stage1.accumulate=2",
        *(f"train_{name}.save_every_steps=4" for name in ("pretrain", "sft")),
        "records.talk=0",
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

    assert not (work / "records" / "train" / "talk.tar").exists()
    assert_record_is_checked(work, capfd, monkeypatch)

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
def test_nano_without_stages_and_kinds_of_records_is_a_system(tmp_path, capsys, monkeypatch):
    # The record's preset needs neither a small autoencoder nor questions.
    require_lavis()
    less = [f"train_{name}.steps=0" for name in ("tiny", "sharp", "known")]
    less += [f"records.{kind}=0" for kind in ("questions", "edits", "documents", "stories")]
    assert main(arguments("nano", tmp_path, *less)) == 0
    printed = capsys.readouterr().out
    assert "== tiny" not in printed and "Target 0.9 not reached" in printed
    monkeypatch.setattr(record, "SCENES", 2)
    assert record.main(["check", str(tmp_path)]) in (1, 2)  # by the state of the repository


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
    command = [PYTHON, "-m", "seed_nano.train", *arguments("nano", tmp_path, *options)]
    run = run_process(command, env=environment(), cwd=ROOT, timeout=300)
    assert run.returncode == 2
    assert "clip.checkpoints" in run.stderr
    assert not (tmp_path / "vae.done.json").exists()


WAITING = """
import sys, time
from pathlib import Path
folder, name = Path(sys.argv[1]), sys.argv[2]
(folder / name).touch()
for _ in range(200 * (name == "long")):
    if (folder / "second").exists():
        sys.exit(0)
    time.sleep(0.1)
sys.exit(name == "long")
"""


def test_what_follows_a_finished_stage_runs_beside_others(tmp_path):
    # A resumed run of two jobs had one until its longest stage ended.
    space = Workspace(load_settings("nano", "test"), tmp_path, tmp_path / "system")
    stages = {
        "first": Stage("first", print),
        "long": Stage("long", print),
        "second": Stage("second", print, ("first",)),
    }
    write_json(space.record("first"), {})
    child = ["-c", WAITING, str(tmp_path)]
    Pipeline(space, stages, 2, child, keep_times=False).run(stages)
    assert (tmp_path / "second").exists() and not (tmp_path / "first").exists()


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
