"""One function per section of the report card: rebuild, draw, describe, answer, edit; each defines a right answer.

A `System` encodes, answers and draws in batches; the `World` is the real pictures with the judge's embeddings.
Every function returns a section: name → `Estimate` or plain number, with the size of the gallery beside the hits.
An answer without a (whole) picture counts as wrong, it is never left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from seed_multimodal.evaluation.judge import Judge, canonical_caption
from seed_multimodal.evaluation.metrics import (
    FloatArray,
    bootstrap,
    chance_at_k,
    cosine,
    majority_baseline,
    mentions,
    retrieval_at_k,
    same_answer,
    same_items,
)

Section = dict[str, Any]
Codes = list[int]
Rows = Sequence[int]


class System(Protocol):
    """Interface of a system for the report, in batches."""

    codebook_size: int

    def codes(self, pictures: NDArray[np.uint8]) -> NDArray[np.int64]:
        """uint8 [N, H, W, 3] → codes [N, T]."""
        ...

    def pictures(self, codes: Sequence[Codes]) -> list[Image.Image]:
        """Codes of N pictures → N pictures."""
        ...

    def describe(self, codes: Sequence[Codes]) -> list[str]:
        """A description of each picture."""
        ...

    def ask(self, codes: Sequence[Codes], questions: Sequence[str]) -> list[str]:
        """A short answer to each question about its picture."""
        ...

    def draw(self, texts: Sequence[str]) -> list[Codes | None]:
        """Codes of a drawing of each text; None where the answer holds no whole picture."""
        ...

    def edit(self, codes: Sequence[Codes], instructions: Sequence[str]) -> list[Codes | None]:
        """Codes of each picture after its instruction; None where the answer holds no whole picture."""
        ...


@dataclass
class World:
    """The data set with the judge's embeddings, made once."""

    nano: Any
    judge: Judge

    @cached_property
    def embeddings(self) -> FloatArray:
        """Judge's embedding of every real picture [N, D]."""
        return self.judge.embed_images(self.nano.images()).numpy()

    @cached_property
    def names(self) -> list[str]:
        """Canonical caption of every picture."""
        return [canonical_caption(record) for record in self.nano.records]

    @cached_property
    def everything(self) -> list[int]:
        """Rows of all pictures of all splits."""
        return list(range(len(self.nano.records)))


def picture_hits(world: World, found: FloatArray, targets: Rows, gallery: Rows, k: int, by_name: bool) -> FloatArray:
    """Whether the target is among the `k` real pictures of `gallery` nearest to each embedding of `found` [Q, D].

    Args:
        by_name: pictures with the target's canonical caption count as it (their text cannot tell them apart).
    """
    similarity = found @ world.embeddings[list(gallery)].T
    names: Sequence[Any] = world.names if by_name else world.everything
    right = same_items([names[t] for t in targets], [names[g] for g in gallery])
    return retrieval_at_k(similarity, right, k)


def text_hits(world: World, found: FloatArray, targets: Rows, gallery: Rows, k: int) -> FloatArray:
    """Whether the target's canonical caption is among the `k` nearest of the different captions of `gallery`."""
    texts = list(dict.fromkeys(world.names[g] for g in gallery))
    similarity = found @ world.judge.embed_texts(texts).numpy().T
    return retrieval_at_k(similarity, same_items([world.names[t] for t in targets], texts), k)


def spread(world: World, pictures: Sequence[Image.Image | None]) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Judge's embeddings [Q, D] of pictures, a zero row where there is none, and which are there [Q]."""
    there = np.array([p is not None for p in pictures], dtype=bool)
    found = np.zeros((len(pictures), world.judge.config.embed_dim), dtype=np.float32)
    if there.any():
        found[there] = world.judge.embed_images([p for p in pictures if p is not None]).numpy()
    return found, there


def score_pictures(world: World, pictures: Sequence[Image.Image | None], targets: Rows, gallery: Rows,
                   by_name: bool) -> Section:
    """Retrieval of made pictures against real ones and against texts, cosine to the target, and style.

    A missing picture is wrong everywhere and has cosine 0.
    """
    found, there = spread(world, pictures)
    texts = len({world.names[g] for g in gallery})
    section: Section = {"n": len(targets), "gallery_pictures": len(gallery), "gallery_texts": texts}
    for k in (1, 5):
        section[f"picture_r{k}"] = bootstrap(picture_hits(world, found, targets, gallery, k, by_name) * there)
        section[f"text_r{k}"] = bootstrap(text_hits(world, found, targets, gallery, k) * there)
    section["gallery_all"] = len(world.everything)
    section["picture_r1_all"] = bootstrap(picture_hits(world, found, targets, world.everything, 1, by_name) * there)
    section["cosine"] = bootstrap(cosine(found, world.embeddings[list(targets)]))
    styles = world.judge.styles_of(torch.from_numpy(found))
    section["style"] = bootstrap([float(ok and style == world.nano.records[t].style)
                                  for ok, style, t in zip(there, styles, targets, strict=True)])
    section["without_picture"] = int((~there).sum())
    return section


def chance(world: World, targets: Rows, gallery: Rows) -> Section:
    """What random rankings score on the galleries of `score_pictures`."""
    texts = list(dict.fromkeys(world.names[g] for g in gallery))
    names = [world.names[t] for t in targets]
    by_name = same_items(names, [world.names[g] for g in gallery])
    by_text = same_items(names, texts)
    return {f"{kind}_r{k}": round(chance_at_k(right, k), 4)
            for kind, right in (("picture", by_name), ("text", by_text)) for k in (1, 5)}


def describe_section(world: World, system: System, codes: Sequence[Codes], targets: Rows) -> tuple[Section, list[str]]:
    """Descriptions: the label stands in the text (concept), the style's name does (style), and the judge's nearest
    label to the text is the right one (concept_nearest; candidates: all labels of the split's pictures)."""
    texts = system.describe(codes)
    records = [world.nano.records[t] for t in targets]
    concept = [float(mentions(text, r.label)) for text, r in zip(texts, records, strict=True)]
    style = [float(mentions(text, r.style)) for text, r in zip(texts, records, strict=True)]
    labels = list(dict.fromkeys(r.label for r in world.nano.records if r.split == records[0].split))
    nearest = (world.judge.embed_texts(texts) @ world.judge.embed_texts(labels).T).argmax(1).tolist()
    return {"n": len(texts), "concept": bootstrap(concept), "style": bootstrap(style),
            "concept_and_style": bootstrap([a * b for a, b in zip(concept, style, strict=True)]),
            "concept_nearest": bootstrap([float(labels[i] == r.label) for i, r in zip(nearest, records, strict=True)]),
            "labels": len(labels)}, texts


def qa_section(world: World, system: System, codes: Sequence[Codes], targets: Rows, limit: int,
               rng: np.random.Generator) -> tuple[Section, list[dict[str, str]]]:
    """Questions: normalised exact match, by kind and over all, beside the most frequent training answer of the kind.

    Intervals resample pictures. At most `limit` questions, drawn at random.
    """
    asked = [(i, qa) for i, t in enumerate(targets) for qa in world.nano.records[t].qa]
    if len(asked) > limit:
        asked = [asked[j] for j in sorted(rng.choice(len(asked), limit, replace=False).tolist())]
    answers = system.ask([codes[i] for i, _ in asked], [qa.question for _, qa in asked])
    hits = np.array([float(same_answer(a, qa.answer)) for a, (_, qa) in zip(answers, asked, strict=True)])
    known = [(qa.kind, qa.answer) for r in world.nano.records if r.split == "train" for qa in r.qa]
    blind = majority_baseline(known, [(qa.kind, qa.answer) for _, qa in asked])
    groups = [targets[i] for i, _ in asked]
    section: Section = {"n": len(asked), "pictures": len(set(groups)), "all": bootstrap(hits, groups),
                        "blind": round(float(blind.mean()), 4), "kinds": {}}
    kinds = np.array([qa.kind for _, qa in asked])
    for kind in sorted(set(kinds.tolist())):
        chosen = np.flatnonzero(kinds == kind)
        section["kinds"][kind] = {"accuracy": bootstrap(hits[chosen], [groups[j] for j in chosen]),
                                  "blind": round(float(blind[chosen].mean()), 4)}
    log = [{"key": world.nano.records[targets[i]].key, "question": qa.question, "answer": a, "truth": qa.answer}
           for a, (i, qa) in zip(answers, asked, strict=True)]
    return section, log


def edit_section(world: World, pictures: Sequence[Image.Image | None], edits: Sequence[Any],
                 split_rows: Rows) -> Section:
    """Edits: the nearest real picture has the target's label (concept) and style; both is the headline.

    The gallery is the split's pictures and the edits' sources, so that an unchanged picture counts as wrong.
    """
    index = world.nano.index
    sources, targets = [index[e.source] for e in edits], [index[e.target] for e in edits]
    gallery = list(dict.fromkeys([*split_rows, *sources, *targets]))
    found, there = spread(world, pictures)
    nearest = [gallery[j] for j in (found @ world.embeddings[gallery].T).argmax(1).tolist()]
    records = world.nano.records
    concept = np.array([records[a].label == records[b].label for a, b in zip(nearest, targets, strict=True)]) & there
    style = np.array([records[a].style == records[b].style for a, b in zip(nearest, targets, strict=True)]) & there
    left = np.array([a == b for a, b in zip(nearest, sources, strict=True)]) & there
    both = (concept & style).astype(float)
    section: Section = {
        "n": len(edits), "gallery_pictures": len(gallery), "concept": bootstrap(concept.astype(float)),
        "style": bootstrap(style.astype(float)), "concept_and_style": bootstrap(both),
        "left_unchanged": bootstrap(left.astype(float)), "without_picture": int((~there).sum()), "kinds": {}}
    kinds = np.array([e.kind for e in edits])
    for kind in sorted(Counter(kinds.tolist())):
        section["kinds"][kind] = bootstrap(both[kinds == kind])
    return section

