"""Request sentences of each task: training data is written with them, systems ask with them.

`DESCRIBE_PROMPT` and `QA_SUFFIX` are the sentences the released models were tuned on; the others are nano's.
"""

from __future__ import annotations

from dataclasses import dataclass

from seed_multimodal.errors import ConfigError

DESCRIBE_PROMPT = "Please provide an accurate and concise description of the given image."
DESCRIBE_VIDEO_PROMPT = "Please provide an accurate and concise description of the given video."
QA_SUFFIX = " Please provide an accurate answer consisting of only one word or phrase."
DRAW_PROMPT = "Please draw {caption}."
DRAW_RESPONSE = "Here is the picture."
EDIT_RESPONSE = "Here it is."

# One of the released models' own request and response pairs (same index in their instruction-tuning data).
RELEASED_DRAW_PROMPT = "Please generate an image of {caption}."
RELEASED_DRAW_RESPONSE = ""

# Requests of the released inference scripts: about a picture, for a picture, for a change of a picture.
DEMO_QUESTIONS = ("What is this animal?", "Can you generate an image of a dog on the green grass?",
                  "Can you make the cat wear sunglasses?")


@dataclass(frozen=True)
class TaskPrompts:
    """The sentences of one system; a `tasks` object in `system.json` overrides single ones.

    The responses open a forced answer: `<img>` follows them. An empty response puts `<img>` first, as the released
    demo does.
    """

    describe: str = DESCRIBE_PROMPT
    qa_suffix: str = QA_SUFFIX
    draw: str = DRAW_PROMPT
    draw_response: str = DRAW_RESPONSE
    edit_response: str = EDIT_RESPONSE

    def __post_init__(self) -> None:
        if "{caption}" not in self.draw:
            raise ConfigError(f"The drawing prompt {self.draw!r} has no {{caption}} to fill in.")

    def draw_request(self, caption: str) -> str:
        """The user's sentence that asks for a picture of `caption` (its own trailing dots and blanks dropped)."""
        return self.draw.replace("{caption}", caption.strip().rstrip(".").strip())

    def question(self, question: str) -> str:
        """`question` with the one-word suffix, unless it already ends in it."""
        question = question.strip()
        return question if question.endswith(self.qa_suffix.strip()) else question + self.qa_suffix


NANO_TASKS = TaskPrompts()
RELEASED_TASKS = TaskPrompts(draw=RELEASED_DRAW_PROMPT, draw_response=RELEASED_DRAW_RESPONSE,
                             edit_response=RELEASED_DRAW_RESPONSE)
