"""A system from the released demo's three YAML files, for its server's `--image_transform --tokenizer --model`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from seed_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from seed_multimodal.systems.seed_llama import SeedLlama


def system_from_configs(
    *, model: str | Path, tokenizer: str | Path, image_transform: str | Path, llm_device: str = "auto",
    tokenizer_device: str = "auto", offload_encoder: bool = False, offload_decoder: bool = True,
) -> SeedLlama:
    """Build the parts the files describe and put them together.

    Raises:
        CheckpointError: weights that are not there (says what to download and where to put it); `ConfigError` for a
            file that is missing or builds something else.
    """
    from seed_multimodal.config import instantiate
    from seed_multimodal.configured import SeedLlamaTokenizer
    from seed_multimodal.language.tasks import RELEASED_TASKS
    from seed_multimodal.systems.loading import RELEASED_GENERATION, SystemSpec, template_for
    from seed_multimodal.systems.seed_llama import SeedLlama

    words = instantiate(tokenizer, device=tokenizer_device)
    if not isinstance(words, SeedLlamaTokenizer):
        raise ConfigError(f"{tokenizer}: describes a {type(words).__name__}, not a SEED tokenizer.")
    words.pictures.transform = instantiate(image_transform)
    words.pictures.offload(encoder=offload_encoder, decoder=offload_decoder)
    llm = instantiate(model, device_map=llm_device)
    spec = SystemSpec(name=str(model), tokenizer=Path(tokenizer), llm=Path(model), detokenizer=None,
                      template=template_for(llm.config.hidden_size), generation=dict(RELEASED_GENERATION),
                      tasks=RELEASED_TASKS)
    return SeedLlama(spec, words.text, llm, words.pictures)
