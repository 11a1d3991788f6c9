"""Several data sets as one, their sampling ratios, and the batches of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from seed_multimodal.data.stream.order import MixedOrder
from seed_multimodal.data.stream.pair_dataset import JoinedPairs, PairDataset
from seed_multimodal.data.stream.skip_budget import BadSamples
from seed_multimodal.data.stream.step_batches import block_of
from seed_multimodal.device import copy_to
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import normalise
from seed_multimodal.settings import check_keys


def split_of(datasets: Mapping[str, Mapping[str, PairDataset]], names: Sequence[str]) -> PairDataset | JoinedPairs:
    """The splits `names` of all data sets, joined.

    Raises:
        ConfigError: no data set has such a split, or one of several sets cannot be joined with others.
    """
    found = {(owner, name): splits[name] for owner, splits in datasets.items() for name in names if name in splits}
    if not found:
        wanted = " or ".join(map(repr, names)) or "(none named)"
        raise ConfigError(f"No data set of the configuration has a split {wanted}.")
    if len(found) == 1:
        return next(iter(found.values()))
    for owner, name in found:
        if not isinstance(found[owner, name], BadSamples):
            raise ConfigError(f"datasets.{owner} gives samples of another form than pairs: it cannot be joined with "
                              f"{' and '.join(sorted({other for other, _ in found} - {owner})) or 'other splits'}.")
    return JoinedPairs(list(found.values()))


def dataset_ratios(sections: Mapping[str, Any], ratios: Mapping[str, float] | None) -> dict[str, float] | None:
    """Weight of each data set: `run.train_dataset_ratios`, or the `sample_ratio` of the sections `datasets` (1.0 where
    only others have one); None if neither is given.

    Raises:
        ConfigError: an unknown or missing name, both ways at once, or a weight that is not a positive number.
    """
    own = {name: section["sample_ratio"] for name, section in sections.items()
           if section and section.get("sample_ratio") is not None}
    if not ratios and not own:
        return None
    if ratios and own:
        raise ConfigError(f"run.train_dataset_ratios and datasets.{next(iter(own))}.sample_ratio say the same thing: "
                          "give one of them.")
    if ratios:
        check_keys(map(str, ratios), list(map(str, sections)), "run.train_dataset_ratios")
        missing = [name for name in sections if name not in ratios]
        if missing:
            raise ConfigError(f"run.train_dataset_ratios has no weight for {missing[0]!r}; give every data set one, or "
                              "remove the data set.")
    weights = {name: (ratios or own).get(name, 1.0) for name in sections}
    for name, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < float("inf"):
            key = f"run.train_dataset_ratios.{name}" if ratios else f"datasets.{name}.sample_ratio"
            raise ConfigError(f"{key} must be a positive number, not {weight!r}.")
    return {name: float(weight) for name, weight in weights.items()}


def mixed_order(datasets: Mapping[str, Mapping[str, PairDataset]], names: Sequence[str],
                ratios: Mapping[str, float] | None, seed: int) -> MixedOrder | None:
    """The order in which `split_of(datasets, names)` is drawn with `ratios`; None without them or for a single set.

    A data set's weight is shared by its splits in proportion to their sizes.
    """
    found = [(owner, splits[name]) for owner, splits in datasets.items() for name in names if name in splits]
    if ratios is None or len(found) < 2:
        return None
    whole = {owner: sum(len(part) for other, part in found if other == owner) for owner, _ in found}
    return MixedOrder([len(part) for _, part in found],
                      [ratios[owner] * len(part) / whole[owner] for owner, part in found], seed,
                      sizes=[part.shard_sizes for _, part in found],
                      block=min(block_of(part) for _, part in found))


def count_bad(own: Sequence[tuple[str, str]]) -> int:
    """How many different samples were bad for any process, of (key, reason) of each; all processes must call it."""
    if not dist.is_initialized():
        return len(set(own))
    lists: list[list[tuple[str, str]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, list(own))
    return len({item for some in lists for item in some})


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`, pictures (uint8 from the data workers) normalised there; texts stay as
    they are."""
    there = {key: copy_to(device, value) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    image = there.get("image")
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
        there["image"] = normalise(image)
    return there
