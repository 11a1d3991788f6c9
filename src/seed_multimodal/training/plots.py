"""Curves of training runs, drawn from their logs `NAME.log.jsonl`: a panel for each quantity, a colour for each run.

Numbers of evaluations (`eval_loss`, `valid/SPLIT/loss`) are dots in the panel of the quantity that they measure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from seed_multimodal.disk import disk_reason, replacing, writing
from seed_multimodal.errors import ConfigError, DataError, SeedError, first_line

SUFFIX = ".log.jsonl"
FORMATS = (".png", ".pdf", ".svg")
COLUMNS = 4
# Key of a log -> title of its panel; these come after the losses, in this order.
TITLES = {"grad": "gradient norm", "grad_norm": "gradient norm", "lr": "learning rate",
          "learning_rate": "learning rate", "samples_per_s": "samples/s", "tokens_per_s": "tokens/s",
          "wait_share": "share of time waiting for data", "codebook_used": "share of codes used",
          "perplexity": "perplexity of the codes"}
NOT_DRAWN = ("step", "epoch", "samples", "tokens", "useful_tokens_per_s", "seconds_per_step", "eta_seconds",
             "peak_memory_mib", "tflops", "mfu", "fill", "last_loss", "loss_scale", "bad_samples")
Series = dict[tuple[str, str | None], dict[int, float]]  # (panel, split of an evaluation or None) -> {step: value}


def save_curves(folder: str | Path, log: Callable[[str], None] = print) -> None:
    """Draw all logs of a run's folder into its `curves.png`; a failure is logged, never raised."""
    out = Path(folder) / "curves.png"
    try:
        draw_runs([folder], out)
    except (SeedError, OSError, ValueError, RuntimeError, ImportError) as error:
        log(f"{out}: the curves were not drawn ({first_line(error)}).")


def draw_runs(runs: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Draw runs (output folders with all their logs, or log files) over each other; returns the logs that were drawn.

    Raises:
        DataError: no such run, no log in it, a log without numbers, a file that cannot be written.
        ConfigError: `out` has another ending than `FORMATS`.
    """
    out = Path(out)
    if out.suffix.lower() not in FORMATS:
        raise ConfigError(f"{out}: a figure ends with {', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")
    logs = list(dict.fromkeys(log for run in runs for log in find_logs(Path(run))))
    figure = _figure({str(log).removesuffix(SUFFIX): read_log(log) for log in logs})
    with writing(out, DataError):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as handle:
            figure.savefig(handle, format=out.suffix[1:].lower())
    return logs


def find_logs(run: Path) -> list[Path]:
    """The log itself, or those of a folder that no later run has replaced. Raises DataError: there is none."""
    logs = [run] if run.is_file() else sorted(run.glob(f"*{SUFFIX}"))
    logs = [file for file in logs if not file.name.endswith(f".old{SUFFIX}")]
    if not logs:
        raise DataError(f"{run}: holds no log of a training run (NAME{SUFFIX})." if run.is_dir() else
                        f"{run}: there is no such run (an output folder or a log file).")
    return logs


def read_log(log: Path) -> Series:
    """The numbers of a log; of a step that was made twice the last. Torn lines are skipped.

    Raises:
        DataError: it cannot be read, or holds no numbers.
    """
    series: Series = {}
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{log}: cannot be read ({disk_reason(error)}).") from error
    for row in text.splitlines():
        try:
            line = json.loads(row)
            step = int(line["step"])
        except (ValueError, TypeError, KeyError):
            continue
        for key, value in line.items():
            quantity, split = _quantity(key)
            if quantity not in NOT_DRAWN and isinstance(value, int | float):
                series.setdefault((TITLES.get(quantity, quantity), split), {})[step] = value
    if not series:
        raise DataError(f"{log}: holds no line with a step and its numbers.")
    return series


def _quantity(key: str) -> tuple[str, str | None]:
    """Quantity of a log's key, and the split of an evaluation that it is of."""
    if key.startswith("valid/"):
        return key.rpartition("/")[2], key.split("/")[1]
    return (key.removeprefix("eval_"), "evaluation") if key.startswith("eval_") else (key, None)


def _figure(runs: dict[str, Series]) -> Any:
    from matplotlib.figure import Figure

    found = dict.fromkeys(title for series in runs.values() for title, _ in series)
    last = [title for title in dict.fromkeys(TITLES.values()) if title in found]
    titles = sorted((title for title in found if title not in last), key=lambda title: title != "loss") + last
    rows = -(-len(titles) // COLUMNS)
    figure = Figure(figsize=(3.6 * min(COLUMNS, len(titles)) + 0.3, 2.5 * rows + 0.7), dpi=110, layout="constrained")
    for number, title in enumerate(titles, 1):
        axes = figure.add_subplot(rows, min(COLUMNS, len(titles)), number)
        axes.set_title(title, fontsize=9, loc="left")
        axes.grid(alpha=0.4)
        for place, series in enumerate(runs.values()):
            for (_, split), points in (item for item in series.items() if item[0][0] == title):
                style = {"linestyle": ":", "marker": "o"} if split else {"marker": "." if len(points) == 1 else None}
                axes.plot(*zip(*sorted(points.items()), strict=True), color=f"C{place}", label=split, **style)
        if any(split for series in runs.values() for one, split in series if one == title):
            axes.legend(fontsize=7)
    if len(runs) > 1:
        lines = [figure.axes[0].plot([], [], color=f"C{place}")[0] for place in range(len(runs))]
        figure.legend(lines, list(runs), loc="outside upper center", fontsize=8)
    else:
        figure.suptitle(next(iter(runs)), fontsize=10)
    return figure
