"""A record: the wall time of two cores from nothing to captions and drawings that are right.

    python -m seed_nano.train nano --preset record --jobs 2 --work runs/seed0 seed=0
    python -m seed_nano.record check runs/seed0 runs/seed1 runs/seed2 --against 201 198 204

`check` recomputes from the work folders of finished runs whether they are a record, and prints
their row for docs/records.md, which has the rules.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from seed_multimodal.cli.common import program_parser
from seed_multimodal.disk import read_json_object
from seed_multimodal.entry import DONE, SOME_FAILED, bounded_int, run_program
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation.metrics import Estimate, t_interval
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_nano.report.judge import Judge, find_judge
from seed_nano.report.samples import Sizes, make_samples
from seed_nano.report.sections import Run, caption, drawing
from seed_nano.report.systems import System
from seed_nano.train.pipeline import read_times
from seed_nano.train.stages import PIPELINES
from seed_nano.train.workspace import Workspace, load_settings

CORES = 2
TARGET = 0.9  # of captions and drawings with every label right
N_SEEDS = 3
SCENES = 250  # of the split `val`
# Stages that change neither captions nor drawings; their time does not count.
AFTERWARDS = ("known", "report")


@dataclass(frozen=True)
class Result:
    """What a run took and reached.

    Attributes:
        minutes: during which a stage was running.
        captions, drawings: share of scenes of `val` with every label right.
        commits: of the code that ran.
    """

    seed: int
    minutes: float
    captions: float
    drawings: float
    commits: tuple[str, ...]

    @property
    def reaches(self) -> bool:
        """Whether both shares are at the target."""
        return min(self.captions, self.drawings) >= TARGET


def check_run(work: Path, scenes: int = SCENES) -> Result:
    """The result of a run of nano, of which `work` is the folder.

    Raises DataError: it has a stage that is missing, was trained by other settings or began with
    given weights; it was killed; it had more than two cores.
    """
    # 1. The settings, with which every stage began from nothing.
    config = load_settings("nano", work / "config.yaml")
    for name, section in asdict(config).items():
        if isinstance(section, dict) and section.get("start"):
            raise DataError(f"{work}: {name}.start is {section['start']}; begin from nothing.")

    # 2. The stages.
    space = Workspace(config, work, work / "system")
    stages = {stage.name: stage for stage in PIPELINES["nano"][1] if stage.name not in AFTERWARDS}
    for name, stage in stages.items():
        if not space.record(name).is_file():
            raise DataError(f"{work}: stage {name} is not finished; run the same command again.")
        if read_json_object(work / f"{name}.settings.json") != stage.settings(space):
            raise DataError(f"{work}: stage {name} ran with other settings than config.yaml's.")

    # 3. The time.
    times = read_times(work)
    if missing := stages.keys() - {str(line["stage"]) for line in times}:
        raise DataError(f"{work}: times.jsonl has no stage {', '.join(sorted(missing))}.")
    counted = [line for line in times if line["stage"] in stages]
    for line in counted:
        if line["ended"] is None:
            raise DataError(f"{work}: stage {line['stage']} was killed, so its time is not known.")
        if line["cores"] > CORES:
            raise DataError(
                f"{work}: stage {line['stage']} had {line['cores']} cores; limit them to {CORES} "
                "(taskset -c 0,1)."
            )
    spans = [(float(line["begun"]), float(line["ended"])) for line in counted]
    commits = tuple(dict.fromkeys(str(line["commit"]) for line in counted))

    # 4. What the system can do, by a judge that no stage has read.
    system = MultimodalSystem.from_pretrained(space.out, device="cpu", log=None)
    judge = Judge.from_pretrained(find_judge("pretrained/nano"))
    run = Run(System(system), judge, make_samples("val", Sizes.limited(scenes)))
    captions, drawings = (section(run)["all"].value for section in (caption, drawing))
    return Result(config.seed, covered(spans) / 60, captions, drawings, commits)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: what ran side by side counts once, pauses do not."""
    total = 0.0
    end = float("-inf")
    for begun, ended in sorted(spans):
        total += max(0.0, ended - max(begun, end))
        end = max(end, ended)
    return total


def row(results: Sequence[Result], against: Sequence[float] = ()) -> str:
    """The line of docs/records.md; `against`: minutes of the last record's runs, by seed."""
    minutes = [result.minutes for result in results]
    commits = dict.fromkeys(commit for result in results for commit in result.commits)
    difference = "first"
    if against:
        pairs = zip(minutes, against, strict=True)
        difference = _interval(t_interval([new - old for new, old in pairs]), "+")
    cells = [
        _interval(t_interval(minutes)),
        ", ".join(f"{value:.1f}" for value in minutes),
        " ".join(commit[:8] + commit[40:] for commit in commits),
        ", ".join(str(result.seed) for result in results),
        ", ".join(f"{result.captions:.3f}" for result in results),
        ", ".join(f"{result.drawings:.3f}" for result in results),
        difference,
    ]
    return f"| {' | '.join(cells)} |"


def _interval(mean: Estimate, sign: str = "") -> str:
    text = f"{mean.value:{sign}.1f}"
    return text if mean.n < 2 else f"{text} ({mean.low:{sign}.1f} … {mean.high:{sign}.1f})"


def check(options: argparse.Namespace) -> int:
    """The command."""
    # 1. The runs.
    if options.against and len(options.against) != len(options.work):
        raise DataError("--against: give the minutes of as many runs as there are folders.")
    results = [check_run(work, options.limit) for work in options.work]
    for work, result in zip(options.work, results, strict=True):
        print(
            f"{work}: seed {result.seed}, {result.minutes:.1f} minutes, "
            f"captions {result.captions:.3f}, drawings {result.drawings:.3f}"
        )

    # 2. The verdict.
    reasons: list[str] = []
    if len({result.seed for result in results}) < N_SEEDS:
        reasons.append(f"a record has {N_SEEDS} seeds")
    if not all(result.reaches for result in results):
        reasons.append(f"captions and drawings must be {TARGET} or more for each seed")
    if options.limit != SCENES:
        reasons.append(f"scores are of {SCENES} scenes")
    print(row(results, options.against))
    print(f"No record: {'; '.join(reasons)}." if reasons else "A record, if it took less time.")
    return SOME_FAILED if reasons else DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = program_parser("python -m seed_nano.record", __doc__ or "")
    commands = parser.add_subparsers(required=True)
    checked = commands.add_parser("check", help="check runs, and print their row")
    checked.add_argument("work", type=Path, nargs="+", help="work folder of a run")
    checked.add_argument(
        "--against",
        type=float,
        nargs="+",
        default=[],
        help="minutes of the last record's runs, in the order of these folders",
    )
    checked.add_argument(
        "--limit", type=bounded_int(1), default=SCENES, help="scenes (%(default)s)"
    )
    return run_program(parser, check, arguments, "record")


if __name__ == "__main__":
    raise SystemExit(main())
