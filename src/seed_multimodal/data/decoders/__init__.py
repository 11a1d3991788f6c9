"""Registry of decoders: record → training sequence.

    decoder = get_decoder("sft.qa", tokenizer, {"reverse_ratio": 0.5})
    sequence = decoder.decode(record.fields, SeededRandom(seed, source, position))

Ids, labels and random choices of `pretrain.*`, `sft.*` and `seed_x.*` equal the original data
modules', except for canned sentences that are not public (`phrases`). `chat`, `seed_x.chat` and
`lavit.*` are new.

base                   `Decoder`, `SeededRandom`, `TrainingSequence`
seed_llama_pretrain    `pretrain.*`
seed_llama_sft         `sft.*`, two of `pretrain.*`, and `chat`
features               base of the decoders of families: sequences with opened images as views
"""

from __future__ import annotations

import pkgutil

from seed_multimodal.data.decoders import seed_llama_pretrain as pretrain
from seed_multimodal.data.decoders import seed_llama_sft as sft
from seed_multimodal.data.decoders.base import Decoder, OptionValues
from seed_multimodal.data.decoders.features import FeatureDecoder
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.models.registry import families
from seed_multimodal.settings import nearest

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
        sft.Chat,
    )
}


def decoder_names() -> list[str]:
    """Names of all decoders: those above, then those of model families."""
    names = list(DECODERS)
    for spec in families():
        names += spec.decoders
    return names


def find_decoder(name: str) -> type[Decoder]:
    """The decoder with this name; of a family's, no other is imported.

    Raises ConfigError: unknown name.
    """
    if name in DECODERS:
        return DECODERS[name]
    for spec in families():
        if name in spec.decoders:
            decoder: type[Decoder] = pkgutil.resolve_name(spec.decoders[name])
            return decoder
    names = sorted(decoder_names())
    raise ConfigError(f"unknown decoder {name!r}{nearest(name, names)}; use {', '.join(names)}.")


def opens_images(name: str) -> bool:
    """Whether the images of a decoder's records are opened, and encoded during training."""
    return issubclass(find_decoder(name), FeatureDecoder)


def get_decoder(
    name: str, tokenizer: TextTokenizer, options: OptionValues | None = None
) -> Decoder:
    """The decoder with this name. Raises ConfigError: unknown name or option."""
    return find_decoder(name)(tokenizer, options or {})
