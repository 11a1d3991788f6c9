"""Registry of decoders: record → training sequence.

    decoder = get_decoder("sft.qa", tokenizer, {"reverse_ratio": 0.5})
    sequence = decoder.decode(record.fields, SeededRandom(seed, source, position))

Ids, labels and random choices of `pretrain.*`, `sft.*` and `seed_x.*` equal the original data
modules', except for canned sentences that are not public (`phrases`). `chat`, `seed_x.chat` and
`lavit.*` are new.

base                   `Decoder`, `SeededRandom`, `TrainingSequence`
seed_llama_pretrain    `pretrain.*`
seed_llama_sft         `sft.*`, and two of `pretrain.*`
chat                   `chat`
seed_x, lavit          `seed_x.*`, `lavit.*`: sequences with opened images
"""

from __future__ import annotations

from seed_multimodal.data.decoders import seed_llama_pretrain as pretrain
from seed_multimodal.data.decoders import seed_llama_sft as sft
from seed_multimodal.data.decoders.base import Decoder, OptionValues, SeededRandom, TrainingSequence
from seed_multimodal.data.decoders.chat import Chat
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.models.lavit import data as lavit
from seed_multimodal.models.seed_x import data as seed_x
from seed_multimodal.settings import nearest

__all__ = [
    "ALL_DECODERS",
    "DECODERS",
    "FEATURE_DECODERS",
    "Decoder",
    "SeededRandom",
    "TrainingSequence",
    "get_decoder",
]

# Images are codes.
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
# Images are opened with the record, and encoded during training.
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

ALL_DECODERS = DECODERS | FEATURE_DECODERS


def get_decoder(
    name: str, tokenizer: MultimodalTokenizer, options: OptionValues | None = None
) -> Decoder:
    """The decoder with this name. Raises ConfigError: unknown name or option."""
    if name not in ALL_DECODERS:
        names = sorted(ALL_DECODERS)
        raise ConfigError(
            f"unknown decoder {name!r}{nearest(name, names)}; use {', '.join(names)}."
        )
    return ALL_DECODERS[name](tokenizer, options or {})
