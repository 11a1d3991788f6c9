"""`ConversationGenerator`: conversations ─► prompts ─► answers, before their images are decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from seed_multimodal.inference.generator import GeneratedAnswer, Generator, Task
from seed_multimodal.inference.likelihood import Likelihood
from seed_multimodal.inference.prompt import GenerationSettings, HiddenStates, Prompt
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.known_words import read_known_words
from seed_multimodal.language.messages import Message, without_oldest_turn
from seed_multimodal.language.prompts import TaskPrompts
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pipelines.images import VARIATION, ImageInput, Log, Options
from seed_multimodal.progress import Progress
from seed_multimodal.settings import check_value

BATCH = 16
# A request: messages of which a family builds a prompt, or a prompt that was built before.
ConversationOrPrompt = Sequence[Message] | Prompt
BAR_FROM = 32  # number of requests from which a progress bar is shown


class ConversationGenerator(Generator):
    """Answers to conversations, of which a family builds prompts."""

    config: SystemConfig
    tasks: TaskPrompts
    log: Log

    # ---- defined by families

    def build_prompts(
        self,
        conversations: Sequence[Sequence[Message]],
        task: Task,
        opening: str = "",
        seeds: Sequence[int | None] | None = None,
    ) -> list[Prompt]:
        """Conversations as prompts.

        opening: text with which the answers begin. seeds: of stochastic encoders (LaVIT's).
        """
        raise NotImplementedError

    def prompts_of(
        self,
        requests: Sequence[ConversationOrPrompt],
        task: Task,
        opening: str = "",
        seeds: Sequence[int | None] | None = None,
    ) -> list[Prompt]:
        """The prompts of requests, all conversations or all prompts (see `build_prompts`)."""
        prompts = [request for request in requests if isinstance(request, Prompt)]
        if not prompts:
            conversations = [request for request in requests if not isinstance(request, Prompt)]
            return self.build_prompts(conversations, task, opening, seeds)
        answered = self.tokenizer.encode_parts([opening]) if opening else []
        return [prompt.answered_with(answered) for prompt in prompts]

    def image_inputs(
        self, parts: Sequence[ImagePart], states: HiddenStates, row: int
    ) -> Sequence[ImageInput]:
        """Input of `images.draw` for images of answer `row`."""
        return [part.codes for part in parts]

    # ---- prompts

    def unknown_words_note(self, *messages: Message) -> str:
        """A note about words that the system did not learn, or empty."""
        file = self.config.known_words
        if file is None:
            return ""
        return read_known_words(file).note("\n".join(message.text for message in messages))

    def fitting_prompt(
        self, conversation: list[Message], task: Task, opening: str, settings: GenerationSettings
    ) -> Prompt:
        """The prompt of a conversation; the oldest turns are dropped to fit the context."""
        context = self.engine.capacity
        # Tokens for the answer: a quarter of the context, and at least an image.
        reserved = max(context // 4, self.tokenizer.vocabulary.min_codes + 2)
        reserved = min(settings.max_new_tokens, reserved)

        turns = conversation
        while True:
            prompt = self.build_prompts([turns], task, opening, [settings.seed])[0]
            shorter = without_oldest_turn(turns)
            if len(prompt) + reserved <= context or len(shorter) == len(turns):
                break
            turns = shorter

        prompt.note = self.unknown_words_note(turns[-1])
        n_dropped = len(conversation) - len(turns)
        if n_dropped:
            prompt.note = (
                f"The conversation is longer than the model's context of {context} tokens: its "
                f"first {n_dropped} messages were left out. {prompt.note}"
            ).rstrip()
        return prompt

    # ---- answers

    def generate_answers(
        self,
        conversations: Sequence[ConversationOrPrompt],
        task: Task,
        settings: GenerationSettings,
        opening: str = "",
        *,
        seeds: Sequence[int] | None = None,
        batch_size: int = BATCH,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[GeneratedAnswer]:
        """Answers to conversations, in batches, before image decoding."""
        check_value(int, batch_size, "batch_size", minimum=1)
        count = len(conversations)
        answers: list[GeneratedAnswer] = []
        log = self.log if count >= BAR_FROM else None
        with Progress(task, count, "answer", log=log) as bar:
            for start in range(0, count, batch_size):
                # 1. The ids of a batch, with the hidden states of its images (SEED-X).
                batch = slice(start, start + batch_size)
                batch_seeds = None if seeds is None else seeds[batch]
                turns = conversations[batch]
                encoder_seeds: Sequence[int | None] = batch_seeds or [settings.seed] * len(turns)
                prompts = self.prompts_of(turns, task, opening, encoder_seeds)
                states = HiddenStates()
                answer_ids = self.generate(
                    prompts,
                    settings,
                    task,
                    seeds=batch_seeds,
                    states=states,
                    should_stop=should_stop,
                )

                # 2. Their texts, and the inputs of their images.
                for row, (prompt, ids) in enumerate(zip(prompts, answer_ids, strict=True)):
                    answer = self.read_answer(ids, settings)
                    parts = [part for part in answer.parts if isinstance(part, ImagePart)]
                    image_inputs = self.image_inputs(parts, states, row) if parts else ()
                    answers.append(GeneratedAnswer(answer, image_inputs, prompt))
                bar.update(len(prompts))
        return answers

    def answer_likelihoods(
        self,
        conversations: Sequence[Sequence[Message]],
        answers: Sequence[Sequence[str]],
        task: Task,
        *,
        batch_size: int = BATCH,
    ) -> list[list[Likelihood]]:
        """How likely each of the given answers to each conversation is.

        A system that generates a verdict first (`TaskPrompts.answer_after`) answers after its own.
        """
        settings = self.settings(task, do_sample=False, num_beams=1)
        likelihoods: list[list[Likelihood]] = []
        for start in range(0, len(conversations), batch_size):
            turns = conversations[start : start + batch_size]
            prompts = self.build_prompts(turns, task, "", [settings.seed] * len(turns))
            if self.answer_after:
                verdicts = self.generate(prompts, settings, task)
                for row, (prompt, ids) in enumerate(zip(prompts, verdicts, strict=True)):
                    extended = [*prompt.ids, *self._verdict_ids(ids)]
                    prompts[row] = Prompt(extended, prompt.images)
            continuations: list[list[list[int]]] = []
            for texts in answers[start : start + batch_size]:
                continuations.append([self.tokenizer.encode(text) for text in texts])
            likelihoods += self.engine.likelihoods(prompts, continuations)
        return likelihoods

    def _verdict_ids(self, answer_ids: Sequence[int]) -> Sequence[int]:
        """The tokens of an answer up to the end of its verdict; none without one."""
        end = self.answer_after.rstrip()
        for length in range(1, len(answer_ids) + 1):
            if end in self.tokenizer.decode(answer_ids[:length]):
                return answer_ids[:length]
        return ()

    def generate_image_answers(
        self,
        conversations: Sequence[ConversationOrPrompt],
        task: Task,
        *,
        seeds: Sequence[int],
        batch_size: int = BATCH,
        should_stop: Callable[[], bool] | None = None,
        **options: object,
    ) -> list[GeneratedAnswer]:
        """Answers with one image, before decoding, after an optional text (`TaskPrompts`)."""
        # 1. The settings of an answer that is nothing but an image.
        settings = self.settings(task, **options)
        forced = self.forced(settings, options)
        image_length = self.tokenizer.vocabulary.tokens_per_image + 1  # codes and `</img>`
        forced = replace(forced, max_new_tokens=min(forced.max_new_tokens, image_length))

        # 2. A model that announces its image answers freely first, with tokens for the text.
        answers: dict[int, GeneratedAnswer] = {}
        text_length = self._text_tokens_before_image(task)
        if text_length:
            limit = forced.max_new_tokens + text_length
            if "max_new_tokens" in options:
                limit = settings.max_new_tokens
            free_answers = self.generate_answers(
                conversations,
                task,
                replace(forced, images="auto", max_new_tokens=limit),
                seeds=seeds,
                batch_size=batch_size,
                should_stop=should_stop,
            )
            for row, answer in enumerate(free_answers):
                if len(answer.image_inputs) == 1:
                    answers[row] = answer

        # 3. An image is forced where that gave none, or several.
        missing = [row for row in range(len(conversations)) if row not in answers]
        forced_answers = self.generate_answers(
            [conversations[row] for row in missing],
            task,
            forced,
            self.tasks.edit_response if task == "edit" else self.tasks.draw_response,
            seeds=[seeds[row] for row in missing],
            batch_size=batch_size,
            should_stop=should_stop,
        )
        answers |= zip(missing, forced_answers, strict=True)
        return [answers[row] for row in sorted(answers)]

    def _text_tokens_before_image(self, task: Task) -> int:
        """Tokens in which the model may say what an image will show, before the image is forced."""
        if task == "edit":
            return self.tasks.edit_words
        return self.tasks.draw_words if self.config.tuned else 0

    def _generate_several(
        self,
        conversations: Sequence[ConversationOrPrompt],
        task: Task,
        num_images: int,
        seeds: Sequence[int],
        options: Options,
        batch_size: int = BATCH,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[GeneratedAnswer]:
        """`num_images` answers to each conversation, with a seed each.

        With greedy settings the first is greedy and the others are sampled (`VARIATION`), unless
        `options` choose the decoding.
        """
        # 1. The rows of images that are decoded as `options` say, and of those that vary.
        rows = range(len(conversations) * num_images)
        plain_rows: Sequence[int] = rows
        varied_rows: Sequence[int] = ()
        if not self.settings(task, **options).samples:
            plain_rows = rows[::num_images]
            # Sampling changes codes; SEED-X's images depend only on the text before them.
            has_codes = not self.tokenizer.vocabulary.fixed_image_order
            can_vary = has_codes or self._text_tokens_before_image(task) > 0
            if can_vary and not VARIATION.keys() & options.keys():
                varied_rows = [row for row in rows if row % num_images]

        # 2. Their answers.
        answers: dict[int, GeneratedAnswer] = {}
        for part, decoding in ((plain_rows, options), (varied_rows, {**options, **VARIATION})):
            if not part:
                continue
            generated = self.generate_image_answers(
                [conversations[row // num_images] for row in part],
                task,
                seeds=[seeds[row] for row in part],
                batch_size=batch_size,
                should_stop=should_stop,
                **decoding,
            )
            answers |= zip(part, generated, strict=True)

        # 3. Images that cannot vary repeat the greedy answer.
        return [answers.get(row, answers[row - row % num_images]) for row in rows]
