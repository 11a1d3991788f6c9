"""What the parity tests call of the library: the only file here that changes when an interface does.

The batches come from the data interfaces, the losses from what a run of each application or command leaves in its log.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import seed_multimodal  # noqa: F401  before transformers: it sets HF_HUB_OFFLINE

ROOT = Path(__file__).resolve().parents[3]
WORDS = Path(__file__).with_name("words")  # the tokenizer of the records: what is shipped may change


@contextmanager
def pair_batches(spec: Any, seed: int, batch_size: int, world: int, workers: int = 0) -> Iterator[list[Any]]:
    """One object per rank; `.at(step)` gives a dictionary with `image`, `caption`, `key` and `index`.

    `spec` is a pair source, or its description as the YAML files have it.
    """
    from seed_multimodal.data.formats.pairs import open_pairs
    from seed_multimodal.data.stream.pair_dataset import PairDataset
    from seed_multimodal.data.stream.step_batches import StepBatches
    from seed_multimodal.images.augment import TrainTransform
    from seed_multimodal.images.transforms import normalise
    from seed_multimodal.language.words import BlipCaption

    class OnDevice(StepBatches):
        """Pictures arrive as bytes and are normalised where they are used."""

        def at(self, step: int) -> Any:
            batch = super().at(step)
            return {**batch, "image": normalise(batch["image"])}

    transform = TrainTransform(16, scaled_decoding=False)  # the recorded views are of pictures decoded in full
    with ExitStack() as stack:
        source = open_pairs(spec) if isinstance(spec, dict) else spec
        yield [stack.enter_context(OnDevice(
            PairDataset(source, transform, BlipCaption(), seed=seed, log=None), batch_size, seed=seed,
            rank=rank, world=world, workers=workers)) for rank in range(world)]


def pair(key: str, captions: list[str], image: bytes) -> Any:
    """A stored pair."""
    from seed_multimodal.data.formats.pairs import Pair

    return Pair(key, key, image, captions)


@contextmanager
def llm_batches(config: dict[str, Any], world: int, workers: int = 0) -> Iterator[list[Any]]:
    """One object per rank; `.at(step)` gives an object with `input_ids`, `labels`, `position_ids`, `attention_mask`."""
    from seed_multimodal.data.stream.data_settings import read_data_settings
    from seed_multimodal.data.stream.llm_batches import LlmBatches
    from seed_multimodal.language.tokenizer import MultimodalTokenizer

    words = MultimodalTokenizer.from_pretrained(WORDS)
    with ExitStack() as stack:
        yield [stack.enter_context(LlmBatches(read_data_settings(config), words, rank=rank, world=world,
                                              workers=workers)) for rank in range(world)]


def train_language_model(arguments: Sequence[str]) -> None:
    """MultiModalLLM's `train.py` with these arguments, in this process."""
    from seed_multimodal.training.llm.app import run

    run(list(arguments), ROOT / "MultiModalLLM" / "configs")


def train_tokenizer(arguments: Sequence[str]) -> None:
    """SEED_Tokenizer's `train.py` with these arguments, in this process."""
    place = str(ROOT / "SEED_Tokenizer")
    if place not in sys.path:
        sys.path.append(place)
    import train

    runner = train.build(train.parser("").parse_args(list(arguments)))
    runner.train()


def leave_process_group() -> None:
    """Forget what a launcher around this process told."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
