"""`seed study`: rows × seeds × measures in real processes, killed and resumed; shipped files."""

import csv
import importlib.util
import json
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from data_files import write
from llm_runs import compose, environment, overrides, write_files
from PIL import Image
from real_processes import nothing_stays_behind, wait_until  # noqa: F401 (a fixture)
from repository import ROOT
from scipy import stats
from yaml_tables import read_tables

from seed_multimodal.cli.main import main
from seed_multimodal.config import with_values
from seed_multimodal.evaluation.metrics import t_interval
from seed_multimodal.evaluation.study import interval, plan, read_study
from seed_multimodal.models.registry import find_training

TABLES = read_tables(__file__)
SEEDS = (0, 1, 2)
GAINS = {"no gain": 1, "gain": 3, "from gain": 5}
STUDIES = sorted((ROOT / "configs/studies").glob("*.yaml"))
EXPERIMENTS = sorted({*(ROOT / "docs/experiments").glob("[!i]*.md")})  # not the index
HOW_TO = ROOT / "docs/how-to/run-a-study.md"
N_STEPS = 3


def write_study(out, **changes) -> Path:
    """The toy study in a folder with its programs; returns its file."""
    for name in ("toy.py", "measure.py"):
        (out / name).write_text(TABLES[name])
    file = out / "toy.yaml"
    file.write_text(yaml.safe_dump({**TABLES["study"], "folder": str(out), **changes}))
    return file


def command(file, *flags) -> list[str]:
    return ["study", str(file), "--out", str(file.parent / "out"), *map(str, flags)]


def run_lines(file) -> dict[tuple[str, int], dict[str, str]]:
    """Row and seed → line of runs.csv."""
    with open(file.parent / "out/runs.csv", newline="") as lines:
        return {(line["row"], int(line["seed"])): line for line in csv.DictReader(lines)}


def attempts(file) -> dict[str, int]:
    """ROW/SEED → how often its training was started."""
    out = file.parent / "out"
    return {
        str(path.parents[2].relative_to(out)): len(path.read_text())
        for path in out.glob("*/*/train/out/attempts")
    }


# ---- results


@pytest.mark.parametrize(
    "values",
    [
        [0.4, 0.7],
        [3.0, 1.0, 2.5],
        list(range(10)),
        list(range(12)),
        [2.0**k for k in range(31)],
        [0.2] * 4,
    ],
)
def test_t_interval_is_scipys(values):
    estimate = t_interval(values)
    low, high = (estimate.value, estimate.value)
    if len(set(values)) > 1:
        scale = stats.sem(values)
        low, high = stats.t.interval(0.95, len(values) - 1, estimate.value, scale)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=1e-3)
    assert t_interval(values[:1]).low == t_interval(values[:1]).high == values[0]


@pytest.mark.process
@pytest.mark.slow
def test_table_has_means_intervals_and_paired_differences(tmp_path, capsys):
    file = write_study(tmp_path, points=["figure", "with base", "of gains"])
    assert main(command(file, "--jobs", 3)) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")

    # 1. Each run's figures; the third row adds its gain to that of the second.
    for (row, seed), line in run_lines(file).items():
        figure = GAINS[row] * (seed + 1) ** 2
        assert (float(line["figure"]), float(line["with base"])) == (figure, figure + 10)

    # 2. The table: means, and differences by seed, by another formula.
    rows: dict[str, list[list[str]]] = {}
    for line in (tmp_path / "out/table.md").read_text().splitlines():
        if line.startswith("| "):
            name, *cells = line.strip("|").split(" | ")
            numbers = [re.findall(r"[+−]?\d+\.?\d*", cell) for cell in cells]
            rows[name.strip()] = rows.get(name.strip(), []) + numbers
            assert "with base ↓" in line or name.strip() != ""
    for name, gain in GAINS.items():
        n_runs, figure, _, _, again, difference, _, of_gains = rows[name]
        assert n_runs == again == ["3"]
        for cell, factor in ((figure, gain), (difference, gain - 1)):
            runs = [factor * (seed + 1) ** 2 for seed in SEEDS]
            mean = sum(runs) / 3
            low, high = stats.t.interval(0.95, 2, mean, stats.sem(runs)) if factor else (0, 0)
            shown = [float(number.replace("−", "-")) for number in cell]
            expected = [mean, (high - low) / 2] if factor else []
            assert shown == pytest.approx(expected, abs=0.05 * (high - low) / 2)
        assert of_gains == []
    for picture in ("curves.png", "points.png"):
        assert Image.open(tmp_path / "out" / picture).format == "PNG"

    # 3. The same command runs nothing; --quick is one seed with fewer steps, elsewhere.
    before = attempts(file)
    assert main(command(file)) == 0 and attempts(file) == before
    assert main([*command(file)[:2], "--out", str(tmp_path / "quick"), "--quick"]) == 0
    text = (tmp_path / "quick/table.md").read_text()
    assert "steps 2" in text and "| gain | 1 | 3 |" in text and "| gain | 1 | +2 |" in text


# ---- runs that are killed, fail, change, or do not fit


@pytest.mark.process
@pytest.mark.slow
def test_killed_study_and_killed_run_resume(tmp_path, capfd, nothing_stays_behind):  # noqa: F811
    rows, measures = TABLES["study"]["rows"][:2], TABLES["study"]["measures"][:1]
    file = write_study(tmp_path, rows=rows, measures=measures)
    hold = tmp_path / "hold-1"
    hold.touch()

    # 1. SIGKILL of the study ends its runs, too.
    started = [sys.executable, "-m", "seed_multimodal", *command(file)]
    process = subprocess.Popen(started, env=environment(VIRTUAL_ENV=sys.prefix))
    nothing_stays_behind.append(process)
    held = tmp_path / "out/no_gain/1/train/out/attempts"
    wait_until(held.exists, process)
    [run] = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    psutil.wait_procs([run], timeout=20)
    assert not run.is_running()

    # 2. SIGKILL of a run leaves the others; those that read its result wait.
    process = subprocess.Popen(started, env=environment(VIRTUAL_ENV=sys.prefix))
    nothing_stays_behind.append(process)
    wait_until(lambda: held.exists() and len(held.read_text()) == 2, process)
    [run] = psutil.Process(process.pid).children()
    hold.unlink()
    hold.with_name("hold-2").touch()  # the study is still running then
    run.send_signal(signal.SIGKILL)
    wait_until((tmp_path / "out/no_gain/2/train/out/attempts").exists, process)
    hold.with_name("hold-2").unlink()
    assert process.wait(60) == 1
    assert "no_gain/1/train" in capfd.readouterr().err
    assert ("no gain", 1) not in run_lines(file) and len(run_lines(file)) == 5

    # 3. The same command makes what is missing, and nothing else.
    assert main(command(file)) == 0
    assert len(run_lines(file)) == 6
    once = {f"{row}/{seed}": 1 for row in ("no_gain", "gain") for seed in SEEDS}
    assert attempts(file) == {**once, "no_gain/1": 3}


@pytest.mark.process
@pytest.mark.slow
def test_budget_refuses_what_does_not_fit(tmp_path, capsys):
    # After the first run a user reads the figures, and keeps what is done.
    file = write_study(tmp_path)
    (tmp_path / "slow").touch()
    assert main(command(file, "--budget", 5)) == 2
    message = capsys.readouterr().err
    seconds, left = map(float, re.findall(r"([\d.]+) s(?: with| are)", message))
    assert 0 <= left < 5 < seconds < 60
    assert sum(attempts(file).values()) == 1
    # A stage that was never timed cannot overrun.
    measure = {"name": "a", "file": "b", "key": "c", "command": "python nothing.py"}
    untimed = write_study(tmp_path, measures=[measure])
    assert main(["study", str(untimed), "--out", str(tmp_path / "b"), "--budget", "1.5"]) == 2
    assert len([*(tmp_path / "b").glob("*/*/train/done.json")]) < 4
    write_study(tmp_path)
    (tmp_path / "slow").unlink()
    assert main(command(file, "--budget", 60, "--seeds", 1)) == 0
    assert attempts(file) == {"no_gain/0": 1, "gain/0": 1, "from_gain/0": 1}


@pytest.mark.process
@pytest.mark.slow
def test_changed_command_or_remade_input_is_refused(tmp_path, capsys):
    # Else a table would mix runs of different settings.
    file = write_study(tmp_path, seeds=[0])
    assert main(command(file)) == 0
    rows = [
        {**row, "settings": row["settings"].replace("3", "4")} for row in TABLES["study"]["rows"]
    ]
    write_study(tmp_path, seeds=[0], rows=rows)
    assert main(command(file)) == 2
    assert "gain/0/train" in capsys.readouterr().err
    # The row is made again; the one that starts from its result is not mixed with the old one.
    # All that must be moved is named before anything runs.
    (tmp_path / "out/gain").rename(tmp_path / "old")
    assert main(command(file)) == 2
    error = capsys.readouterr().err
    assert "from_gain/0/train" in error and "from_gain/0/with_base" in error
    assert not (tmp_path / "out/gain").exists()
    (tmp_path / "out/from_gain").rename(tmp_path / "older")
    assert main(command(file)) == 0
    assert float(run_lines(file)["from gain", 0]["figure"]) == 6
    # Another folder has other programs.
    (tmp_path / "other").mkdir()
    for path in tmp_path.glob("*.py"):
        shutil.copy(path, tmp_path / "other")
    write_study(tmp_path, seeds=[0, 1], rows=rows, folder=str(tmp_path / "other"))
    assert main(command(file)) == 2
    assert "folder: " in capsys.readouterr().err


@pytest.mark.process
@pytest.mark.slow
def test_one_wrong_figure_costs_only_itself(tmp_path, capsys):
    # Each is named when its run ends, and left out of the table; the others stand there.
    measures = [
        {"name": name, "file": "summary.json", "key": key}
        for name, key in {
            "whole": "gain",
            "odd": "odd",
            "object": "score",
            "of text": "text.value",
            "misspelt": "scores.value",
            "with a dot": "a.b",
        }.items()
    ]
    failing = {"name": "fails", "file": "a.json", "key": "b", "command": "python nothing.py"}
    (tmp_path / "odd").write_text("[NaN, Infinity, 3]")
    rows = [{"name": "a|b", "settings": "1"}]
    file = write_study(tmp_path, measures=[*measures, failing], rows=rows, prepare={})
    assert main(command(file, "--json")) == 1
    report, error = capsys.readouterr()
    failures = json.loads(report)["failures"]
    assert len(failures) == 3 + 2 + 3 * 3 and all("out/a_b/" in text for text in failures)
    for text in (
        "odd must be a finite",
        "score: input should",
        "did you mean 'score.value'",
        "nothing",
    ):
        assert text in error and any(text in failure for failure in failures)
    [line, _] = [
        line for line in (tmp_path / "out/table.md").read_text().splitlines() if "a\\|b" in line
    ]
    assert line == r"| a\|b | 3 | 1 ± 0 | 3 (1) |  |  |  | 2 ± 0 |  |"

    # A key is mended without another training; what fails is tried again.
    before = attempts(file)
    measures[4]["key"] = "score.value"
    write_study(tmp_path, measures=measures[4:], rows=rows, prepare={})
    assert main(command(file)) == 0 and attempts(file) == before


@pytest.mark.parametrize(
    ("values", "sign", "scale", "text"),
    [
        ([1e-10, 2e-10, 4e-10], "", 0, "2.33e−10 ± 3.8e−10"),
        ([1e-18, -1e-18], "+", 1.0, "+0 ± 0"),
        ([0.1 + 0.2, 0.3], "", 0, "0.3 ± 0"),
        ([1234.0, 1300.0], "+", 0, "+1267 ± 419"),
        ([-0.5], "+", 0, "−0.5"),
        ([], "", 0, ""),
    ],
)
def test_figures_of_any_size_have_intervals(values, sign, scale, text):
    assert interval(values, sign, scale) == text


@pytest.mark.process
@pytest.mark.slow
def test_processes_of_a_run_end_with_it(tmp_path, nothing_stays_behind):  # noqa: F811
    # SIGTERM of the study, and a run's own end: else a resumed run has a second writer.
    rows, measures = [{"name": "a", "settings": "1"}], TABLES["study"]["measures"][:1]
    file = write_study(tmp_path, seeds=[0, 1], rows=rows, measures=measures)
    text = file.read_text().replace("python toy.py", "python parent.py")
    file.write_text(text)
    (tmp_path / "parent.py").write_text(TABLES["parent.py"])
    (tmp_path / "hold-1").touch()
    started = [sys.executable, "-m", "seed_multimodal", *command(file)]
    process = subprocess.Popen(started, env=environment(VIRTUAL_ENV=sys.prefix))
    nothing_stays_behind.append(process)
    wait_until((tmp_path / "out/a/1/train/out/attempts").exists, process)
    process.terminate()
    assert process.wait(60) == 130
    children = [int(path.read_text()) for path in (tmp_path / "out").rglob("child")]
    running = [process for process in psutil.process_iter() if process.pid in children]
    assert len(children) == 2 and psutil.wait_procs(running, timeout=20)[1] == []


@pytest.mark.parametrize("changes, problem", TABLES["faults"], ids=str)
def test_faulty_file_is_refused_by_name(changes, problem, tmp_path, capsys):
    file = write_study(tmp_path, **changes)
    assert main(command(file)) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out/prepare").exists()


# ---- trainings, the shipped files, and the pages


@pytest.mark.process
@pytest.mark.slow
def test_language_model_starts_from_another_row_and_is_measured(tmp_path):
    steps = [f"trainer.max_steps={N_STEPS}", "trainer.seed={seed}", "optim.warmup_ratio=0"]
    options = shlex.join(overrides(write_files(tmp_path), "{out}", *steps))
    text = "import sys; open(sys.argv[2], 'w').write('{\"step\": %s}' % sys.argv[1].split('-')[-1])"
    measured = shlex.join(["python", "-c", text, "{checkpoint}", "{out}/step.json"])
    file = write_study(
        tmp_path,
        folder="MultiModalLLM",
        seeds=[3],
        prepare={},
        train=f"python src/train/train.py {options}",
        rows=[{"name": "first"}, {"name": "further", "settings": "trainer.start={first}"}],
        measures=[
            {"name": "loss", "file": "summary.json", "key": "loss", "higher": False},
            {"name": "step", "file": "step.json", "key": "step", "command": measured},
        ],
    )
    assert main(command(file)) == 0
    first, further = run_lines(file).values()
    assert float(first["step"]) == float(further["step"]) == N_STEPS
    assert float(further["loss"]) < float(first["loss"])


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_settings_of_shipped_studies_are_those_of_their_programs(file, tmp_path):
    study = read_study(file, quick=True)
    assert file.stem == study.name
    for job in [job for run in plan(study, tmp_path).values() for job in run.values()]:
        folders = {name: tmp_path / name for name in ("out", "checkpoint", *job.reads)}
        words = with_values(job.words, folders)
        program = ROOT / study.folder / words[1]
        if words[1] == "-m":
            assert importlib.util.find_spec(words[2]) is not None
        else:
            assert program.is_file()
        if job.folder.name == program.parent.name == "train":
            training = find_training(program.stem)
            config = ROOT / study.folder / "configs" / f"{training.config}.yaml"
            pkgutil.resolve_name(training.task).run_type.read(
                compose(words[2:], config.parent, config.stem)
            )


def test_page_of_studies_has_a_study(tmp_path):
    [text] = re.findall(r"```yaml\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL)
    file = write(tmp_path / "rate.yaml", text)
    assert len(plan(read_study(file), tmp_path)) == 1 + 3 * 3


@pytest.mark.parametrize("page", EXPERIMENTS, ids=lambda page: page.stem)
def test_tables_of_experiments_say_how_many_runs_and_when(page):
    # A reader must not take one run for a mean over several.
    for section in page.read_text(encoding="utf-8").split("\n## "):
        if "\n| ---" in section:
            assert re.search(r"\b20\d\d-\d\d-\d\d\b", section)
            studies = re.findall(r"configs/studies/[\w-]+\.yaml", section)
            assert studies or re.search(r"\bone run\b", section, re.IGNORECASE)
            assert all((ROOT / study).is_file() for study in studies)
