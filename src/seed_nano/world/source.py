"""The record format `nano`: images rendered when opened, with captions or dialogues.

    open_records(None, format="nano", options={"content": "edits", "number": 20_000})

The training scenes are an endless stream, of which the first `number` are one epoch; the other
splits are the lists of `splits.scenes`. Records are functions of (seed, index), so nothing is
stored and any run can be resumed or repeated.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from seed_multimodal.data.formats.record import Record
from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import DataError
from seed_nano.world.records import from_last_image, record_at, with_images, x_record_at
from seed_nano.world.scene import SIZE, Scene, WideScene, find_drawings, load_sprites
from seed_nano.world.splits import check_split, scene_at, scenes
from seed_nano.world.targets import label_names
from seed_nano.world.things import first_things
from seed_nano.world.wide import View
from seed_nano.world.words import describe

EPOCH = 100_000  # training scenes, where no number is given
CAPTIONS = 4  # of a training scene: one is drawn each time it is seen
X_KIND = "seed_x."  # before the kinds of nano-x
EDIT_KEYS = {"image_key": "target_image", "captioned": False, "condition_key": "source_image"}
KINDS = {"qa": "questions"}  # contents whose records have another name


class NanoSource:
    """Records of one split by number: a `View` under `image`, captions under `caption`, classes
    under `labels`; or records of one kind.

    Args:
        folder: of the drawings, see `find_drawings`.
        content: a kind of `records`, `qa` or `seed_x.KIND`; the fields have the keys of a user's
            own data: questions are `qa` or `chat`, edits `edit` or `chat`, stories `story` or
            `chat`, documents `interleaved`.
        split: `train`, or a held-out one.
        number: of records; default 100,000, and without `content` never more than a held-out list
            has.
        seed: of training scenes; another one gives others.
        size: side of the images of scenes with captions, in pixels.
        things: how many of them, the first ones, occur; None: all.

    Raises:
        DataError: an unknown split, `things` of records that do not read it, or no drawings.
        ConfigError: `things` is no such number.
    """

    files = ()  # scenes are computed

    def __init__(
        self,
        folder: str | Path | None = None,
        content: str = "",
        split: str = "train",
        number: int | None = None,
        seed: int = 0,
        size: int = SIZE,
        things: int | None = None,
    ) -> None:
        check_split(split)
        self.path = find_drawings(folder)
        self.content = content
        self.split = split
        self.seed = seed
        self.size = size
        self.names = first_things(things)
        self.pair_keys = EDIT_KEYS if content.endswith("edits") else {}
        self._listed = scenes(split, folder) if split != "train" and not content else []
        if things is not None and (self._listed or content.startswith(X_KIND)):
            raise DataError(f"nano: things is not of the listed scenes, nor of {X_KIND}*.")
        self.number = min(number or EPOCH, len(self._listed)) if self._listed else number or EPOCH
        load_sprites(self.path)  # before workers are forked, so that they share it

    @property
    def sizes(self) -> Sequence[int]:
        """All records are one shard."""
        return [self.number]

    def locate(self, row: int) -> Record:
        """Record number `row`, its images not drawn."""
        if self.content:
            key = f"{self.split} {self.content} {self.seed} {row}"
            # Records of the language models.
            kind = KINDS.get(self.content, self.content)
            if kind.startswith(X_KIND):
                record = x_record_at(kind.removeprefix(X_KIND), self.seed, row, self.split)
            else:
                record = record_at(kind, self.seed, row, self.split, names=self.names)
            fields = _fields(with_images(record, self._view), self.content)
            return Record(key, f"{self.path}: {key}", fields, file=str(self.path))
        # Scenes with captions.
        if self._listed:
            key = f"scene {self.split} {row}"
            scene = self._listed[row]
            captions = [describe(scene)]
        else:
            key = f"scene {self.split} {self.seed} {row}"
            scene = scene_at(self.seed, row, names=self.names)
            rng = random.Random(f"{self.seed} captions {row}")
            captions = [describe(scene, rng) for _ in range(CAPTIONS)]
        fields = {
            "image": View(scene, self.size, folder=self.path),
            "caption": captions,
            "labels": label_names(scene),
        }
        return Record(key, f"{self.path}: {key}", fields, file=str(self.path))

    def _view(self, scene: Scene | WideScene | View) -> View:
        if isinstance(scene, View):
            return replace(scene, folder=self.path)
        return View(scene, 2 * SIZE if isinstance(scene, WideScene) else SIZE, folder=self.path)


def _fields(record: JsonObject, content: str) -> JsonObject:
    if content == "captions":
        return {"image": record["image_ids"], "caption": record["text"], "text": record["text"]}
    if content == "documents":
        return {"images": record["image_ids"], "texts": record["texts"]}
    # The last image's turn under the keys of a user's own data.
    request, answer = (message["content"] for message in from_last_image(record)[:2])
    fields: JsonObject = {}
    if content in ("qa", "describe", "asides", "typed_questions"):
        fields = {"image": request[0], "question": request[1], "answer": answer[0]}
    elif content in ("edits", "typed_edits"):
        fields = {"source_image": request[0], "instruction": request[1], "target_image": answer[1]}
    elif content == "typed_draw":
        fields = {"text": request[0], "image": answer[1]}
    elif content == "stories":
        fields = {"images": answer[1::2], "captions": answer[::2]}

    # All messages, in which images are marked.
    messages = []
    for message in record["messages"]:
        parts = [{"image": part} if isinstance(part, View) else part for part in message["content"]]
        messages.append({"role": message["role"], "content": parts})
    return {"messages": messages, **fields}


open_nano = NanoSource
