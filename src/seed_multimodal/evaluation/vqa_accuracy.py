"""VQA accuracy by the rules of the official evaluation (VQA v1 and v2, OK-VQA; Antol et al. 2015), quirks included.

    vqa_accuracy("two dogs", ["2 dogs"] * 4 + ["dogs"] * 6)      # 1.0: three of the other nine agree, every time

An answer is normalised; the annotators' answers only lose punctuation, and only where they differ. For each of the ten
annotators: min(1, answers of the other nine that equal / 3); the accuracy is the mean.

`lavit_answer` is the rule of LaVIT's evaluation, which does more to an answer; a rule is an argument of `vqa_accuracy`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

_MARKS = ";/[]\"{}()=+\\_-><@`,?!"
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The official pattern has (?!<=\d) where (?<!\d) was meant, so a full stop goes wherever no digit follows.
_STOP = re.compile(r"\.(?!\d)")
_MOST_STOPS = 32  # re.UNICODE stands in the place of a count there
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())}}
_ARTICLES = ("a", "an", "the")
_WHOLE = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
# A contraction with one apostrophe left out, and the official table's one entry the other way round.
_CONTRACTIONS = {"somebody'd": "somebodyd", **{
    word[:place] + word[place + 1:]: word for word in _WHOLE for place, letter in enumerate(word) if letter == "'"}}


# LaVIT's: words that an answer may begin with and that are taken off, one after the other, each once.
_OPENINGS = ("it is", "this is", "she's", "very", "for", "to", "in", "on", "at", "a", "an", "the")
_NO_ANSWERS = ("i don't know", "i do n't know", "i need to know", "")
UNANSWERABLE = "unanswerable"
Rule = Callable[[str], str]


def without_marks(text: str) -> str:
    """The official rule for punctuation: marks at a blank vanish, others become blanks; all vanish where a number has
    a comma in it."""
    number = _COMMA_IN_NUMBER.search(text) is not None
    made = text
    for mark in _MARKS:
        made = made.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    return _STOP.sub("", made, count=_MOST_STOPS)


def vqa_answer(text: str, words_for: Mapping[str, str] = _NUMBERS) -> str:
    """A model's answer as it is compared: no punctuation, lower case, digits for number words up to ten, no articles,
    apostrophes in contractions."""
    words = without_marks(text.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    kept = [word for word in (words_for.get(word, word) for word in words) if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)


def lavit_answer(text: str, legacy: bool = False) -> str:
    """`vqa_answer` with "no" for "nope", without words like "it is" at its front, "unanswerable" for "I don't know".

    Args:
        legacy: as the original takes such words off: it keeps what follows their last place ("to go to school" is
            "school", not "go to school").
    """
    found = vqa_answer(text, {**_NUMBERS, "nope": "no"})
    if found in _NO_ANSWERS:
        return UNANSWERABLE
    for words in _OPENINGS:
        if found.startswith(f"{words} "):
            found = found.split(f"{words} ")[-1] if legacy else found.removeprefix(f"{words} ")
            found = found.strip()
    return found or UNANSWERABLE


def vqa_accuracy(answer: str, annotated: Sequence[str], rule: Rule = vqa_answer) -> float:
    """Accuracy (0 to 1) of an answer (as the model gave it) against the annotators' answers, of which at least one.

    Args:
        rule: what is made of the answer before it is compared.
    """
    wanted = [one.replace("\n", " ").replace("\t", " ").strip() for one in annotated]
    if len(set(wanted)) > 1:
        wanted = [without_marks(one) for one in wanted]
    found = rule(answer)
    equal = sum(one == found for one in wanted)
    return sum(min(1.0, (equal - (one == found)) / 3) for one in wanted) / len(wanted)
