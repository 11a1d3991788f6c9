"""Answers by transformers' `generate`, the reference of the engine's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.prompt import GenerationSettings, Prompt, rows_end_at_stops
from seed_multimodal.inference.sampling import ImageConstraints
from seed_multimodal.language.vocabulary import ImageGrammar

GENERATION_SETTINGS = (
    "min_new_tokens",
    "repetition_penalty",
    "num_beams",
    "num_return_sequences",
    "length_penalty",
    "early_stopping",
)
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k")


def embeddings(llm, prompt: Prompt, ids: Sequence[int] = ()) -> Tensor:
    """Embeddings `[L, D]` of a prompt and `ids` behind it."""
    full_prompt = Prompt([*prompt.ids, *ids], prompt.images)
    return TorchBackend(llm, max_rows=1).prepare(full_prompt)


@torch.inference_mode()
def generate(
    llm,
    tokenizer,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """The ids of each answer, one prompt after the other, with `prompt.answered` and a forced
    `<img>` first."""
    answers = []
    for index, prompt in enumerate(prompts):
        seed = settings.seed if seeds is None else seeds[index]
        answers += _generate(llm, tokenizer, prompt, settings, seed)
    return answers


def _generate(
    llm,
    tokenizer,
    prompt: Prompt,
    settings: GenerationSettings,
    seed: int | None,
) -> list[list[int]]:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    vocabulary = tokenizer.vocabulary
    forced = [vocabulary.boi_id] if settings.images == "forced" else []
    initial_ids = [*prompt.answered, *forced]
    # The context limits the answer.
    embeds = embeddings(llm, prompt, forced)
    budget = min(settings.max_new_tokens, llm.config.max_position_embeddings - len(embeds))

    def is_complete(ids: Tensor, scores: object = None, **_) -> Tensor:
        return rows_end_at_stops(tokenizer, settings, ids, initial_ids)

    end_ids = [tokenizer.eos_token_id]
    processors = []
    if settings.constrain:
        start = ImageGrammar(vocabulary, budget, initial_ids=initial_ids)
        processors.append(ImageConstraints([start]))
    names = [*GENERATION_SETTINGS, *(SAMPLING_SETTINGS if settings.samples else ())]
    guidance = {}
    if settings.guidance != 1:
        negative = [prompt.negative or [vocabulary.boi_id]]
        guidance = {
            "guidance_scale": settings.guidance,
            "negative_prompt_ids": torch.tensor(negative),
        }
    # transformers makes the answers with these settings.
    config = GenerationConfig(
        max_new_tokens=budget,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_ids,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=settings.samples,
        **{name: getattr(settings, name) for name in names},
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed or 0)
        outputs = llm.generate(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([is_complete]),
            **guidance,
        ).tolist()
    answers = []
    for ids in outputs:
        length = len(ids)
        for count in range(1, len(ids) + 1):  # padding follows an end
            if ids[count - 1] in end_ids or is_complete(torch.tensor([ids[:count]])):
                length = count
                break
        answers.append([*initial_ids, *ids[:length]])
    return answers
