"""Registry of decoders: record → training sequence.

    decoder = get_decoder("sft.qa", tokenizer, {"reverse_ratio": 0.5})
    sequence = decoder.decode(record.fields, SeededRandom(seed, source, position))

Ids, labels and random choices of `pretrain.*`, `sft.*` and `seed_x.*` equal the original data modules', except for
canned sentences that are not public (`phrases`). `chat`, `seed_x.chat` and `lavit.*` are new.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seed_multimodal.data.decoders import lavit, seed_x
from seed_multimodal.data.decoders import seed_llama_pretrain as pretrain
from seed_multimodal.data.decoders import seed_llama_sft as sft
from seed_multimodal.data.decoders.base import Decoder
from seed_multimodal.data.decoders.chat import Chat
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.settings import nearest

DECODERS: dict[str, type[Decoder]] = {
    decoder.name: decoder
    for decoder in (
        pretrain.Caption,
        pretrain.Interleaved,
        pretrain.Video,
        pretrain.Text,
        pretrain.Edit,
        sft.VisualQuestion,
        sft.TextConversation,
        sft.QuestionAnswer,
        sft.Edit,
        sft.MultiEdit,
        sft.Story,
        sft.Difference,
        sft.Interleaved,
        sft.Conversation,
        sft.Video,
        sft.VideoConversation,
        sft.VisualQuestionTuned,
        sft.TextConversationTuned,
        Chat,
    )
}
FEATURE_DECODERS: dict[str, type[Decoder]] = {
    decoder.name: decoder
    for decoder in (
        seed_x.Conversation,
        seed_x.Caption,
        seed_x.Edit,
        seed_x.Chat,
        lavit.Caption,
        lavit.Question,
        lavit.Compose,
    )
}


def get_decoder(
    name: str, tokenizer: MultimodalTokenizer, options: Mapping[str, Any] | None = None
) -> Decoder:
    """The decoder with this name. Raises ConfigError: unknown name or option."""
    known = DECODERS | FEATURE_DECODERS
    if name not in known:
        raise ConfigError(
            f"unknown decoder {name!r}{nearest(name, known)}; use {', '.join(sorted(known))}."
        )
    return known[name](tokenizer, options or {})
