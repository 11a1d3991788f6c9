"""The time of each pattern and reader grows with a text's length, not with its square.

One message of 32,000 letters held the interpreter, and with it the server, for two minutes. What is
tried is found by walking the packages, so that new patterns and readers are tried, too:

* patterns of modules, and those that objects of loaded systems hold, also as properties;
* readers: functions of modules, and methods of these objects, that have a parameter of `TEXTS` or a
  message of `MESSAGES`, and whose other parameters have a default or are in `OTHERS`.
"""

import contextlib
import functools
import importlib
import inspect
import io
import itertools
import math
import pkgutil
import re
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from PIL import Image
from systems import load

import seed_glm_image
import seed_multimodal
import seed_nano.words
import seed_nano.world
from seed_multimodal.errors import RequestError
from seed_multimodal.language.answer import AnswerReader
from seed_multimodal.language.messages import Message, user_message
from seed_multimodal.language.prompts import DEFAULT_TASKS, TEMPLATES
from seed_multimodal.language.vocabulary import SeedXVocabulary
from seed_nano.words.known_words import KnownWords, read_known_words

NEW = itertools.count()
SECONDS = 0.2  # of a processor, at most
NOISE = 0.1  # seconds: less is not compared
LENGTH = 32_000  # characters, as the server allows

# Packages that read files of the owner, and no texts of users.
OF_OWNERS = set(
    "__main__ cli compat data diffusion entry evaluation nn pretokenize recipes rl training "
    "weights".split()
)
TEXTS = set(
    "text texts request question phrase caption answer answers claim description before after "
    "written url head which requests system".split()
)
MESSAGES: dict[str, Callable[[str], object]] = {
    "Message": lambda text: Message("user", (text,)),
    "Sequence[Message]": lambda text: [Message("user", (text,))],
    "list[Message]": lambda text: [Message("user", (text,))],
    "Sequence[Sequence[Message]]": lambda text: [[Message("user", (text,))]],
    "Mapping[str, object]": lambda text: {"type": "text", "text": text},
}
OTHERS = {
    "PromptTemplate": TEMPLATES["vicuna"],
    "TaskPrompts": DEFAULT_TASKS,
    "SeedXVocabulary": SeedXVocabulary(),
    "TaskKind": "chat",
    "Sequence[T]": [],
    "Mapping[str, str]": {},
    "answer_after": " - ",
}


def misspelt(length: int) -> str:
    """Words that were not there before, between quotations that are read as they stand."""
    letters = "aeiourstlnd"
    words: list[str] = []
    for index in itertools.islice(NEW, length // 12):
        tail = "".join(letters[index // 11**power % 11] for power in range(5))
        words.append(f'ste{tail} "" ')
    return "".join(words).ljust(length, "z")[:length]


def repeated(piece: str) -> Callable[[int], str]:
    return lambda length: (piece * length)[:length]


SHAPES = {
    "letters": repeated("x"),
    "accents": lambda length: "a" + "\u0301" * (length - 1),
    "joined emoji": repeated("\U0001f468\u200d"),
    "images": repeated("!["),
    "tags": repeated("<"),
    "quotes": repeated("“"),
    "mixed quotes": repeated("“'「\""),
    "at": repeated("@"),
    "dots": repeated("."),
    "slashes": repeated("/"),
    "misspelt words": misspelt,
    "capitals": repeated("A"),
    "numbers": repeated("1"),
    "blanks": repeated(" "),
    "brackets": repeated("[("),
    "data URLs": repeated("data:image/png;base64"),
    "single letters": repeated("a "),
    "repeated words": repeated("more not "),
    "things and colours": lambda length: "fox " * (length // 8) + "red cat " * (length // 16),
    "half notes": repeated("The first 1 messages were left out: "),
}


# ---- what is tried


@functools.cache
def modules() -> list[object]:
    """The modules between a request and its answer."""
    found: list[object] = []
    for package in (seed_multimodal, seed_glm_image, seed_nano.words, seed_nano.world):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if package is seed_multimodal and module.name.split(".")[1] in OF_OWNERS:
                continue
            with contextlib.suppress(ImportError):  # an extra that is not installed
                found.append(importlib.import_module(module.name))
    return found


@functools.cache
def objects() -> list[object]:
    """Objects of the languages and families of three systems, and a reader of answers."""
    waiting: list[object] = []
    for name in ("nano", "nano-x", "nano-lavit"):
        system = load(name, load_decoder=False)
        system.family.max_characters = sys.maxsize  # as of a longer context
        waiting.append(system.family)
    words = read_known_words(system.config.known_words)
    OTHERS["Phrases"] = words.compared
    waiting += [words, AnswerReader(system.tokenizer, ("\nUSER:", " ###", "\n"))]
    found: dict[int, object] = {}
    while waiting:
        item = waiting.pop()
        package = type(item).__module__.rpartition(".")[0]
        is_read = package in ("seed_multimodal.language", "seed_nano.words")
        is_read |= hasattr(item, "read_words")
        if is_read and id(item) not in found:
            found[id(item)] = item
            waiting += [value for _, value in held(item)]
    return [*found.values()]


def held(item: object) -> Iterator[tuple[str, object]]:
    """What an object holds, also as properties."""
    names = dict.fromkeys(vars(item)) if hasattr(item, "__dict__") else {}
    for cls in type(item).__mro__:
        for name, value in vars(cls).items():
            if isinstance(value, property | functools.cached_property):
                names[name] = None
    for name in names:
        with contextlib.suppress(Exception):
            yield name, getattr(item, name)


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@functools.cache
def patterns() -> dict[str, re.Pattern]:
    found = {
        f"{module.__name__}.{name}": value
        for module in modules()
        for name, value in vars(module).items()
    } | {f"{type(item).__name__}.{name}": value for item in objects() for name, value in held(item)}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, re.Pattern) and isinstance(value.pattern, str)
    }


@functools.cache
def readers() -> dict[str, Callable[[str], object]]:
    """Name → a call with a text."""
    functions: dict[str, Callable] = {}
    read_objects = objects()
    for module in modules():
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__:
                functions[f"{module.__name__}.{name}"] = value
    for item in read_objects:
        for name in dir(type(item)):
            if not name.startswith("__") and inspect.isfunction(
                inspect.getattr_static(type(item), name)
            ):
                functions[f"{type(item).__name__}.{name}"] = getattr(item, name)
    calls = {name: call_of(function) for name, function in functions.items()}
    return {name: call for name, call in calls.items() if call}


def call_of(function: Callable) -> Callable[[str], object] | None:
    """A call of a function with a text; None: it reads none, or needs something else."""
    fills: dict[str, Callable[[str], object]] = {}
    reads = False
    for name, parameter in inspect.signature(function).parameters.items():
        kind = str(parameter.annotation)
        if name in TEXTS and "str" in kind:
            fills[name] = (lambda text: [text]) if "Sequence" in kind else (lambda text: text)
            reads = True
        elif kind in MESSAGES:
            fills[name] = MESSAGES[kind]
            reads = True
        elif parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            continue
        elif kind in OTHERS or name in OTHERS:
            other = OTHERS.get(kind, OTHERS.get(name))
            fills[name] = functools.partial(lambda value, text: value, other)
        else:
            return None
    if not reads:
        return None
    return lambda text: function(**{name: fill(text) for name, fill in fills.items()})


# ---- how long it takes


def seconds(call: Callable[[str], object], text: str) -> float:
    """Of a processor, without other threads."""
    start = time.thread_time()
    # A refusal is an answer, and what is printed is no matter.
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        call(text)
    return time.thread_time() - start


def slow_shapes(call: Callable[[str], object]) -> dict[str, list[float]]:
    """The shapes that take too long, with the seconds of a short, a half and a whole text."""
    slow: dict[str, list[float]] = {}
    for shape, text_of in SHAPES.items():
        # A short text is first: where it takes long, a whole one would take minutes.
        costs = [seconds(call, text_of(LENGTH // 8))]
        if costs[0] < SECONDS:
            costs = [math.inf] * 2
            for _ in range(5):  # the least of some tries
                for index, length in enumerate((LENGTH // 2, LENGTH)):
                    costs[index] = min(costs[index], seconds(call, text_of(length)))
                if costs[1] < max(min(2.5 * costs[0], SECONDS), NOISE):
                    break
            else:
                slow[shape] = costs
        else:
            slow[shape] = costs
    return slow


def use(pattern: re.Pattern, text: str) -> None:
    """What callers do with a pattern."""
    pattern.search(text)
    pattern.sub("", text)


@pytest.mark.slow
def test_patterns_take_time_in_proportion_to_the_length():
    assert {"KnownWords.in_capitals", "Phrases.pattern"} < patterns().keys()
    slow = {
        name: slow_shapes(functools.partial(use, pattern)) for name, pattern in patterns().items()
    }
    assert not {name: shapes for name, shapes in slow.items() if shapes}


@pytest.mark.slow
def test_readers_take_time_in_proportion_to_the_length():
    assert {"KnownWords.notes", "SeedLlamaFamily.prompts"} < readers().keys()
    slow = {name: slow_shapes(call) for name, call in readers().items()}
    assert not {name: shapes for name, shapes in slow.items() if shapes}


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_that_cannot_fit_are_not_read(nano, shape):
    # nano's context has fewer characters than the server allows.
    text = f"a fox {SHAPES[shape](LENGTH)} and a dog"
    calls = [
        lambda text: nano.chat([{"role": "user", "content": text}]),
        nano.draw,
        lambda text: nano.ask(Image.new("RGB", (64, 64)), text),
        lambda text: nano.family.prompts([user_message([text])], "chat"),
    ]
    for call in calls:
        with pytest.raises(RequestError, match="characters"):
            call(text)
        assert min(seconds(call, text) for _ in range(3)) < SECONDS


def test_the_length_is_that_of_what_was_written(nano):
    limit = nano.family.max_characters
    read = nano.family.read_words(user_message([("plz " * limit)[:limit]]))
    assert len(read[0].text) > limit
    nano.family.read_words(read)  # as of a conversation that grows


def test_only_so_many_words_of_a_request_are_corrected(nano):
    letters = "abcdefghijklmnopqrst"
    words = [f"elefnt{first}{second}" for first in letters for second in letters]
    turns = [turn for word in [*words, "elefant"] for turn in user_message([word])]
    start = time.process_time()
    *_, last = nano.family.read_words(turns)
    assert time.process_time() - start < SECONDS
    assert last.text == "elephant"  # the newest


def test_each_text_is_read_once(nano, monkeypatch):
    texts = []
    read = KnownWords.read

    def counted(known, text, tried):
        texts.append(text)
        return read(known, text, tried)

    monkeypatch.setattr(KnownWords, "read", counted)

    # Rounds that cannot fit are not read, the others once, however many prompts are tried.
    rounds = []
    for index in range(400):
        rounds.append({"role": "user", "content": f"{index} " + "a fox and a dog " * 20})
        rounds.append({"role": "assistant", "content": "Here is the picture."})
    last = "What is an elefant?"
    answer = nano.chat([*rounds, {"role": "user", "content": last}], max_new_tokens=4)
    assert "left out" in answer.note and "'elefant' as 'elephant'" in answer.note
    assert len(texts) == len(set(texts)) < 100 and texts[0] == last

    texts.clear()
    nano.draw("an elefant", num_images=2, read_back=True)
    assert texts.count("Please draw an elefant.") == 1
