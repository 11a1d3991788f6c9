"""Train nano-lavit, a tiny LaVIT:
`python -m seed_nano.train_lavit --config configs/nano_lavit/pico.yaml`.

The pixel decoder and the language model are trained by LaVIT's own trainings, between `recipes` and `llm`;
scripts/nano_lavit_speedrun.sh does it all. At the end `--out` is a folder that `Lavit.from_pretrained` loads.
"""

from __future__ import annotations

from seed_nano.train.__main__ import Line, main, trained
from seed_nano.train_lavit.config import NanoLavitConfig
from seed_nano.train_lavit.layout import LayoutTask
from seed_nano.train_lavit.reader import ReaderTask
from seed_nano.train_lavit.recipes import assemble, install_llm, recipes
from seed_nano.train_lavit.tokenizer import NarrowTask, TokenizerTask
from seed_nano.train_lavit.workspace import LavitSpace

LINE = Line(
    "nano_lavit", str(__doc__), NanoLavitConfig, LavitSpace,
    {"reader": trained(ReaderTask), "tokenizer": trained(TokenizerTask), "narrow": trained(NarrowTask),
     "layout": trained(LayoutTask), "recipes": recipes, "llm": install_llm, "assemble": assemble},
    {"tokenizer": (("tokenizer", ("reader",)),), "narrow": (("narrow", ("tokenizer",)),),
     "layout": (("layout", ("narrow",)),),
     "recipes": (("pixels", ("narrow", "layout")), ("language", ("narrow",)))})

if __name__ == "__main__":
    raise SystemExit(main(line=LINE))
