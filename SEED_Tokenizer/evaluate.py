"""Losses (and codebook usage) of a trained stage on held-out splits, one JSON object on stdout.

    python evaluate.py --cfg-path lavis/projects/nano/pretrain_codebook.yaml \\
        --options model.load_finetuned=True model.finetuned=log/nano/Codebook/checkpoint_1.pth run.test_splits=[val]

Retrieval, reconstruction and contact sheets of an exported tokenizer: `seed eval tokenizer`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence

from train import build, parser

from seed_multimodal.entry import guarded


def evaluate(args: argparse.Namespace) -> int:
    """Print the mean losses of each split; exit code 0."""
    args.options = ["run.train_splits=[]", *args.options, "run.evaluate=True"]
    with contextlib.redirect_stdout(sys.stderr):  # log lines of loading
        result = build(args).evaluate()
    print(json.dumps(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code (2: an error, with one sentence on stderr)."""
    args = parser(str(__doc__)).parse_args(argv)
    return guarded("evaluate.py", args.debug, lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())
