"""Words that nano does not know are named; its own sentences and plain English are not."""

from seed_multimodal.data.nano.records import KINDS, record_at, with_pictures
from seed_multimodal.data.nano.unknown import unknown_note, unknown_words


def test_nothing_that_nano_is_trained_with_is_unknown() -> None:
    for kind in KINDS:
        said = "".join(str(with_pictures(record_at(kind, 9, index), lambda scene: None)) for index in range(100))
        assert unknown_words(said) == []


def test_other_things_are_named_with_the_nearest_known_ones() -> None:
    assert unknown_note("Draw a panda, please.") == ""
    note = unknown_note("Could you draw me a tigger and a Zebra?")
    assert note.startswith("nano does not know 'tigger', 'zebra': it knows 150 things; nearest: tiger,")
    assert unknown_words("Is there a goat?") == ["goat"]  # held out: rebuilt, never named
    assert unknown_words("Нарисуй кошку") == ["нарисуй", "кошку"]
    assert unknown_words("?! 42") == []
