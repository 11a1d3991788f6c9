"""Train nano-x, a tiny SEED-X: `python -m seed_nano.train_x --config configs/nano_x/pico.yaml`.

The de-tokenizer's two stages and the instruction tuning run through SEED-X's own trainings, between `recipes` and
`agent`; scripts/nano_x_speedrun.sh does it all. At the end `--out` is a folder that `SeedX.from_pretrained` loads.
"""

from __future__ import annotations

from seed_nano.train.__main__ import Line, main, trained
from seed_nano.train_x.config import NanoXConfig
from seed_nano.train_x.layout import LayoutTask
from seed_nano.train_x.recipes import assemble, install_agent, recipes
from seed_nano.train_x.tower import TowerTask, take_over
from seed_nano.train_x.workspace import XWorkspace

LINE = Line(
    "nano_x", str(__doc__), NanoXConfig, XWorkspace,
    {"start": take_over, "tower": trained(TowerTask), "layout": trained(LayoutTask), "recipes": recipes,
     "agent": install_agent, "assemble": assemble},
    {"layout": (("layout", ("tower",)),), "recipes": (("first", ("tower",)), ("second", ("first",)),
                                                      ("sft", ("tower",)))})

if __name__ == "__main__":
    raise SystemExit(main(line=LINE))
