"""LaVIT's parts out of their files, checked to belong together."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from seed_multimodal.device import Runtime
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.lavit import LavitTokenizer
from seed_multimodal.language.llama import load_llm
from seed_multimodal.lavit.checkpoints import load_both, load_dynamic_tokenizer
from seed_multimodal.lavit.decoder import CodeDecoder
from seed_multimodal.lavit.diffusion import LavitDetokenizer
from seed_multimodal.lavit.modeling import DynamicTokenizer
from seed_multimodal.settings import check_keys
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.system.domain import load_domain
from seed_multimodal.systems.lavit_pictures import LavitPictures
from seed_multimodal.systems.picture_half import off_loaded

UNDERSTANDING, GENERATION = "understanding", "generation"
MODES = (UNDERSTANDING, GENERATION)


def load_language(spec: SystemConfig, runtime: Runtime, quantization: str | None = None,
                  offload_llm: bool = False) -> tuple[LavitTokenizer, Any]:
    """The text tokenizer and the language model.

    Raises:
        CheckpointError: missing or damaged files, or a language model with too few words.
    """
    spec.require("llm", "words")
    assert spec.llm is not None
    words = LavitTokenizer.from_pretrained(spec.words or spec.llm)
    llm = load_llm(spec.llm, device="cpu" if offload_llm else runtime.device, dtype=runtime.dtype,
                   quantization=quantization)
    words.vocabulary.check_rows(llm.config.vocab_size, spec.llm)
    return words, llm


def load_tokenizers(spec: SystemConfig, here: Runtime, modes: Collection[str],
                    offload: bool = False) -> tuple[DynamicTokenizer | None, DynamicTokenizer | None]:
    """(whose codes are drawn, which the language model sees with), of the `modes` that the folder has; they share all
    but the merger. None: not there.

    Raises:
        CheckpointError: missing or damaged files.
    """
    spec.require("tokenizer")
    assert spec.tokenizer is not None
    check_keys((modes,) if isinstance(modes, str) else modes, MODES, "modes")
    if not modes:
        raise ConfigError(f"A system is opened for one of {', '.join(MODES)} at least.")
    options: dict[str, Any] = {"device": "cpu" if offload else here.device, "dtype": here.dtype,
                               "config": spec.sizes.get("tokenizer")}
    if spec.original and spec.llm:
        options["language_model"] = str(spec.llm.resolve())
    reads = UNDERSTANDING in modes and spec.has("understanding")
    if reads and GENERATION in modes:
        writer, reader = load_both(spec.tokenizer, **options)
    elif reads:
        writer, reader = None, load_dynamic_tokenizer(spec.tokenizer, True, **options)
    else:
        writer, reader = load_dynamic_tokenizer(spec.tokenizer, False, **options), None
    return writer, reader if reader is not None and reader.vit_proj is not None else None


def load_pictures(spec: SystemConfig, here: Runtime, there: Runtime, modes: Collection[str] = MODES,
                  offload: bool | Collection[str] = False, check_safety: bool = False) -> LavitPictures:
    """The picture half: the tokenizers now, the decoders when they are first needed.

    Args:
        here, there: where pictures are read and drawn.
        modes: of `MODES`, what it is for.

    Raises:
        CheckpointError: missing or damaged files.
    """
    leaves = off_loaded(offload)
    writer, reader = load_tokenizers(spec, here, modes, "encoder" in leaves)
    load = partial(open_drawer, spec, there, check_safety) if GENERATION in modes else None
    half = LavitPictures(writer, reader, selection=spec.selection, load_decoder=load,
                         device=here.device, drawing_device=there.device, offload_encoder="encoder" in leaves,
                         offload_decoder="decoder" in leaves)
    half.domain = load_domain(spec.domain, spec.domain_threshold)
    return half


def open_drawer(spec: SystemConfig, there: Runtime, check_safety: bool = False) -> LavitDetokenizer:
    """Both decoders, on the CPU.

    Raises:
        CheckpointError: missing or damaged files, or parts of different sizes.
    """
    spec.require("decoder", "pixels")
    assert spec.decoder is not None and spec.pixels is not None
    decoder = CodeDecoder.from_pretrained(spec.decoder, head=spec.head, config=spec.sizes.get("decoder"),
                                          dtype=there.dtype)
    return LavitDetokenizer.from_pretrained(spec.pixels, decoder, dtype=there.dtype, check_safety=check_safety,
                                            safety=spec.safety)


def check_belonging(spec: SystemConfig, words: LavitTokenizer, llm: Any, pictures: LavitPictures) -> None:
    """Refuse parts of different sizes (`CheckpointError`)."""
    for model in filter(None, (pictures.writer, pictures.reader)):
        here, there = (words.vocabulary.n_codes, words.vocabulary.tokens_per_image), (
            model.config.codebook_size, model.config.patches)
        if here != there:
            raise CheckpointError(f"{spec.tokenizer}: its codebook has {there[0]} codes and a picture {there[1]} "
                                  f"patches, but the language model's words are made for {here[0]} and {here[1]}; they "
                                  f"do not belong together.")
    reader = pictures.reader
    if reader is not None and reader.vit_proj is not None and reader.vit_proj.out_features != llm.config.hidden_size:
        raise CheckpointError(f"{spec.tokenizer}: its rows have width {reader.vit_proj.out_features}, but the language "
                              f"model {spec.llm} reads width {llm.config.hidden_size}; they do not belong together.")


