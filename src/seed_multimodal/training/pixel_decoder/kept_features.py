"""Filling the cache of frozen features before a training, so that the frozen models need no memory during it.

Only what the run will draw is made, each process its share; what is kept already costs a look at the picture. The run's
folder remembers that everything is there, so that a resume does not look again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from seed_multimodal.data.stream.drawn_pairs import by_size
from seed_multimodal.data.stream.order import ChosenOrder, drawn_indices
from seed_multimodal.data.stream.step_batches import StepBatches
from seed_multimodal.disk import read_json_object, replace_text, writing
from seed_multimodal.errors import CheckpointError, SeedError
from seed_multimodal.progress import Progress
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.pixel_decoder.features import PictureFeatures

RECORD = "features.json"


def keep_features(features: PictureFeatures, batches: StepBatches, draws: int, group: ProcessGroup, *, folder: Path,
                  batch_size: int, workers: int, about: Mapping[str, Any], log: Callable[[str], None]) -> None:
    """Make the features of the first `draws` samples of a run's order, and let go of both models. All processes do.

    Args:
        folder: of the run, with the record. about: what the pictures and their views follow from.

    Raises:
        SeedError: a disk that is full, or pictures that cannot be used; in every process.
    """
    features.record = folder / RECORD
    record = {"folders": [str(place) for place in features.folders], "draws": draws, "pictures": dict(about)}
    if not group.agree(not _is_kept(folder / RECORD, features, record))[0]:
        features.release()
        return
    wanted = drawn_indices(batches.order, draws, len(batches.dataset))
    share = wanted[group.rank::group.world]
    log(f"features of {len(wanted):,} pictures are made first, and kept in {features.folders[0].parent}")
    problem: SeedError | None = None
    try:
        with StepBatches(batches.dataset, batch_size, seed=0, workers=workers, order=ChosenOrder(share),
                         collate=by_size) as once, (
                Progress("features", len(share), "picture", log=log if group.first else None)) as bar:
            for start in range(0, len(share), batch_size):
                for batch in once.at(start // batch_size):
                    features.keep(batch)
                bar.update(min(batch_size, len(share) - start))
    except SeedError as error:
        problem = error
    if group.agree(problem is not None)[0]:
        raise problem or CheckpointError("Another process could not make the features of its pictures.")
    if group.first:
        with writing(folder / RECORD):
            replace_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    features.release()


def _is_kept(file: Path, features: PictureFeatures, record: Mapping[str, Any]) -> bool:
    """Whether an earlier start of this run has made them all, and they are still there."""
    return file.is_file() and all(folder.is_dir() for folder in features.folders) and read_json_object(
        file) == json.loads(json.dumps(record))
