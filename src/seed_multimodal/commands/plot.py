"""`seed plot`: the curves of training runs, drawn over each other."""

from __future__ import annotations

import argparse
import json

from seed_multimodal.commands.common import add_json
from seed_multimodal.entry import DONE, log_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a training run, or its NAME.log.jsonl")
    parser.add_argument("--out", default="curves.png", metavar="FILE",
                        help="figure to write, .png, .pdf or .svg (default: %(default)s)")
    add_json(parser)


def plot(args: argparse.Namespace) -> int:
    """Draw the figure and print its name to stdout."""
    from seed_multimodal.training.plots import draw_runs

    logs = draw_runs(args.runs, args.out)
    for log in logs:
        log_line(f"{log}: drawn.")
    print(json.dumps({"figure": args.out, "logs": [str(log) for log in logs]}) if args.json else args.out)
    return DONE
