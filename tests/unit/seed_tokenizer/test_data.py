"""Builders, processors and joined sets: what a YAML's section `datasets` becomes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from seed_multimodal.errors import ConfigError, DataError

PROCESSORS = {"vis_processor": {"train": {"name": "blip2_image_train", "image_size": 32}},
              "text_processor": {"train": {"name": "blip_caption", "max_words": 3}}}


def build(name: str, info: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The splits that LAVIS's task would build for this data set."""
    from omegaconf import OmegaConf
    from seed_lavis import register

    register()
    from seed_lavis.compat import registry

    run = OmegaConf.create({"seed": 3, "train_splits": ["train"], "test_splits": ["val"],
                            "output_dir": more.pop("to", None)})
    registry.register("configuration", SimpleNamespace(run_cfg=run,
                                                         model_cfg=SimpleNamespace(arch="blip2_casual")))
    builder = registry.get_builder_class(name)
    config = OmegaConf.merge(OmegaConf.load(builder.default_config_path()).datasets[name],
                             {**PROCESSORS, **more, "build_info": info})
    return builder(config).build_datasets()


def shard(path: Path, samples: list[tuple[str, dict[str, Any]]]) -> None:
    """A webdataset tar of small pictures with json."""
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(picture, "JPEG")
    with tarfile.open(path, "w") as tar:
        for key, item in samples:
            for suffix, data in (("jpg", picture.getvalue()), ("json", json.dumps(item).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_json_list(pictures):
    built = build("conceptual_caption_3m", {"annotations": {"train": {"storage": str(pictures / "pairs.json")}},
                                            "images": {"storage": str(pictures)}})
    assert list(built) == ["train"] and len(built["train"]) == 24
    sample, again, other = built["train"].get(5, 0), built["train"].get(5, 0), built["train"].get(5, 1)
    assert sample["image"].shape == (3, 32, 32) and len(sample["caption"].split()) <= 3
    assert torch.equal(sample["image"], again["image"]) and not torch.equal(sample["image"], other["image"])


@pytest.mark.process
def test_pictures_arrive_as_bytes_and_are_normalised_on_the_device(tmp_path):
    """Bit for bit what the workers normalised before; `scaled_decoding` is a key of the YAML."""
    shard(tmp_path / "0.tar", [(f"{n:03d}", {"caption": "one two"}) for n in range(4)])
    exact = {"vis_processor": {"train": {"name": "blip2_image_train", "image_size": 32, "scaled_decoding": False}}}
    data = build("unsplash", {"storage": str(tmp_path / "0.tar")}, to=str(tmp_path), **exact)["train"]
    from seed_lavis.datasets import to_device

    from seed_multimodal.data.stream.pair_dataset import PairDataset
    from seed_multimodal.data.stream.step_batches import StepBatches

    def before(picture: Image.Image, generator: torch.Generator) -> torch.Tensor:
        return data.image_transform(picture, generator)

    earlier = PairDataset(data.source, before, data.text_transform, seed=data.seed)
    with StepBatches(data, 4, seed=0, workers=1) as sent, StepBatches(earlier, 4, seed=0) as made:
        batch, wanted = sent.at(0), made.at(0)
    assert batch["image"].dtype == torch.uint8 and wanted["image"].dtype == torch.float32
    there = to_device(batch, torch.device("cpu"))
    assert there["image"].dtype == torch.float32 and torch.equal(there["image"], wanted["image"])
    assert there["caption"] == wanted["caption"] and batch["image"].dtype == torch.uint8


def test_shards_with_another_caption_key(tmp_path):
    for number in range(2):
        shard(tmp_path / f"{number:05d}.tar", [(f"{number}{i}", {"top_caption": "A Red FIELD, far away"})
                                               for i in range(3)])
    built = build("laion_coco", {"storage": str(tmp_path / "{00000..00001}.tar"), "cache": str(tmp_path / "copies")},
                  to=str(tmp_path / "run"))
    assert len(built["train"]) == 6 and built["train"].get(4)["caption"] == "a red field,"
    with pytest.raises(DataError, match=r"00000\.tar.*'caption'"):
        build("laion_coco", {"storage": str(tmp_path / "*.tar"), "caption_key": "caption"})["train"].get(0)


@pytest.mark.parametrize("item", [{"caption": None}, {"caption": ""}, {"title": "x"}, [1]])
def test_a_sample_without_a_caption_is_replaced_and_counted(tmp_path, item):
    shard(tmp_path / "a.tar", [("a", {"caption": "red"}), ("b", item), ("c", {"caption": "blue"})])
    data = build("unsplash", {"storage": str(tmp_path / "a.tar")})["train"]
    assert [data.get(index)["caption"] for index in range(3)] == ["red", "blue", "blue"]
    assert [key for key, _ in data.bad] == ["b"]


@pytest.mark.slow
def test_a_training_passes_samples_that_cannot_be_used(yaml, run, pictures, tmp_path, capsys):
    items = json.loads((pictures / "pairs.json").read_text())
    items[1]["caption"], items[5]["caption"], items[9]["image"], items[13] = None, " ", "gone.png", [1]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items) + '{"image": \n')
    info = "datasets.coco_caption.build_info"
    run(yaml("stage1", f"{info}.annotations.train.storage=[{tmp_path}/own.jsonl]"))  # more than two epochs
    told = [line for line in capsys.readouterr().out.splitlines() if "skipped: " in line]
    assert len(told) == 5, told
    for line, words in ((2, "is null"), (6, "is empty"), (10, "is not there"), (14, "holds a list"), (25, "not json")):
        assert any(f"own.jsonl: line {line}: " in one and words in one for one in told)


def test_tables_and_folders_of_pictures_are_sets_too(tmp_path, pictures):
    import pyarrow
    from pyarrow import parquet

    listed = json.loads((pictures / "pairs.json").read_text())
    rows = [{"image": {"bytes": (pictures / one["image"]).read_bytes(), "path": one["image"]}, "text": "a text"}
            for one in listed]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    for number, row in enumerate(rows):
        (tmp_path / "folder" / f"{number}.png").write_bytes(row["image"]["bytes"])
        (tmp_path / "folder" / f"{number}.txt").write_text("a text")
    for info in ({"storage": str(tmp_path / "a.parquet")}, {"storage": str(tmp_path / "folder")},
                 {"annotations": {"train": {"storage": str(tmp_path / "a.parquet")}}}):
        data = build("unsplash", info)["train"]
        assert len(data) == len(listed) == 24 and data.get(7)["caption"] == "a text" and not data.bad


def test_nano_has_a_split_to_evaluate_on():
    built = build("nano", {})
    assert set(built) == {"train", "val"} and len(built["train"]) > 10 * 8
    first = built["val"].get(0)
    assert first["image"].shape == (3, 32, 32) and torch.equal(first["image"], built["val"].get(0, 9)["image"])


@pytest.mark.parametrize("name, info, error, sentence", [
    ("unsplash", {"storage": "/nowhere/{000..003}.tar"}, DataError, "/nowhere"),
    ("unsplash", {"annotations": {"train": {"storage": None}}}, ConfigError, "train.storage names no files"),
    ("unsplash", {"storag": "x.tar"}, ConfigError, r"unknown key 'storag' \(did you mean 'storage'\?\)"),
    ("unsplash", {"images": 5}, ConfigError, "build_info.images must be a section of keys, not 5"),
    ("unsplash", {"annotations": {"train": "x.json"}}, ConfigError, "annotations.train must be a section of keys"),
    ("unsplash", {"storage": 5}, ConfigError, "storage must be a path, a pattern or a list of them, not 5"),
    ("nano", None, ConfigError, "datasets.nano.build_info must be a section of keys"),
    ("unsplash", {"format": "csv"}, ConfigError, "json, jsonl, parquet, folder, webdataset, nano"),
])
def test_what_cannot_be_read_is_one_sentence(name, info, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        build(name, info)
    assert "\n" not in str(caught.value)


def test_a_processor_that_is_missing_or_has_an_unknown_key():
    with pytest.raises(ConfigError, match="vis_processor.train is not given"):
        build("nano", {}, vis_processor={"train": None})
    with pytest.raises(ConfigError, match="did you mean 'image_size'"):
        build("nano", {}, vis_processor={"train": {"name": "blip2_image_train", "img_size": 64}})


@pytest.mark.process
def test_joined_sets_keep_samples_and_count_bad_ones_once(tmp_path, pictures):
    from seed_lavis.datasets import JoinedPairs, split_of

    from seed_multimodal.data.stream.step_batches import StepBatches

    shard(tmp_path / "a.tar", [(f"s{i}", {"caption": "red"}) for i in range(5)])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    listed = [{"image": str(tmp_path / "broken.png"), "caption": "broken"},
              *({**item, "image": str(pictures / item["image"])}
                for item in json.loads((pictures / "pairs.json").read_text()))]
    (tmp_path / "pairs.json").write_text(json.dumps(listed))
    sets = {"unsplash": build("unsplash", {"storage": str(tmp_path / "a.tar")}),
            "cc3m": build("conceptual_caption_3m", {"annotations": {"train": {"storage": str(tmp_path / "pairs.json")}},
                                           "images": {"storage": None}})}
    joined = split_of(sets, ["train"])
    assert isinstance(joined, JoinedPairs) and len(joined) == 5 + 25 and joined.shard_sizes.tolist() == [5, 25]
    assert joined.get(4)["caption"] == "red" and joined.get(6)["key"] == sets["cc3m"]["train"].get(1)["key"]
    for workers in (0, 1):
        joined.bad.clear()
        joined._known.clear()
        with StepBatches(joined, 10, seed=0, workers=workers) as batches:
            keys = [key for step in range(6) for key in batches.at(step)["key"]]  # two epochs
        assert len(keys) == 60 and len(batches.bad_samples()) == 1 and batches.bad_samples()[0][0] == "item 0"
    with pytest.raises(ConfigError, match="has a split 'test'"):
        split_of(sets, ["test"])
