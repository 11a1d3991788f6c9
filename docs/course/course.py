"""What the sheets of the course share: the names of microseed.py, with the weights of a run."""

import contextlib
import io
import runpy
import sys
from types import SimpleNamespace

import torch


def load(folder, *settings):
    """The names of microseed.py (`tokenizer`, `lm`, `images`, `draw` …) as attributes.

    folder: what the run wrote, such as "outputs/course/whole".
    settings: those of the run that change its networks, such as "causal_queries=0".
    """
    # 1. A run without a step defines everything.
    nothing = ["tokenizer_steps=0", "lm_steps=0", "eval_scenes=1", "out=outputs/course/untrained"]
    sys.argv = ["microseed.py", *nothing, *settings]
    with contextlib.redirect_stdout(io.StringIO()):
        names = runpy.run_path("microseed.py")

    # 2. The weights of the run, and the codes of all scenes by them.
    weights = torch.load(f"{folder}/weights.pt", weights_only=True)
    for model in ("tokenizer", "lm"):
        names[model].load_state_dict(weights[model])
        names[model].requires_grad_(False)
    names["codes"] = names["tokenizer"].encode(names["images"])
    return SimpleNamespace(**names)
