"""Preprocessing of images.

* `preprocessing`: every transform (within 2e-2, about 1.5 grey levels), captions, the filter, the
training transform,
  errors for unknown types. Not compared: `preprocess_decode` and `id_extraction` (part of
  pre-tokenising); `image_tokenizer` (the original class samples fixed latents when built); that the
  original "clip" module rejects "blip" and vice versa (here one `get_transform` has both).
* `seedx_anyres`: SEED-X's any-resolution input: both rules and their grid, views and their
positions, the plain
  transform. Not compared: `transform.clipa`, `.clipb` and `.sd` (constants of other encoders, in no
  original
  configuration: `get_transform` rejects these names), `resize_pad_True` (black borders, off in all
  of them).
"""

import re

import pytest
import torch
from PIL import Image
from runner import assert_close, assert_same

from seed_multimodal.data.formats.pairs import shape_problem, similarity_problem
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.augment import RATIO, TrainTransform
from seed_multimodal.images.transforms import (
    TYPES,
    get_transform,
    normalise,
    resize_passes,
    seed_image_processor,
    to_bytes,
)
from seed_multimodal.images.views import (
    AnyResolution,
    best_resolution_grid,
    choose_grid,
    nearest_ratio_grid,
    patch_positions,
    read_grids,
)
from seed_multimodal.models.seed.captions import caption_text, question_text

PIXEL_TOLERANCE = 2e-2
LEVELS = 2  # of 8-bit pixels: the same tolerance
CAPTION_PROMPT = "a photo of "  # the prompt of every `…_prompt_…` column
THRESHOLDS = {
    "similarity_thr": 0.2,
    "min_resolution": 180,
    "min_aspect_ratio": 0.666,
}  # the original defaults


def check_transform(kind: str, keep_ratio: bool, image, want: torch.Tensor):
    if kind not in TYPES:  # of encoders that no configuration has
        with pytest.raises(ConfigError, match=kind):
            get_transform(kind)
        return
    transform = get_transform(kind, keep_ratio=keep_ratio, image_size=want.shape[-1])
    assert_close(
        transform(image), want, PIXEL_TOLERANCE, what=f"transform {kind}, keep_ratio {keep_ratio}"
    )


def check_preprocessing(recording):
    tensors = recording.tensors("tensors")
    cases = recording.cases
    images = {
        key.removesuffix(".pixels"): value
        for key, value in tensors.items()
        if key.endswith(".pixels")
    }

    # 1. Each image by each transform.
    for key, want in tensors.items():
        name, _, kind = key.rpartition(".")
        if kind == "pixels":
            continue
        image = Image.fromarray(images[name].numpy())
        if match := re.fullmatch(r"seed_(clip|blip)_(keep_ratio|squash)", kind):
            check_transform(match[1], match[2] == "keep_ratio", image, want)
        else:
            # SEED's and LaVIT's tokenizers have one rule.
            assert_close(
                seed_image_processor(want.shape[-1])(image), want, PIXEL_TOLERANCE, what=key
            )

    # 2. Captions, the filter, the training transform, unknown names.
    for case in cases.get("captions", []):
        for column in case.keys() - {"text"}:
            check_caption(column, case)
    for case in cases.get("filter_like_qwen", []):
        assert_same(kept_by_filter(**case), case["keep"], f"filter on {case}")
    if "stage_training_image_transform" in cases:
        # Sizes of its crops; flips, tensors and normalising have no settings.
        transform = TrainTransform()
        scale = f"({transform.min_scale:.7g}, {transform.max_scale:.1f})"
        ratio = f"({RATIO[0]:.7g}, {RATIO[1]:.7g})"
        crop = f"RandomResizedCrop scale={scale} ratio={ratio}"
        assert_same(crop, cases["stage_training_image_transform"][0], "training transform")
    for name in cases.get("transform_type_errors", {}):
        if (kind := name.rsplit(".", 1)[-1]) not in TYPES:
            check_transform(kind, False, Image.new("RGB", (8, 8)), torch.zeros(8))


def kept_by_filter(item: dict, metadata, kwargs: dict[str, float] | None = None, **_) -> bool:
    """The rule on a decoded item, or on metadata if the item has no size (as in the original)."""
    limits = {**THRESHOLDS, **(kwargs or {})}
    sizes = {key.lower().removeprefix("original_"): value for key, value in metadata.items()} | item
    size = sizes.get("resolution")
    if {"width", "height"} <= sizes.keys():
        size = sizes["width"], sizes["height"]
    problem = similarity_problem(metadata, limits["similarity_thr"])
    if size is not None:
        problem += shape_problem(size, limits["min_resolution"], limits["min_aspect_ratio"])
    has_fields = {"pixel_values", "text"} <= item.keys()
    return has_fields and item.get("filter_flag", True) and not problem


def check_caption(column: str, case: dict[str, str]):
    match = re.search(r"_(\d+)_words", column)
    limit = int(match[1]) if match else 50
    if column.startswith("blip_caption"):
        prompt = CAPTION_PROMPT if "_prompt" in column else ""
        actual = caption_text(case["text"], prompt=prompt, max_words=limit)
    else:
        actual = question_text(case["text"], max_words=limit)
    assert_same(actual, case[column], f"{column} of {case['text']!r}")


def check_grid(case, lists: dict[str, list[str]]):
    grids = read_grids(lists[case["grids"]])
    size = tuple(case["size"])
    base = case["base"]
    what = f"grid of {size}, {case['grids']}, {base}"
    for rule, column in (
        (best_resolution_grid, "select_best_resolution"),
        (nearest_ratio_grid, "select_best_resolution_v2"),
    ):
        columns, rows = rule(size, grids, base)
        assert_same([columns * base, rows * base], case[column], f"{column}: {what}")
    assert_same(list(choose_grid(size, grids, base)), case["grid_shape"], what)


def check_views(case, grids: list[str], tensors: dict[str, torch.Tensor]):
    name = case["image"]
    rule = AnyResolution(image_size=case["base"], grids=tuple(grids))
    image = Image.fromarray(tensors[f"{name}.pixels"].numpy())
    views = normalise(rule.cut(image))
    positions = patch_positions(rule.grid(image.size))
    assert_same(
        (list(image.size), len(views)),
        (case["size"], case["num"]),
        f"{name}: size, number of views",
    )
    tensors.close(f"{name}.patches", views, (PIXEL_TOLERANCE, 0))
    tensors.close(f"{name}.patch_position", positions, (1e-6, 0))
    if f"{name}.resize_pad_False" in tensors:
        want = tensors[f"{name}.resize_pad_False"].permute(2, 0, 1)
        squashed = to_bytes(
            resize_passes(image, (want.shape[2], want.shape[1]), Image.Resampling.BICUBIC)
        )
        assert_close(squashed, want, LEVELS, what=f"{name}.resize_pad_False")


def check_anyres(recording):
    cases = recording.cases
    tensors = recording.tensors("tensors")
    for case in cases["grid_selection"]:
        check_grid(case, cases["grids"])
    for case in cases["patches"]:
        check_views(case, cases["grids"][case.get("grids", "released")], tensors)
    for name in (name for name in tensors if name.startswith("transform.")):
        _, kind, keep_ratio = name.split(".")
        image = Image.fromarray(tensors["transform_input"].numpy())
        check_transform(kind, keep_ratio == "True", image, tensors[name])


KINDS = {"preprocessing": check_preprocessing, "seedx_anyres": check_anyres}
