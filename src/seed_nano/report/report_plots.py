"""Plots of a report: labels right on each rung of the ladder, and over the number of codes; tokens over the number of
things."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seed_multimodal.disk import replacing
from seed_multimodal.training.plots import COLOURS, figure_kind
from seed_nano.report.report_text import value_at
from seed_nano.report.split_run import SplitRun

RUNGS = {"judge on real pictures": ("ladder", "ceiling"), "VAE round trip": ("ladder", "vae", "all"),
         "true embedding → picture": ("ladder", "embedding", "all"), "32 codes → picture": ("reconstruction", "all"),
         "words → codes → picture": ("drawing", "all")}


def save_plots(runs: Sequence[SplitRun], out: Path) -> list[str]:
    """Write the plots of these runs into `out`; returns their names.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    for name in runs[0].plots:
        draw, title = PLOTS[name]
        figure, axes = _page()
        axes.set_ylim(0, 1.02)
        draw(axes, runs)
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))
        with replacing(out / name) as handle:
            figure.savefig(handle, format="png")
    return list(runs[0].plots)


def _page() -> tuple[Any, Any]:
    figure = figure_kind()(figsize=(7.5, 3.6), dpi=100, layout="constrained")
    return figure, figure.add_subplot()


def _ladder(axes: Any, runs: Sequence[SplitRun]) -> None:
    width = 0.8 / len(RUNGS)
    for place, (name, path) in enumerate(RUNGS.items()):
        found = [(i, value_at(run.sections, path)) for i, run in enumerate(runs)]
        bars = [(i + place * width, value) for i, value in found if value is not None]
        axes.bar([x for x, _ in bars], [value.value for _, value in bars], width * 0.92, label=name,
                 color=COLOURS[place], yerr=[[value.value - value.low for _, value in bars],
                                             [value.high - value.value for _, value in bars]],
                 error_kw={"elinewidth": 0.7, "ecolor": "#444444"})
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(runs))], [run.samples.split for run in runs], fontsize=9)


def _curve(axes: Any, runs: Sequence[SplitRun]) -> None:
    for run, colour in zip(runs, COLOURS, strict=False):
        points = [(int(number), part["all"].value) for number, part in run.sections["prefix"].items() if number != "n"]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=run.samples.split)
        axes.set_xticks([number for number, _ in points])


def _tokens(axes: Any, runs: Sequence[SplitRun]) -> None:
    """Mean and standard deviation, the runs side by side around each number of things."""
    step = 0.6 / len(runs)
    for place, (run, colour) in enumerate(zip(runs, COLOURS, strict=False)):
        found = [(int(number), part) for number, part in run.sections["tokens"]["things"].items()]
        axes.errorbar([number + (place - (len(runs) - 1) / 2) * step for number, _ in found],
                      [part["mean"].value for _, part in found], yerr=[part["spread"] for _, part in found],
                      color=colour, marker="o", markersize=4, linewidth=0.8, elinewidth=0.8, capsize=2,
                      label=run.samples.split)
    axes.set_ylim(0, runs[0].sections["tokens"]["patches"] + 0.5)
    axes.set_xlim(-0.5, 4.5)
    axes.set_xticks(range(5), ["no thing", "1", "2", "3", "4 things"], fontsize=9)


PLOTS = {"ladder.png": (_ladder, "share of pictures with every label right, rung by rung"),
         "codes_curve.png": (_curve, "share with every label right after the first codes"),
         "tokens.png": (_tokens, "tokens of a picture by the number of things in it: mean and standard deviation")}
