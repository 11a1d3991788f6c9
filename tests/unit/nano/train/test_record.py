"""The record: times of stages, differences, and which runs make one."""

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from seed_multimodal.errors import DataError, SeedError
from seed_multimodal.evaluation.metrics import t_interval
from seed_nano.record import Figures, Record, differences, join_runs, main
from seed_nano.train.__main__ import target_line
from seed_nano.train.times import StageRun, read_runs, timed, wall_seconds
from seed_nano.train.workspace import Workspace, load_settings


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20))))
def test_wall_seconds_counts_each_second_once(times):
    runs = [
        StageRun(
            stage="clip", begun=begun, ended=begun + seconds, cpu="", cores=2, gpu="", commit=""
        )
        for begun, seconds in times
    ]
    covered = {second for run in runs for second in range(run.begun, run.ended)}
    assert wall_seconds(runs) == len(covered)


def test_read_runs_counts_killed_runs_and_no_pauses(tmp_path):
    def write(*lines):
        (tmp_path / "times.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def begin(stage, moment):
        return {"stage": stage, "begun": moment, "cpu": "A", "cores": 2, "commit": "c0ffee"}

    def end(stage, moment):
        return {"stage": stage, "ended": moment}

    # Side by side, a pause, and a run that was killed: it counts up to the next one.
    write(
        *(begin("vae", 0), begin("clip", 1), end("clip", 4), end("vae", 10)),
        *(begin("unet", 20), begin("unet", 27), end("unet", 30)),
    )
    spans = [(run.stage, run.begun, run.ended) for run in read_runs(tmp_path)]
    assert spans == [("vae", 0, 10), ("clip", 1, 4), ("unet", 20, 27), ("unet", 27, 30)]
    assert wall_seconds(read_runs(tmp_path)) == 20
    # The last one of the file.
    write(begin("vae", 0), begin("clip", 1), end("clip", 4))
    assert wall_seconds(read_runs(tmp_path)) == 4
    damages = {
        "begun": ["a", None],
        "cpu": [None, 3],
        "cores": [None, math.inf],
        "commit": [None, 3],
    }
    for damaged in (
        [],
        {"stage": "vae", "begun": 0},
        *({**begin("vae", 0), key: value} for key, row in damages.items() for value in row),
    ):
        write(damaged)
        with pytest.raises(SeedError, match=r"times\.jsonl"):
            read_runs(tmp_path)


def test_timed_writes_the_end_of_a_stage_that_fails(tmp_path):
    # A run that is stopped must not count the pause after it.
    space = Workspace(load_settings("nano", "test"), tmp_path, tmp_path)
    with pytest.raises(KeyboardInterrupt), timed(space, "vae"):
        raise KeyboardInterrupt
    (run,) = read_runs(tmp_path)
    assert run.cpu and run.cores >= 1 and run.commit
    assert "ended" in (tmp_path / "times.jsonl").read_text().splitlines()[-1]


@pytest.mark.parametrize(("drawings", "text"), [(0.9, "0.9 reached"), (0.89, "0.9 not reached")])
def test_target_line_compares_captions_and_drawings(tmp_path, drawings, text):
    figures = {
        "caption": {"all": {"value": 0.95, "n": 250}},
        "drawing": {"all": {"value": drawings}},
    }
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(json.dumps({"splits": {"val": figures}}))
    space = Workspace(load_settings("nano", "test"), tmp_path, tmp_path)
    assert text in target_line(space)


def record_of(*minutes, seeds=(0, 1, 2), cpus=("A",), **changes):
    runs = [
        Figures(seed=seed, minutes=value, captions=0.9, drawings=0.9, cpus=list(cpus))
        for seed, value in zip(seeds, minutes, strict=False)
    ]
    return Record(
        **{
            "date": "2026-01-01",
            "commit": "c0ffee",
            "settings": {"pool": 48},
            "runs": runs,
            **changes,
        }
    )


def test_differences_are_paired_by_seed():
    last, record = record_of(200.0, 212.5, 190.0), record_of(80.0, 91.0, 85.5)
    expected = stats.ttest_rel([80.0, 91.0, 85.5], [200.0, 212.5, 190.0]).confidence_interval()
    interval = t_interval(differences(record, last))
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-3)


@pytest.mark.parametrize("seeds", [[0, 0], [0, 5]])
def test_seeds_are_refused_before_an_evaluation(seeds, tmp_path, capsys):
    folders = [tmp_path / str(index) for index in range(2)]
    for folder, seed in zip(folders, seeds, strict=True):
        folder.mkdir()
        (folder / "config.yaml").write_text(f"seed: {seed}\n")
    assert main(["check", *map(str, folders)]) == 2
    assert f"the seeds {seeds}" in capsys.readouterr().err
    (tmp_path / "last.json").write_text(json.dumps(asdict(record_of(1.0))))
    assert main(["check", *map(str, folders), "--against", str(tmp_path / "last.json")]) == 2
    assert "--against" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("second", "named"),
    [
        (record_of(1.0, seeds=[1], settings={"pool": 64}), "pool"),
        (record_of(1.0, seeds=[1], commit="decaf"), "commit"),
    ],
)
def test_join_runs_refuses_runs_of_two_recipes(second, named):
    assert asdict(join_runs([record_of(1.0), record_of(2.0, seeds=[1])]))["runs"][1]["seed"] == 1
    with pytest.raises(DataError, match=named):
        join_runs([record_of(1.0), second])


def test_check_joins_runs_that_were_checked_before(tmp_path, capsys):
    files = [tmp_path / f"{seed}.json" for seed in (2, 0, 1)]
    for seed, file in zip((2, 0, 1), files, strict=True):
        file.write_text(json.dumps(asdict(record_of(60.0 + seed, seeds=[seed]))))
    joined = tmp_path / "joined.json"
    assert main(["check", *map(str, files), "--out", str(joined)]) == 0
    assert json.loads(joined.read_text()) == asdict(record_of(60.0, 61.0, 62.0))
    # A seed that lacks is named, a second time refused.
    assert main(["check", str(files[0]), str(files[1])]) == 1
    assert "seed 1" in capsys.readouterr().out
    assert main(["check", str(joined), str(files[2])]) == 2
    assert "each once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cpus", "last_cpus", "code"),
    [
        (["A"], ["A"], 0),
        (["A"], ["B"], 1),
        (["A", "B"], ["A", "B"], 1),
        (["A"], [], 1),
        ([], [], 1),
    ],
)
def test_a_record_is_compared_with_the_last_one_of_its_cpu(cpus, last_cpus, code, tmp_path, capsys):
    # A shorter time may be the machine's.
    last, record = tmp_path / "last.json", tmp_path / "record.json"
    last.write_text(json.dumps(asdict(record_of(90.0, 91.0, 92.0, cpus=last_cpus))))
    record.write_text(json.dumps(asdict(record_of(60.0, 61.5, 62.0, cpus=cpus))))
    assert main(["check", str(record), "--against", str(last)]) == code
    assert ("one CPU for both" in capsys.readouterr().out) == bool(code)


def test_a_file_from_before_the_cpu_was_kept_is_read(tmp_path):
    old = asdict(record_of(60.0, 61.0, 62.0))
    for run in old["runs"]:
        del run["cpus"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert main(["check", str(tmp_path / "old.json")]) == 0
