"""Prompts of each task, for training data and inference.

`DESCRIBE_PROMPT` and `QA_SUFFIX` are the original models' tuning prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

DESCRIBE_PROMPT = "Please provide an accurate and concise description of the given image."
DESCRIBE_VIDEO_PROMPT = "Please provide an accurate and concise description of the given video."
QA_SUFFIX = " Please provide an accurate answer consisting of only one word or phrase."
DRAW_PROMPT = "Please draw {caption}."
DRAW_RESPONSE = "Here is the picture."
EDIT_RESPONSE = "Here it is."  # also to a request for an image in a conversation that has one already

# Requests of the original inference scripts: about an image, for an image, for a change of an image.
DEMO_QUESTIONS = ("What is this animal?", "Can you generate an image of a dog on the green grass?",
                  "Can you make the cat wear sunglasses?")


@dataclass(frozen=True)
class TaskPrompts:
    """Prompts of one system; a `tasks` object in `system.json` overrides single ones.

    The responses open a forced answer, before `<img>`. `draw_words`, `edit_words`: tokens in which the model may say
    what the image will show, before an image is forced. `answer_after`: ends a written verdict before the answer.
    """

    describe: str = DESCRIBE_PROMPT
    qa_prefix: str = ""
    qa_suffix: str = QA_SUFFIX
    draw: str = DRAW_PROMPT
    draw_response: str = DRAW_RESPONSE
    edit_response: str = EDIT_RESPONSE
    detect: str = "{phrase}"
    draw_words: int = 0
    edit_words: int = 0
    answer_after: str = ""

    def draw_request(self, caption: str) -> str:
        """The prompt for an image of `caption` (without trailing dots and blanks)."""
        return self.draw.replace("{caption}", caption.strip().rstrip(".").strip())

    def detect_request(self, phrase: str) -> str:
        """The prompt for the location of `phrase`; a phrase that ends like a sentence is used as is."""
        phrase = phrase.strip()
        return phrase if phrase.endswith((".", "?", "!")) else self.detect.replace("{phrase}", phrase)

    def question(self, question: str) -> str:
        """`question` with the short-answer suffix, unless it ends with it."""
        question = question.strip()
        return question if question.endswith(self.qa_suffix.strip()) else self.qa_prefix + question + self.qa_suffix


def answer_in(text: str, after: str) -> str:
    """The text after `after` (see `TaskPrompts.answer_after`); all of it without one."""
    return (text.partition(after)[2] if after else "") or text


DEFAULT_TASKS = TaskPrompts()
# A request and response of the original instruction-tuning data (same index).
RELEASED_TASKS = TaskPrompts(draw="Please generate an image of {caption}.", draw_response="", edit_response="")
# Prompts of SEED-X's scripts. Its tuned models write a sentence before the image; the scripts allow 120 tokens, 66 of
# them for the image.
SEED_X_TASKS = TaskPrompts(
    describe="Describe this image briefly.", qa_suffix="", draw="Generate an image: {caption}", draw_response="",
    edit_response="", detect="Where is {phrase}? Show me the location.", draw_words=54, edit_words=54)
