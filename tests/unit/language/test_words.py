"""Caption texts: the order of the steps shows in the white space that survives."""

from __future__ import annotations

from seed_multimodal.language.words import caption_text, question_text


def test_caption_text_keeps_single_tabs() -> None:
    assert caption_text('A "Dog" (big); #1!') == "a dog big 1"
    assert caption_text("one\ttab\nline\n") == "one\ttab\nline"
    assert caption_text("a b c d", prompt="see: ", max_words=2) == "see: a b"
    assert len(caption_text("w " * 80).split()) == 50


def test_question_text_keeps_inner_blanks() -> None:
    assert question_text("What  is: it? ") == "what  is it?"
    assert question_text("a  b c", max_words=2) == "a "
