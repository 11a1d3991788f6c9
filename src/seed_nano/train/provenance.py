"""Whether the system in a work folder was trained there: from nothing, by its settings, at one
commit, on two cores."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import DataError
from seed_multimodal.settings import changed_settings, check_value
from seed_multimodal.state_dicts import load_state_dict
from seed_nano.report.judge import SHIPPED
from seed_nano.train.pipeline import Stage
from seed_nano.train.stages import used_stages
from seed_nano.train.times import StageRun
from seed_nano.train.workspace import Workspace, resolve_path

CORES = 2
# Changed after their training: scaled, and shifted by a threshold.
CHANGED_AT_THE_END = ("visual_projection.weight", "head.bias")


def check_trained_here(space: Workspace, runs: Sequence[StageRun]) -> str:
    """The commit of the runs of stages, those of the report excepted. Raises DataError: a rule is
    broken."""
    for name, stage in used_stages(space.system, space.config).items():
        if name != "report":
            check_stage(space, stage, [run for run in runs if run.stage == name])
    commit = check_conditions(space.work, runs)
    check_weights(space)
    return commit


def check_stage(space: Workspace, stage: Stage, runs: Sequence[StageRun]) -> None:
    """Raise DataError unless the stage has finished, with the folder's settings, without weights of
    other runs, in the time of its runs."""
    label = f"{space.work}: stage {stage.name}"
    # 1. It has finished, with these settings.
    if not space.record(stage.name).is_file():
        raise DataError(
            f"{label} has not finished; run python -m seed_nano.train nano --preset "
            f"{space.work / 'config.yaml'} --work {space.work}."
        )
    settings = stage.settings(space)
    before = read_json_object(space.work / f"{stage.name}.settings.json", DataError)
    if changes := changed_settings(before, settings):
        raise DataError(f"{label}: config.yaml has other settings ({'; '.join(changes)}); undo it.")

    # 2. It starts from nothing, and does not read the judge.
    for section, values in settings.items():
        if isinstance(values, Mapping) and values.get("start"):
            raise DataError(f"{label} starts from {values['start']}; train with {section}.start=''")
    file = space.work / f"{stage.name}.yaml"  # of an application
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    shipped = resolve_path(SHIPPED).parent.resolve()
    if "judge" in stage.reads or str(shipped) in text:
        raise DataError(f"{label} reads {shipped}, which only the report may; take it away.")

    # 3. Its times are those of this training.
    content = read_json_object(space.record(stage.name), DataError)
    recorded = check_value(float, content.get("seconds", 0.0), f"{label}: seconds")
    timed = sum(run.ended - run.begun for run in runs)
    if not runs or timed + 1 < recorded:
        raise DataError(
            f"{label} took {recorded:.0f} s by its record and {timed:.0f} s by times.jsonl; train "
            "in a new folder, by seed_nano.train alone."
        )


def check_conditions(work: Path, runs: Sequence[StageRun]) -> str:
    """The commit of the runs. Raises DataError: several or unknown ones, more cores, or a GPU."""
    for run in runs:
        label = f"{work}: stage {run.stage}"
        if run.gpu:
            raise DataError(f"{label} had a GPU; train with device=cpu.")
        if run.cores > CORES:
            raise DataError(f"{label} had {run.cores} cores; train on {CORES} (taskset -c 0,1).")
    commits = sorted({run.commit for run in runs})
    if len(commits) > 1 or commits[0] == "unknown" or "+" in commits[0]:
        raise DataError(
            f"{work}: the stages ran at {', '.join(commits)}; commit all changes, and train in a "
            "new folder at that commit."
        )
    return commits[0]


def check_weights(space: Workspace) -> None:
    """Raise DataError if the system has a tensor that no stage wrote."""
    files = sorted(space.work.rglob("*.safetensors"))
    in_system = [file for file in files if space.out in file.parents]
    trained: set[bytes] = set()
    for file in files:
        if file not in in_system:
            trained.update(map(_content, load_state_dict(file).values()))
    for file in in_system:
        for name, value in load_state_dict(file).items():
            # The tokenizer joins queries, keys and values; a bias that no network has is zero.
            parts = map(_content, value.flatten().chunk(3))
            is_known = _content(value) in trained or trained.issuperset(parts) or not value.any()
            if not is_known and not name.endswith(CHANGED_AT_THE_END):
                raise DataError(
                    f"{file}: {name} is not what a stage of {space.work} wrote; train in a new "
                    "folder."
                )


def _content(value: Tensor) -> bytes:
    """Digest of a tensor in half precision, in which a system is saved."""
    return hashlib.sha256(value.half().contiguous().numpy()).digest()
