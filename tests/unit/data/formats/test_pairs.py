"""Image-caption pairs: their samples, what names an unusable source, and filters."""

from __future__ import annotations

import json

import pytest
from data_files import jpeg

from seed_multimodal.data.formats.pairs import open_pairs, shape_problem
from seed_multimodal.errors import ConfigError


def test_open_pairs_of_lists(tmp_path):
    # Of other names, with images below `image_root`; texts that are cut in an emoji are used.
    (tmp_path / "images").mkdir()
    image = tmp_path / "images/0.jpg"
    image.write_bytes(jpeg(0))
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, path in zip(files, ("0.jpg", str(image)), strict=True):
        file.write_text(json.dumps([{"photo": path, "title": [file.name, "cut \ud83d"]}]))
    keys = {"image_key": "photo", "caption_key": "title", "image_root": str(image.parent)}
    pairs = open_pairs({"files": list(map(str, files)), "format": "json", **keys})
    for index, file in enumerate(files):
        pair = pairs.read(index)
        assert (pair.image, pair.captions) == (image, [file.name, "cut ?"])
        assert pair.location == f"{file}: item 0"
    for wrong, named in (({"format": "tarr", "files": "x"}, "tarr"), ({"file": "x"}, "'files'")):
        with pytest.raises(ConfigError, match=named):
            open_pairs(wrong)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((180, 180), ""),
        ((179, 200), "resolution"),
        ((1000, 666), ""),
        ((665, 1000), "aspect ratio"),
    ],
)
def test_shape_problem(size, reason):
    # At the thresholds, as in the original.
    assert shape_problem(size, 180, 0.666) == reason
    assert not shape_problem((2, 90), None, None)
