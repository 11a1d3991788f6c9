"""A GLM-Image of small random parts: for the whole recipe in minutes, and for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from seed_glm_image.processing import SIZE_END, SIZE_START
from seed_glm_image.spec import GlmImageConfig
from seed_multimodal.config import read_table
from seed_multimodal.device import seeded
from seed_multimodal.disk import replace_json
from seed_multimodal.progress import quiet_loading

N_CODES = 64  # published: 16384
START, END = N_CODES, N_CODES + 1
N_HEAD = N_CODES + 4  # rows of the head: codes, start, end, padding
PAD = "<|endoftext|>"
IMAGE = "<|image|>"
# Images in start and end tokens, then the text.
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    f"<|dit_token_{START}|>{IMAGE}<|dit_token_{END}|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def new_tokenizer() -> Any:
    """Bytes without merges, behind the codes, whose ids are the codes themselves."""
    from transformers import PreTrainedTokenizerFast

    codes = [f"<|dit_token_{index}|>" for index in range(N_HEAD)]
    special = [PAD, SIZE_START, SIZE_END, IMAGE]
    names = [*codes, *sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    backend = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*codes, *special])
    marks = {"image_token": IMAGE, "grid_bos_token": SIZE_START, "grid_eos_token": SIZE_END}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        pad_token=PAD,
        bos_token=codes[START],
        eos_token=codes[END],
        extra_special_tokens=marks,
    )


def tiny_parts(seed: int = 0) -> dict[str, Any]:
    """Arguments of diffusers' `GlmImagePipeline`, with random weights that make choices clear."""
    import diffusers
    import transformers
    from transformers.models.glm_image.image_processing_pil_glm_image import (
        GlmImageImageProcessorPil,
    )

    # 1. Sizes, and ids that follow from the tokenizer.
    sizes = read_table(__file__)
    words = new_tokenizer()
    llm = sizes["language_model"]
    pad = words.convert_tokens_to_ids(PAD)
    llm["text_config"] |= {
        "vocab_size": len(words),
        "vision_vocab_size": N_HEAD,
        "pad_token_id": pad,
        "eos_token_id": END,
    }
    llm["vq_config"]["num_embeddings"] = N_CODES
    config = transformers.GlmImageConfig(
        **llm,
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        image_start_token_id=START,
        image_end_token_id=END,
    )
    images = GlmImageImageProcessorPil(**sizes["image_processor"])

    # 2. The networks.
    with seeded(seed):
        whole = transformers.GlmImageForConditionalGeneration(config)
        transformer = diffusers.GlmImageTransformer2DModel(
            **sizes["transformer"], prior_vq_quantizer_codebook_size=N_CODES
        )
        for network, deviation in ((whole, 0.3), (transformer, 0.2)):
            for weight in network.parameters():
                if weight.ndim >= 2:
                    torch.nn.init.normal_(weight, 0, deviation)
        text_encoder = transformers.T5EncoderModel(transformers.T5Config(**sizes["text_encoder"]))
        vae = diffusers.AutoencoderKL(**sizes["vae"])
    return {
        "tokenizer": transformers.ByT5Tokenizer(),
        "processor": transformers.GlmImageProcessor(images, words, chat_template=TEMPLATE),
        "text_encoder": text_encoder.eval(),
        "vision_language_encoder": whole.eval(),
        "vae": vae.eval(),
        "transformer": transformer.eval(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**sizes["scheduler"]),
    }


def write_tiny(source: Path, target: Path) -> None:
    """Write a system's folder, for `seed init --like glm-image`; `source` is not read."""
    from diffusers import GlmImagePipeline

    with quiet_loading("diffusers", "transformers"):
        GlmImagePipeline(**tiny_parts()).save_pretrained(target)
    config = GlmImageConfig.recognise(target)
    assert config is not None
    paths = {
        key: getattr(config, key).relative_to(target)
        for key in config.parts()
        if getattr(config, key)
    }
    values = {key: str(path) for key, path in paths.items()}
    replace_json(target / "system.json", {"system": config.system, "side": 128, **values})
