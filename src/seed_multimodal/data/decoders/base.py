"""Base of the decoders: options, fields read with checks, pictures, and spans joined into one sequence.

A decoder turns a record's fields into a `draft` (spans of text and pictures, learned or not); this file turns the spans
into ids and labels exactly as the released data code did. Two styles of labels existed:

* whole: the sample is one string; every token is learned, but for `<unk>`, which the released code takes for padding.
* spans: each span is encoded on its own; `<s>` and the user's turns are not learned, `</s>` is.

`validate: false` gives the released behaviour exactly, defects included (pictures of any length, samples without
content); by default such a record is refused with a sentence that starts with the field's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from seed_multimodal.data.decoders.sequence import IGNORED, Draws, TokenSequence
from seed_multimodal.data.formats.record import BadRecord, shorten
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import merge_text
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.settings import read_settings, setting

Part = str | Sequence[int]  # text, or the codes of one picture


@dataclass(frozen=True)
class Span:
    """Neighbouring texts and pictures, tokenised together."""

    parts: Sequence[Part]
    learned: bool = True


@dataclass
class Draft:
    """The spans of a record. `dropped`: why the released filter leaves it out; it may still have spans."""

    spans: Sequence[Span] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    dropped: str = ""
    whole: bool = False  # the labels' style, see above
    end: bool = True  # closed by </s>
    image_first: bool = False
    unlearned: int = 0  # tokens at the start that are never learned


# What a decoder needs of a field: a text, a text or a list of which one is drawn, one picture's codes (or, of several
# pictures, one long list or a list each), a list, an object.
TEXT, TEXTS, PICTURE, PICTURES, LIST, OBJECT = "text", "texts", "picture", "pictures", "list", "object"
CODE_FIELDS = ("image_ids", "source_image_ids", "target_image_ids")  # fields with the codes of pictures


@dataclass(frozen=True)
class DecoderOptions:
    """Settings of all decoders; those of one stand in its `Options`.

    Args:
        code_noise: from pictures the model reads (not learned, or before their caption), a share of codes drawn
            uniformly from [0, code_noise] is taken from another picture, which `noise_source(draws)` gives.
        validate: refuse pictures of another length than the tokenizer's, and samples without content.
    """

    code_noise: float = setting(0.0, least=0, most=1)
    noise_source: Any = None
    validate: bool = True


class Decoder:
    """Base of all decoders; make one with `registry.get_decoder`.

    `decoder(fields, draws)` -> `TokenSequence`, or None when the released filter drops the sample; `decoder.reason`
    then says why. `decode` gives the sequence in both cases, with `TokenSequence.dropped`.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[Mapping[str, str]] = {}  # field -> its kind; `views` may stand for a picture under `image_ids`
    Options: ClassVar[type[DecoderOptions]] = DecoderOptions
    without_effect: ClassVar[Sequence[str]] = ()  # options of the released function that it never reads
    reads_pictures: ClassVar[bool] = True
    Words: ClassVar[type[MultimodalTokenizer]] = MultimodalTokenizer

    def __init__(self, tokenizer: MultimodalTokenizer, options: Mapping[str, Any]) -> None:
        """Raises ConfigError: an unknown option (the nearest is named), or one of the wrong type."""
        where = f"decoder {self.name}"
        given = {key: value for key, value in options.items() if key not in self.without_effect}
        self.options: Any = read_settings(self.Options, given, where)
        self.tokenizer, self.vocabulary = tokenizer, tokenizer.vocabulary
        self.validate: bool = self.options.validate
        self.reason = ""
        if self.options.code_noise and not self.reads_pictures:
            raise ConfigError(f"{where}: code_noise disturbs pictures the model reads; there are none here.")
        if self.options.code_noise and not callable(self.options.noise_source):
            raise ConfigError(f"{where}: code_noise needs a noise_source, which gives the codes of some picture.")

    @classmethod
    def option_names(cls) -> list[str]:
        """All options that have an effect."""
        return [option.name for option in dataclasses.fields(cls.Options)]

    @classmethod
    def needed(cls, fields: Mapping[str, Any]) -> Mapping[str, str]:
        """`needs`, where they depend on what else the record has."""
        return cls.needs

    @classmethod
    def missing(cls, fields: Mapping[str, Any]) -> list[str]:
        """The needed fields that a record lacks."""
        return [name for name, kind in cls.needed(fields).items() if fields.get(name) is None
                and not (name == "image_ids" and kind == PICTURE and "views" in fields)]

    @classmethod
    def fits(cls, fields: Mapping[str, Any], several: bool | None) -> bool:
        """Whether a record looks like one of this decoder.

        Args:
            several: whether its `image_ids` are several pictures; None: not known.
        """
        return not cls.missing(fields)

    @classmethod
    def pictures_in(cls, fields: Mapping[str, Any]) -> int:
        """How many pictures a record must have in `image_ids`, written one after the other; 0: any number."""
        return 1 if cls.needs.get("image_ids") == PICTURE else 0

    @classmethod
    def guess_options(cls, fields: Mapping[str, Any], tokens_per_image: int) -> dict[str, Any]:
        """Options that suit a record for which only the decoder is known."""
        return {}

    # ------------------------------------------------------------------------------------------ the sequence

    def __call__(self, fields: Mapping[str, Any], draws: Draws, max_length: int | None = None) -> TokenSequence | None:
        """The sequence of one record; None when it is dropped (see `reason`).

        Args:
            max_length: cut there on the right, as the released code does; None never cuts.

        Raises:
            BadRecord: a field is missing, of the wrong type, or holds wrong codes; the sentence starts with its name.
        """
        sequence = self.decode(fields, draws, max_length)
        self.reason = sequence.dropped
        return None if sequence.dropped else sequence

    def decode(self, fields: Mapping[str, Any], draws: Draws, max_length: int | None = None) -> TokenSequence:
        """The sequence of one record, also when it is dropped (its ids may be empty then). Raises as `__call__`."""
        draft = self.draft(fields, draws)
        sequence = TokenSequence([], [], draft.extra, draft.dropped)
        if draft.spans or not draft.dropped:
            self._check_content(draft)
            self._fill(sequence, draft, max_length)
        return sequence

    def _check_content(self, draft: Draft) -> None:  # else `</s>` alone would be learned
        said = [part for span in draft.spans if span.learned for part in span.parts]
        blank = all(not part.strip() if isinstance(part, str) else not part for part in said)
        if self.validate and draft.end and not draft.dropped and blank:
            raise BadRecord("empty text", "the record: holds nothing that could be learned.")

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """The record's spans. Raises as `__call__`."""
        raise NotImplementedError

    def _fill(self, sequence: TokenSequence, draft: Draft, max_length: int | None) -> None:
        words = self.tokenizer
        ids = [words.bos_id]
        labels = [words.bos_id if draft.whole else IGNORED]
        for span in draft.spans:
            piece = self.encode(span.parts)
            ids += piece
            labels += piece if span.learned else [IGNORED] * len(piece)
        if draft.end:
            ids.append(words.eos_id)
            labels.append(words.eos_id)
        if max_length is not None:
            ids, labels = ids[:max_length], labels[:max_length]
        if draft.whole:
            labels = [IGNORED if id == words.pad_id else id for id in labels]
        start = min(draft.unlearned, len(labels))
        labels[:start] = [IGNORED] * start
        sequence.ids, sequence.labels = ids, labels

    def encode(self, parts: Sequence[Part]) -> list[int]:
        """Texts and pictures -> ids, as if written out as one string: neighbouring texts are one, white space next to
        a picture goes, and names of control words in the text become control words."""
        merged = merge_text(parts)
        ids: list[int] = []
        for place, part in enumerate(merged):
            if not isinstance(part, str):
                ids += [self.vocabulary.boi_id, *self.vocabulary.code_to_id(part), self.vocabulary.eoi_id]
                continue
            if place:  # texts never neighbour each other here
                part = part.lstrip()
            if place + 1 < len(merged):
                part = part.rstrip()
            ids += self.tokenizer.encode(part)
        return ids

    def as_text(self, parts: Sequence[Part]) -> str:
        """Texts and pictures written out, pictures by the names of their codes."""
        return "".join(part if isinstance(part, str) else self.vocabulary.image_text(part) for part in parts)

    # ------------------------------------------------------------------------------------------ fields

    def text(self, fields: Mapping[str, Any], name: str) -> str:
        """A field that must hold text."""
        value = fields.get(name)
        if value is None:
            raise BadRecord("missing key", f"{name}: is missing; decoder {self.name} needs it.")
        if not isinstance(value, str):
            raise BadRecord("wrong type", f"{name}: must be a text, not {shorten(value)}.")
        return value

    def lacking(self, names: Sequence[str], extra: dict[str, Any] | None = None) -> Draft:
        """The released code drops a sample without one of these fields; validation refuses it."""
        missing = f"{' or '.join(names)}: is missing; decoder {self.name} needs it."
        if self.validate:
            raise BadRecord("missing key", missing)
        return Draft(dropped=missing, extra=extra or {})

    def list_of(self, fields: Mapping[str, Any], name: str) -> list[Any]:
        """A field that must hold a list."""
        if fields.get(name) is None:
            raise BadRecord("missing key", f"{name}: is missing; decoder {self.name} needs it.")
        if not isinstance(fields[name], list | tuple):
            raise BadRecord("wrong type", f"{name}: must be a list, not {shorten(fields[name])}.")
        return list(fields[name])

    # ------------------------------------------------------------------------------------------ pictures

    def codes(self, value: Any, name: str) -> list[int]:
        """The codes of one picture, checked; always within the codebook, since others would be other words."""
        if not isinstance(value, list | tuple) or any(type(code) is not int for code in value):
            raise BadRecord("wrong type", f"{name}: must be a list of image codes, not {shorten(value)}.")
        size = self.vocabulary.n_codes
        wrong = next((place for place, code in enumerate(value) if not 0 <= code < size), None)
        if wrong is not None:
            raise BadRecord("codes out of range",
                            f"{name}: code {value[wrong]} at place {wrong} is outside 0..{size - 1}.")
        if problem := self.wrong_number(len(value)):
            raise BadRecord("number of codes", f"{name}: {problem}")
        return list(value)

    def wrong_number(self, codes: int) -> str:
        """What is wrong with so many codes of one picture; "": nothing."""
        wanted = self.vocabulary.tokens_per_image
        return f"a picture has {wanted} codes, not {codes}." if self.validate and codes != wanted else ""

    def picture(self, fields: Mapping[str, Any], draws: Draws, *, read: bool, name: str = "image_ids") -> list[int]:
        """The picture of a field.

        Args:
            read: the model reads it: one of the record's `views` is drawn, where it has some, and noise may be put in.
                A picture that the model writes is `image_ids` itself, and a drawn view only where there is none.
        """
        plain = not read and fields.get(name) is not None
        if name == "image_ids" and fields.get("views") is not None and not plain:
            return self.one_view(fields["views"], "views", draws, read=read)
        if fields.get(name) is None:
            raise BadRecord("missing key", f"{name}: is missing; decoder {self.name} needs it.")
        return self.one_view([fields[name]], name, draws, read=read)

    def one_view(self, views: Any, name: str, draws: Draws, *, read: bool) -> list[int]:
        """One of several code lists of the same picture."""
        if not isinstance(views, list | tuple) or not views:
            raise BadRecord("wrong type", f"{name}: must be a list of code lists, not {shorten(views)}.")
        codes = self.codes(draws.choice(views) if len(views) > 1 else views[0], name)
        return self.add_code_noise(codes, draws) if read else codes

    def pictures(self, fields: Mapping[str, Any], draws: Draws, *, read: bool, name: str = "image_ids",
                 flat: bool = True, at_most: int | None = None) -> list[list[int]]:
        """Several pictures: one long list, tokens_per_image codes each, or a list per picture.

        A remainder that is no whole picture is dropped by the released code and refused by validation.
        """
        value = self.list_of(fields, name)
        size = self.vocabulary.tokens_per_image
        if flat and not any(isinstance(item, list | tuple) for item in value):
            if self.validate and len(value) % size:
                raise BadRecord("number of codes", f"{name}: {len(value)} codes are not whole pictures of {size}.")
            value = [value[start:start + size] for start in range(0, len(value) - size + 1, size)]
        found = [self.codes(codes, f"{name}[{place}]") for place, codes in enumerate(value[:at_most])]
        return [self.add_code_noise(codes, draws) for codes in found] if read else found

    def add_code_noise(self, codes: list[int], draws: Draws) -> list[int]:
        """A share of the codes, uniform in [0, code_noise], taken from another picture."""
        if not self.options.code_noise:
            return codes
        level = self.options.code_noise * draws.uniform()
        wrong = [draws.uniform() < level for _ in codes]
        other = self.codes([int(code) for code in self.options.noise_source(draws)], "noise_source")
        return [o if w else c for c, o, w in zip(codes, other, wrong, strict=False)]
