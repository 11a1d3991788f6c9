"""Which compositions are held out of training, by hash; the scenes of a split's stream; the lists
for evaluation.

`val`: the very scene. `pairs`: two things together. `places`: a thing on a background. `counts`: a
thing in a number. `styles`: a thing in a style (known in the two others). `things`: things that are
only ever reconstructed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import DataError
from seed_multimodal.settings import nearest
from seed_nano.world.scene import LAYOUTS, Scene, find_drawings
from seed_nano.world.things import BACKGROUNDS, HELD_OUT, NAMES, STYLES

Allowed = Callable[[Scene], bool]
SPLITS = ("train", "val", "pairs", "places", "counts", "styles", "things")
HELD_OUT_SPLITS = SPLITS[1:]
SHARES = {"val": 0.05, "pairs": 0.15, "places": 0.10, "counts": 0.15, "styles": 0.06}
WEIGHTS = dict(zip(LAYOUTS, (3, 1.5, 1.5, 1.5, 5, 4, 4, 3), strict=True))
"""How often each layout is drawn."""


def check_name(label: str, name: str, names: Sequence[str]) -> None:
    """Raise DataError for a name that is none of these; the nearest is named."""
    if name not in names:
        raise DataError(
            f"nano: unknown {label} {name!r}{nearest(str(name), names)}; "
            f"there are {', '.join(names)}."
        )


def check_split(split: str) -> None:
    """Raise DataError for an unknown split."""
    check_name("split", split, SPLITS)


def hash_share(*parts: object) -> float:
    """A number in 0..1 that depends on the parts only."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _style_held(thing: str) -> str:
    """The one style in which `thing` is held out, or nothing: so the two others are always
    known."""
    share = hash_share("styles", thing) / (len(STYLES) * SHARES["styles"])
    return STYLES[int(share * len(STYLES))] if share < 1 else ""


def held_out_compositions(
    things: Sequence[str], counts: Sequence[int], style: str | None, background: str | None
) -> set[str]:
    """Every held-out composition among labels, of which a caption may leave out the style and the
    background."""
    splits = set()
    # Each composition is held out by the hash of its parts, independent of all others.
    if not set(HELD_OUT).isdisjoint(things):
        splits.add("things")
    if len(things) == 2 and hash_share("pairs", *sorted(things)) < SHARES["pairs"]:
        splits.add("pairs")
    if background and any(
        hash_share("places", thing, background) < SHARES["places"] for thing in things
    ):
        splits.add("places")
    if any(
        count > 1 and hash_share("counts", thing, count) < SHARES["counts"]
        for thing, count in zip(things, counts, strict=True)
    ):
        splits.add("counts")
    if style and any(_style_held(thing) == style for thing in things):
        splits.add("styles")
    return splits


def held_out(scene: Scene) -> frozenset[str]:
    """Every held-out composition that the scene shows (empty: it may be trained on)."""
    splits = held_out_compositions(scene.things, scene.counts, scene.style, scene.background)
    if not splits and hash_share("val", *scene.key) < SHARES["val"]:
        splits.add("val")
    return frozenset(splits)


def trainable(scene: Scene) -> bool:
    """Whether a scene may be trained on."""
    return not held_out(scene)


def split_of(scene: Scene) -> str | None:
    """The split of a scene; None when it shows held-out compositions of several kinds, which no
    split uses."""
    splits = held_out(scene)
    return next(iter(splits or {"train"})) if len(splits) < 2 else None


def draw_scene(rng: random.Random, names: Sequence[str] = NAMES) -> Scene:
    """Any scene, held out or not."""
    layout = rng.choices(LAYOUTS, [WEIGHTS[name] for name in LAYOUTS])[0]
    kinds = 2 if layout in ("left of", "above", "two kinds") else 1
    counts = {
        "many": (rng.choice((2, 3, 4)),),
        "two kinds": rng.choice(((2, 1), (1, 2), (2, 2))),
    }.get(layout, ())
    return Scene(
        rng.choice(STYLES),
        rng.choice(BACKGROUNDS),
        layout,
        tuple(rng.sample(names, kinds)),
        counts,
        rng.randrange(2**31),
    )


def scene_at(seed: int, index: int, split: str = "train", names: Sequence[str] = NAMES) -> Scene:
    """Scene number `index` of a split's endless stream: a function of its arguments alone.

    names: of the things that may occur; the split `things` has its own.

    Raises:
        DataError: an unknown split.
    """
    check_split(split)
    rng = random.Random(f"{seed} {split} {index}")
    if split == "things":
        names = HELD_OUT
    while True:
        scene = draw_scene(rng, names)
        if split_of(scene) == split:
            return scene


def scene_where(rng: random.Random, allowed: Allowed) -> Scene:
    """A scene that satisfies `allowed`."""
    while True:
        scene = draw_scene(rng)
        if allowed(scene):
            return scene


def scenes(split: str, folder: str | Path | None = None) -> list[Scene]:
    """The list on which a held-out split is measured: 1,000 scenes that a viewer can tell from each
    other.

    They are stored as scenes, not as numbers of a stream, so that they stay the same when the code
    changes.

    Raises:
        DataError: an unknown split, or no lists; `folder`: see `find_drawings`.
    """
    check_split(split)
    rows = read_json_object(find_drawings(folder) / "evaluation.json", DataError)[split]
    return [
        Scene(style, background, layout, tuple(things), tuple(counts), jitter)
        for style, background, layout, things, counts, jitter in rows
    ]
