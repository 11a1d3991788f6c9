"""What a system was trained on: which images look like it, and which words it knows.

Two files that `system.json` may name:

    domain         a small head on one layer of the vision encoder, which scores images unlike the training's above
                   `domain_threshold`
    known_words    {"about": "150 things", "names": ["dog", "dogs", "fire truck", …], "words": ["a", "draw", …],
                    "examples": {"animal": ["cat", "dog", "horse"], …}}
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.settings import read_settings
from seed_multimodal.weights import load_state_dict

# A word in any alphabet, not the end of `2nd`; a number; or an emoji.
_WORD = re.compile(r"(?<!\w)[^\W\d]+(?:'[^\W\d]+)*|(?<![\w.])\d+(?!\w|\.\d)|[\u2600-\u27bf\U0001f000-\U0001faff]")


class DomainHead(nn.Module):
    """Tokens of a layer [B, T, W] → scores [B], high for images unlike those of the training."""

    def __init__(self, tokens: int, width: int, projected: int = 8, hidden: int = 32) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.project = nn.Linear(width, projected)
        self.hidden = nn.Linear(tokens * projected, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, tokens_BTW: Tensor) -> Tensor:
        """Scores, see the class."""
        projected = F.gelu(self.project((tokens_BTW - self.mean) / self.scale))
        return torch.as_tensor(self.score(F.gelu(self.hidden(projected.flatten(1))))[:, 0])


@dataclass(frozen=True)
class Domain:
    """A head with the `name` of what was learned, and the vision encoder's `layer` whose tokens it reads."""

    name: str
    layer: str
    head: DomainHead
    threshold: float

    def note(self, tokens_BTW: Tensor) -> str:
        """One sentence where images are unlike those of the training, or nothing."""
        with torch.inference_mode():
            unlike = (self.head(tokens_BTW) > self.threshold).nonzero()[:, 0].tolist()
        if not unlike:
            return ""
        which = "This" if len(tokens_BTW) == 1 else f"Picture {', '.join(str(index + 1) for index in unlike)}"
        return f"{which} does not look like {self.name}; for photographs use the original weights."


def load_domain(file: Path | None, threshold: float) -> Domain | None:
    """The domain in a file, if one is named; `CheckpointError` for a missing or another file."""
    if file is None:
        return None
    state = {name: value.float() for name, value in load_state_dict(file).items()}
    try:
        with safe_open(file, framework="pt") as handle:
            about = handle.metadata()
        (projected, width), (hidden, tokens) = state["project.weight"].shape, state["hidden.weight"].shape
        head = DomainHead(tokens // projected, width, projected, hidden)
        head.load_state_dict(state)
        return Domain(about["name"], about["layer"], head.requires_grad_(False), threshold)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{file}: holds no domain of a system; `domain` of system.json may be null.") from error


@dataclass(frozen=True)
class KnownWords:
    """A file of known words; `examples`: names for words that mean several of them."""

    about: str
    names: tuple[str, ...]
    words: tuple[str, ...]
    examples: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def unknown(self, text: str) -> list[str]:
        """Unknown words of a text in order, each once, in lower case; a part of a name (`fire`) is unknown, too."""
        plain = re.sub(r"'s\b|(?<=[dest])n't\b", "", text.lower().replace("\u2019", "'").replace("_", " "))
        longest = "|".join(sorted(map(re.escape, self.names), key=len, reverse=True))
        words = dict.fromkeys(_WORD.findall(re.sub(rf"(?<!\w)(?:{longest})(?!\w)", " ", plain)))
        return [word for word in words if word not in self.words
                and (len(word) > 1 or not word.isascii() or word.isdigit())]

    def note(self, text: str) -> str:
        """One sentence about unknown words, with names for the first that means several; or nothing."""
        unknown = [word if len(word) <= 40 else f"{word[:40]}…" for word in self.unknown(text)]
        if not unknown:
            return ""
        examples = next((self.examples[one] for word in unknown for one in (word, word.removesuffix("s"))
                         if one in self.examples), ())
        return (f"This system does not know {', '.join(map(repr, unknown[:3]))}: it learned {self.about}"
                f"{', such as ' + ', '.join(examples) if examples else ''}.")


@lru_cache(maxsize=8)
def read_known_words(file: Path) -> KnownWords:
    """A file of known words; raises `ConfigError` for a file that is missing or holds something else."""
    return read_settings(KnownWords, read_json_object(file, ConfigError), str(file))
