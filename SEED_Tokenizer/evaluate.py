"""Losses (and codebook usage) of a trained stage on held-out splits, one JSON object on stdout.

    python evaluate.py --cfg-path lavis/projects/nano/pretrain_codebook.yaml \\
        --options model.load_finetuned=True model.finetuned=log/nano/Codebook/checkpoint_1.pth \\
        run.test_splits=[val]

Retrieval, reconstruction and contact sheets of an exported tokenizer: `seed eval tokenizer`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from train import parser, train

from seed_multimodal.entry import run_guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code (2: error, printed to stderr)."""
    args = parser(str(__doc__)).parse_args(argv)
    args.options = ["run.train_splits=[]", *args.options, "run.evaluate=True"]
    return run_guarded("evaluate.py", args.debug, lambda: train(args))


if __name__ == "__main__":
    sys.exit(main())
