"""Several data sets drawn in given ratios, by a run: what is drawn, going on, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

PICTURE = "vis_processor: {train: {name: blip2_image_train, image_size: 64}}"
TEXT = "text_processor: {train: {name: blip_caption}}"


@pytest.fixture
def second(pictures, tmp_path):
    """The option for a second data set of four pictures, `unsplash`."""
    items = json.loads((pictures / "pairs.json").read_text())[:4]
    (tmp_path / "four.json").write_text(json.dumps(items))
    info = f"{{annotations: {{train: {{storage: [{tmp_path}/four.json]}}}}, images: {{storage: {pictures}}}}}"
    return f"datasets.unsplash={{data_type: images, {PICTURE}, {TEXT}, build_info: {info}}}"


RATIOS = "run.train_dataset_ratios={coco_caption: 1, unsplash: 3}"


def drawn(runner, steps: int = 8) -> np.ndarray:
    """Samples of the first and of the second set in the first steps."""
    parts = [runner.batches.parts(step) for step in range(steps)]
    indices = np.concatenate([some for part in parts for _, some in part])
    return np.array([(indices < 24).sum(), (indices >= 24).sum()])


@pytest.mark.process
def test_a_run_draws_in_the_ratios_and_goes_on(yaml, run, second, losses, tmp_path):
    whole = run(yaml("stage1", second, RATIOS, name="whole"))
    assert drawn(whole).tolist() == [16, 48]
    run(yaml("stage1", second, RATIOS, "run.max_epoch=1", name="parts"))  # the first epoch has the same rates
    run(yaml("stage1", second, RATIOS, "run.num_workers=1", name="parts"))
    parts = losses(tmp_path / "parts", "stage1")
    assert list(parts) == list(range(1, 9)) and parts == losses(tmp_path / "whole", "stage1")


def test_a_data_set_can_have_its_ratio_and_all_are_drawn_evenly_without(yaml, run, second, tmp_path):
    own = run(yaml("stage1", second, "datasets.unsplash.sample_ratio=7", "run.max_epoch=1", name="own"))
    assert drawn(own).tolist() == [8, 56]
    plain = run(yaml("stage1", second, "run.max_epoch=1", name="plain"))
    indices = np.concatenate([some for step in range(7) for _, some in plain.batches.parts(step)])
    assert sorted(indices[:28]) == list(range(28))  # every picture once


@pytest.mark.parametrize(("options", "sentence"), [
    (["run.train_dataset_ratios={coco_caption: 1}"], "has no weight for 'unsplash'"),
    (["run.train_dataset_ratios={coco_caption: 1, unsplsh: 1}"], "did you mean 'unsplash'"),
    (["run.train_dataset_ratios={coco_caption: 1, unsplash: -1}"], "ratios.unsplash must be a positive number"),
    (["datasets.unsplash.sample_ratio=0"], "datasets.unsplash.sample_ratio must be a positive number"),
    (["datasets.unsplash.sample_ratio=often"], "datasets.unsplash.sample_ratio must be a positive number"),
    (["datasets.unsplash.sampel_ratio=2"], "did you mean 'sample_ratio'")])
def test_what_makes_no_sense_is_one_sentence(yaml, second, options, sentence, capsys):
    import train

    assert train.main(yaml("stage1", second, *options)) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_sets_of_another_make_are_not_joined():
    from seed_lavis import register

    register()
    from seed_lavis.datasets import split_of

    from seed_multimodal.data.stream.pair_dataset import PairDataset
    from seed_multimodal.errors import ConfigError

    pairs = PairDataset(range(3), lambda picture: picture)
    with pytest.raises(ConfigError, match="datasets.own gives samples of another form.*joined with nano"):
        split_of({"nano": {"train": pairs}, "own": {"train": ["no", "pairs"]}}, ["train"])
