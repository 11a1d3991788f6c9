"""Losses (and codebook usage) of a trained stage on held-out splits, one JSON object on stdout.

    python evaluate.py --cfg-path lavis/projects/nano/pretrain_codebook.yaml \\
        --options model.load_finetuned=True model.finetuned=log/nano/Codebook/checkpoint_1.pth \\
        run.test_splits=[val]

Retrieval, reconstruction and contact sheets of an exported tokenizer: `seed eval tokenizer`.
"""

from __future__ import annotations

import sys

import train


def main(argv: list[str] | None = None) -> int:
    """As `train.main`."""
    options = ["run.train_splits=[]", "run.evaluate=True"]
    return train.main(argv, "evaluate.py", str(__doc__), options)


if __name__ == "__main__":
    sys.exit(main())
