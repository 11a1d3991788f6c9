"""`import lavis` in this folder: the parts of salesforce-lavis that work with today's transformers.

`registry`, `BaseModel`, builders, processors, tasks and runners can be imported; LAVIS's other
models need the transformers of 2023 (`pip install salesforce-lavis` in a separate environment).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))  # runs from a checkout

import seed_lavis.compat  # noqa: E402, F401  (puts the installed package in the place of this one)
