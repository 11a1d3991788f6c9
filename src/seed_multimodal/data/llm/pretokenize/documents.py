"""Interleaved documents: pictures and texts in turn (pretraining, as MMC4), and instructions with pictures in them.

A picture of a document that cannot be read is left out with its place, as released; one of an instruction is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from seed_multimodal.data.llm.pretokenize.samples import Dropped, Picture, Sample
from seed_multimodal.data.llm.pretokenize.settings import InputSettings
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.language.vocabulary import PLACEHOLDER, ImageVocabulary

FIELDS = {"images": "images", "texts": "texts", "instruction": "instruction", "response": "response"}


def parse(sample: Sample, settings: InputSettings, keys: Mapping[str, str]) -> tuple[dict[str, Any], list[Picture]]:
    """A document, or an instruction and its response with `<image>` where a picture stands.

    Raises:
        BadRecord: lists of different length, a place with both or neither, or as many pictures as placeholders do not
            stand for.
        Dropped: a document without any picture.
    """
    images = sample.fields.get(keys["images"])
    if not isinstance(images, list):
        raise BadRecord("missing key", f"{sample.where}: has no list of pictures under {keys['images']!r} "
                        f"({sample.keys()}).")
    if keys["instruction"] in sample.fields:
        texts = {name: str(sample.text(keys[name])) for name in ("instruction", "response")}
        count = sum(text.count(PLACEHOLDER) for text in texts.values())
        if count != len(images):
            raise BadRecord("images and placeholders", f"{sample.where}: {count} {PLACEHOLDER} placeholders for "
                            f"{len(images)} pictures.")
        return texts, [sample.picture(image) for image in images]
    words = sample.fields.get(keys["texts"])
    if not isinstance(words, list) or len(words) != len(images):
        raise BadRecord("images and texts", f"{sample.where}: {keys['images']!r} and {keys['texts']!r} must be lists "
                        "of one length, with None where the other stands.")
    for place, (image, text) in enumerate(zip(images, words, strict=True)):
        if (image is None) == (text is None) or not isinstance(text, str | None):
            raise BadRecord("images and texts", f"{sample.where}: place {place} must hold a picture or a text.")
    pictures = [sample.picture(image, optional=True) for image in images if image is not None]
    if not pictures:
        raise Dropped("no picture")
    metadata = sample.fields.get("metadata")
    return {"texts": words, "metadata": {} if metadata is None else metadata}, pictures


def record(parsed: dict[str, Any], codes: list[list[list[int]] | None], vocabulary: ImageVocabulary) -> dict[str, Any]:
    """The record of what `parse` gave."""
    left = iter(codes)
    if "instruction" in parsed:
        return {name: _filled(parsed[name], left, vocabulary) for name in ("instruction", "response")}
    places = [(None, text) if text is not None else (next(left), None) for text in parsed["texts"]]
    kept = [(None if views is None else views[0], text) for views, text in places
            if views is not None or text is not None]
    return {"image_ids": [image for image, _ in kept], "texts": [text for _, text in kept],
            "metadata": parsed["metadata"]}


def _filled(text: str, left: Iterator[list[list[int]] | None], vocabulary: ImageVocabulary) -> str:
    """The text with the words of each picture in place of its placeholder."""
    first, *others = text.split(PLACEHOLDER)
    words = []
    for other in others:
        views = next(left)
        assert views is not None
        words.append(vocabulary.image_text(views[0]) + other)
    return first + "".join(words)
