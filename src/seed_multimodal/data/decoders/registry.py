"""Records -> token sequences, by the name of the decoder.

    decoder = get_decoder("sft.qa", tokenizer, {"reverse_ratio": 0.5})
    sequence = decoder(record.fields, SeededDraws(seed, source, position))      # TokenSequence, or None: dropped

`pretrain.*` and `sft.*` are the decoders of the released data modules: ids, labels and the draws they make, in their
order, are the released ones, but for the sentences that a drawn place takes from a list, which are known in part
(`phrases` says which are ours). `chat` is ours. `seed_x.*` and `lavit.*` have pictures that are opened beside the
record (`opened`). A dropped sample leaves its reason in `decoder.reason`; a broken record raises a `BadRecord` (a
DataError) whose sentence starts with the field, ready for "FILE: sample KEY: " in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seed_multimodal.data.decoders import lavit, pretrain, pretrain_context, seed_x, sft, sft_dialogues, turns
from seed_multimodal.data.decoders.base import CODE_FIELDS, Decoder
from seed_multimodal.data.decoders.chat import Chat
from seed_multimodal.data.decoders.sequence import Draws
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.settings import nearest

DECODERS: dict[str, type[Decoder]] = {decoder.name: decoder for decoder in (
    pretrain.Caption, pretrain.Interleaved, pretrain.Video, pretrain.Text, pretrain.Edit, pretrain_context.Retrieval,
    pretrain_context.CaptionEval, turns.VisualQuestion, turns.TextConversation,
    sft.QuestionAnswer, sft.Edit, sft.Story, sft.Difference, sft_dialogues.Conversation, sft_dialogues.Video,
    sft_dialogues.VideoConversation, sft.MultiEdit, sft.Interleaved, turns.VisualQuestionTuned,
    turns.TextConversationTuned, Chat)}

# Of pictures that are opened before; never guessed.
FEATURE_DECODERS: dict[str, type[Decoder]] = {decoder.name: decoder for decoder in (
    seed_x.Conversation, seed_x.Caption, seed_x.Edit, seed_x.Chat, lavit.Caption, lavit.Question, lavit.Compose)}

# In the order of guessing: the first that fits. The others need the same fields as one of these.
GUESSED = ("chat", "sft.edit", "sft.story", "sft.multi_edit", "pretrain.retrieval", "pretrain.interleaved",
           "sft.visual_question", "sft.conversation", "sft.video", "sft.qa", "pretrain.video", "pretrain.caption",
           "sft.interleaved", "sft.text_conversation", "pretrain.text")


def guess_decoder(fields: Mapping[str, Any], tokens_per_image: int = 0) -> type[Decoder] | None:
    """The decoder whose fields a record has, None for unknown ones; `tokens_per_image` 0: not known."""
    several = len(_flat(fields.get("image_ids"))) > tokens_per_image if tokens_per_image else None
    return next((DECODERS[name] for name in GUESSED if DECODERS[name].fits(fields, several)), None)


def _flat(value: Any) -> list[Any]:
    if not isinstance(value, list):
        return []
    if not any(isinstance(one, list) for one in value):
        return value
    return [code for one in value if isinstance(one, list) for code in one]


def get_decoder(name: str, tokenizer: MultimodalTokenizer, options: Mapping[str, Any] | None = None) -> Decoder:
    """The decoder of a name; sizes (codes of a picture, codebook) are those of `tokenizer.vocabulary`.

    Raises:
        ConfigError: an unknown name or option (the nearest is named), or an option of the wrong type.
    """
    known = DECODERS | FEATURE_DECODERS
    if name not in known:
        raise ConfigError(f"There is no decoder {name!r}{nearest(name, known)}; use {', '.join(sorted(known))}.")
    return known[name](tokenizer, options or {})


def some_picture(fields: Mapping[str, Any], draws: Draws, tokens_per_image: int) -> list[int] | None:
    """The codes of a picture of a record, one of them drawn (and one of its views); None where it has no picture.

    Use: a `noise_source` draws a record and gives this.
    """
    views = fields.get("views")
    found: list[Any] = [views] if views else []
    for name in CODE_FIELDS:
        value = fields.get(name)
        if not isinstance(value, list | tuple) or (views and name == "image_ids"):
            continue
        if value and all(isinstance(code, int) for code in value):
            found += [value[start:start + tokens_per_image] for start in range(0, len(value), tokens_per_image)]
        else:
            found += [codes for codes in value if codes]
    messages = fields.get("messages")
    for message in messages if isinstance(messages, list | tuple) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list | tuple) else []
        found += [part["codes"] for part in parts if isinstance(part, Mapping) and part.get("codes")]
    if not found:
        return None
    codes = draws.choice(found) if len(found) > 1 else found[0]
    if isinstance(codes, list | tuple) and codes and isinstance(codes[0], list | tuple):
        codes = draws.choice(codes) if len(codes) > 1 else codes[0]
    if not isinstance(codes, list | tuple) or any(type(code) is not int for code in codes):
        return None  # broken: reported when that record itself is read
    return list(codes) or None
