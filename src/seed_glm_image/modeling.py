"""GLM-Image's networks, by transformers' parts: the language model alone, and the image tokenizer.

A checkpoint of transformers' `GlmImageForConditionalGeneration` holds both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    GlmImageConfig,
    GlmImageTextConfig,
    GlmImageTextModel,
    GlmImageVisionModel,
    GlmImageVQVAE,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.glm_image.modeling_glm_image import GlmImagePreTrainedModel

from seed_glm_image.processing import PREVIEW
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.nn.pretrained import without_memory
from seed_multimodal.state_dicts import assign_strictly, load_checkpoint, tensors_below

TEXT_WEIGHTS = r"^model\.language_model\."
IMAGE_WEIGHTS = {"visual": "model.visual.", "vqmodel": "model.vqmodel."}


class GlmImageForCausalLM(GlmImagePreTrainedModel, GenerationMixin):
    """The language model with its head of codes; it reads text and codes, and writes codes.

    The entry points of the group `seed_multimodal.language_models` make it known.
    """

    config_class = GlmImageTextConfig
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012 (as transformers has it)
    _keys_to_ignore_on_load_unexpected = (r"^model\.visual\.", r"^model\.vqmodel\.")

    def __init__(self, config: GlmImageTextConfig) -> None:
        config.tie_word_embeddings = False  # which this part of the whole configuration lacks
        super().__init__(config)
        self.model = GlmImageTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vision_vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, source: Any, *arguments: Any, **options: Any) -> Any:
        """Of a folder of this class, or of the whole model."""
        names = {TEXT_WEIGHTS: "model."}
        return super().from_pretrained(source, *arguments, key_mapping=names, **options)

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """Raises ConfigError: transformers would count positions on one line."""
        raise ConfigError("GLM-Image's language model draws by MultimodalSystem.draw and edit.")

    def forward(self, input_ids: Tensor | None = None, **options: Any) -> CausalLMOutputWithPast:
        """Scores `[B, n, V]` of codes, image start and end; options: of `GlmImageTextModel`."""
        output = self.model(input_ids=input_ids, **options)
        return CausalLMOutputWithPast(logits=self.lm_head(output.last_hidden_state))


class CodeNetwork(nn.Module):
    """The image tokenizer: pixels → features of 16 pixels → the nearest codes."""

    def __init__(self, config: GlmImageConfig) -> None:
        super().__init__()
        self.visual = GlmImageVisionModel._from_config(config.vision_config)
        self.vqmodel = GlmImageVQVAE._from_config(config.vq_config)
        self.patch = int(config.vision_config.patch_size)
        self.n_codes = int(config.vq_config.num_embeddings)

    @classmethod
    def from_pretrained(
        cls, folder: Path, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Self:
        """Of the folder of the whole model. Raises CheckpointError: missing or damaged."""
        values = read_json_object(folder / "config.json", CheckpointError)
        for name in ("text_config", "vision_config", "vq_config"):
            if not isinstance(values.get(name), dict):
                # The library would take published sizes.
                raise CheckpointError(f"{folder}: config.json has no {name}.")
        try:
            config = GlmImageConfig.from_dict(values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}: is no GLM-Image ({first_line(error)}).") from error
        network = without_memory(lambda: cls(config)).to(dtype)
        tensors = load_checkpoint(folder)
        for name, prefix in IMAGE_WEIGHTS.items():
            state = tensors_below(tensors, prefix)
            assign_strictly(getattr(network, name), state, folder, device=device)
        return network.to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def codes(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Normalised pixels `[3, 16 h, 16 w]` of images of any sizes → their codes `[h, w]`."""
        # 1. All patches behind each other [N, 3 · 16 · 16], row by row.
        grids: list[tuple[int, int, int]] = []
        patches: list[Tensor] = []
        for pixels in images:
            _, height, width = pixels.shape
            grids.append((1, height // self.patch, width // self.patch))
            columns = F.unfold(pixels[None], self.patch, stride=self.patch)
            patches.append(columns[0].T)

        # 2. Their features, and the codes of each image.
        device = self.visual.device
        packed = torch.cat(patches).to(device, self.visual.dtype)
        grid_thw = torch.tensor(grids, device=device)
        features = self.visual(packed, grid_thw=grid_thw).last_hidden_state
        codes: list[Tensor] = []
        rows = features.split([height * width for _, height, width in grids])
        for (_, height, width), row in zip(grids, rows, strict=True):
            image = row.T.reshape(1, -1, height, width)
            codes.append(self.vqmodel.encode(image).image_tokens.view(height, width))
        return codes

    def encode(self, pixels: Tensor) -> Tensor:
        """Square images, normalised `[B, 3, S, S]` → the codes that an answer with each has: those
        of its preview, then its own, `[B, n]`."""
        side = PREVIEW * self.patch
        small = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
        rows = zip(self.codes(small), self.codes(pixels), strict=True)
        return torch.stack([torch.cat([first.flatten(), own.flatten()]) for first, own in rows])
