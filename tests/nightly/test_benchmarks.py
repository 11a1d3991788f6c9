"""The benchmarks run at their smallest, and their figures belong together."""

import json
import os
import sys

import pytest
from real_processes import run_checked
from repository import ROOT
from yaml_tables import read_tables

pytestmark = [pytest.mark.nightly, pytest.mark.process, pytest.mark.timeout(900)]
LINES = read_tables(__file__)


def run(*command: str, folder=ROOT) -> str:
    """What a program prints; without compilation."""
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1", "VIRTUAL_ENV": sys.prefix}
    return run_checked(command, cwd=folder, env=environment).stdout


def test_gpu_card_of_nano_on_a_cpu(tmp_path):
    # Without it a user of a GPU meets a broken part after minutes of paid time.
    flags = f"{tmp_path} --device cpu --model pretrained/nano".split()
    run("bash", "benchmarks/gpu_card.sh", *flags)
    lines = [
        json.loads(line)
        for file in tmp_path.glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    names = [line["benchmark"] for line in lines]
    assert {name: names.count(name) for name in names} == LINES
    for line in lines:
        rates = [value for key, value in line["results"].items() if key.endswith("_per_second")]
        assert rates and rates[0] > 0, line
        assert line["variant"] != "plain" or line["results"]["times_plain"] == 1.0
    assert (tmp_path / "card.md").read_text().count("\n| ") == len(lines) + 2

    # A part that is there is not run again; others are.
    (tmp_path / "generation.jsonl").unlink()
    seconds = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.jsonl")}
    run("bash", "benchmarks/gpu_card.sh", *flags)
    assert (tmp_path / "generation.jsonl").is_file()
    assert all(file.stat().st_mtime_ns == written for file, written in seconds.items())


def test_loading_and_quantization_print_figures():
    printed = run(sys.executable, "benchmarks/loading.py", "--records", "200", "--images", "2")
    names = [line.partition(":")[0] for line in printed.splitlines()]
    assert names == ["256x256", "640x480", "2048x1536", "tar", "jsonl"]
    rows = run(sys.executable, "benchmarks/quantization.py").splitlines()[1:]
    assert len(rows) == 5 and all(float(row.split("|")[2]) > 0 for row in rows)


def test_peer_trainers_make_the_same_step():
    # Otherwise the table compares the seconds of different computations.
    program = (sys.executable, "benchmarks/peer_trainers.py")
    ours, peer = (
        json.loads(run(*program, way, "third", "--steps", "2").splitlines()[-1])
        for way in ("ours", "trainer")
    )
    assert ours["loss"] == pytest.approx(peer["loss"], rel=1e-5)
    assert ours["norm"] == pytest.approx(peer["norm"], rel=1e-5)


def test_original_layouts_load(tmp_path):
    # The recorded names and shapes of the originals' files are those that the system reads.
    run(sys.executable, "benchmarks/original_layouts.py", "8b", str(tmp_path / "pretrained"))
    code = (
        "from seed_multimodal.models.seed.modeling import Seed2Tokenizer; "
        "Seed2Tokenizer.from_pretrained('pretrained/seed_tokenizer', device='cpu')"
    )
    run(sys.executable, "-c", code, folder=tmp_path)
