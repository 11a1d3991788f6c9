"""SEED-X's classes with the original names and arguments, as its YAML files and programs use them.

config = OmegaConf.load("configs/visual_encoder/qwen_vitg_448.yaml")
visual_encoder = hydra.utils.instantiate(config)
config = OmegaConf.load("configs/clm_models/agent_seed_x_i.yaml")
agent = hydra.utils.instantiate(config, llm=llm).eval().to("cuda", dtype=torch.float16)
output = agent.generate(tokenizer=tokenizer, input_ids=ids, …)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Self, TypedDict

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from seed_multimodal.compat.part_files import without_stray_key
from seed_multimodal.device import DTYPES
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.images.views import AnyResolution, patch_positions
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.prompt import GenerationSettings, Prompt
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.llama_tokenizer import LlamaTokenizer
from seed_multimodal.language.llm import load_llm
from seed_multimodal.models.seed_x import modeling
from seed_multimodal.models.seed_x.processing import answer_text, seed_x_vocabulary
from seed_multimodal.nn.vision import qwen as vision
from seed_multimodal.recipes.seed_x.losses import TrainedAgent
from seed_multimodal.settings import read_settings
from seed_multimodal.weights.find import find_path, locate_or_same

TOKENIZER_FILE = "configs/tokenizer/clm_llama_tokenizer_224loc_anyres.yaml"


# ---- vision encoder


class Resampler(vision.Resampler):
    """`src.models.tokenizer.qwen_visual.Resampler`; `norm_eps` is an addition."""

    __signature__ = signature(vision.ResamplerConfig)

    def __init__(self, *args: Any, **sizes: Any) -> None:
        super().__init__(vision.ResamplerConfig(*args, **sizes))


class VisionTransformerWithAttnPool(vision.QwenVit):
    """`src.models.tokenizer.qwen_visual.VisionTransformerWithAttnPool`.

    Pixels `[B, 3, S, S]` → features `[B, 256, 4096]`.
    """

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_path: str | Path, **sizes: Any
    ) -> Self:
        """The encoder in float32 on the CPU; a `config.json` next to the weights overrides the
        sizes."""
        config = read_settings(vision.QwenVitConfig, without_stray_key(sizes), "vision encoder")
        return super().from_pretrained(locate_or_same(pretrained_model_path), config=config)


class DiscreteModleIdentity(nn.Module):
    """`src.models.tokenizer.discrete_models.DiscreteModleIdentity`: features stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Identity()

    def encode_image_embeds(self, image_embeds: Tensor) -> Tensor:
        """The features."""
        return image_embeds


def process_anyres_image(
    image: Image.Image,
    image_transform: Callable[[Image.Image], Tensor],
    grid_pinpoints: Sequence[Sequence[int]],
    base_image_size: int,
) -> tuple[Tensor, Tensor]:
    """`src.data.any_res.process_anyres_image`: an image → its views `[V, 3, S, S]` (the whole image
    last) and their centres `[V, 2]`.

    grid_pinpoints: (width, height) of each allowed grid in pixels.
    """
    # Grids as columns x rows of views, such as `1x2`.
    grids = [
        f"{width // base_image_size}x{height // base_image_size}"
        for width, height in grid_pinpoints
    ]
    resolution = AnyResolution(base_image_size, tuple(grids))

    # The originals' transforms expect Pillow's images instead of uint8 [3, S, S].
    views = [
        image_transform(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
        for pixels in resolution.cut(image)
    ]
    return torch.stack(views), patch_positions(resolution.grid(image.size))


# ---- language model


class LlamaForCausalLM:
    """`src.models.mllm.modeling_llama_xformer.LlamaForCausalLM`; what it loads is transformers' own
    LLaMA."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        torch_dtype: str | torch.dtype = "float32",
        low_cpu_mem_usage: bool = True,
    ) -> PreTrainedModel:
        """The language model on the CPU, in eval mode. Raises CheckpointError: missing or damaged
        files."""
        folder = find_path(pretrained_model_name_or_path)
        if folder is None:
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: no such language model; pretrained/README.md "
                f"lists the original ones."
            )
        return load_llm(folder, dtype=DTYPES.get(torch_dtype, torch_dtype))


class AgentAnswer(TypedDict):
    """Result of `ContinuousLVLM.generate`."""

    text: str
    has_img_output: bool
    num_gen_imgs: int
    img_gen_feat: Tensor | None  # [n, 64, K]


@dataclass(frozen=True)
class _AgentSettings(modeling.AgentSettings):
    """The arguments of the original class with its defaults; the YAML files name other values."""

    rec_loss_scale: float = 1.0
    add_patch_pos: bool = False
    vit_down: bool = False
    mse: bool = False


class ContinuousLVLM(TrainedAgent):
    """`src.models.mllm.seed_x.ContinuousLVLM`, the agent."""

    def __init__(
        self,
        llm: PreTrainedModel,
        input_resampler: nn.Module,
        output_resampler: nn.Module,
        *args: Any,
        **settings: Any,
    ) -> None:
        super().__init__(llm, input_resampler, output_resampler, _AgentSettings(*args, **settings))

    @classmethod
    def from_pretrained(
        cls,
        llm: PreTrainedModel,
        input_resampler: nn.Module,
        output_resampler: nn.Module,
        pretrained_model_path: str | Path | None = None,
        **settings: Any,
    ) -> Self:
        """The agent with the weights of a file, which may also hold those of a LoRA on `llm`; None:
        new ones.

        Raises:
            CheckpointError: missing, damaged or incomplete weights, or tensors of another size.
        """
        agent = cls(llm, input_resampler, output_resampler, **settings)
        if pretrained_model_path is not None:
            modeling.load_agent(agent, locate_or_same(pretrained_model_path))
        return agent

    @torch.inference_mode()
    def generate(
        self,
        tokenizer: LlamaTokenizer,
        prompt: str | None = None,
        input_ids: Tensor | None = None,
        image_embeds: Tensor | None = None,
        embeds_cmp_mask: Tensor | None = None,
        ids_cmp_mask: Tensor | None = None,
        logits_processor: object = None,
        num_img_gen_tokens: int = 64,
        temperature: float = 0.7,
        num_beams: int = 1,
        max_new_tokens: int = 120,
        top_p: float = 0.5,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        patch_positions: Tensor | None = None,
    ) -> AgentAnswer:
        """The answer to one prompt. Greedy, as originally: `temperature`, `top_p`,
        `logits_processor`, `dtype` and `device` have no effect.

        Args:
            prompt, input_ids: one of them: a text, or ids `[1, L]`.
            image_embeds: features `[V, N, K]` of views.
            embeds_cmp_mask: `[V]`: the views that are read.
            patch_positions: `[V, 2]`: the centres of the views.
            ids_cmp_mask: `[1, L]`: the tokens that features replace.

        Raises:
            ConfigError: another tokenizer, neither or both of prompt and ids, features without
                `patch_positions`.
            DataError: other numbers of features and tokens.
        """
        # 1. The prompt's ids, and what cannot be answered.
        if not isinstance(tokenizer, LlamaTokenizer):
            raise ConfigError(
                f"generate needs the tokenizer of {TOKENIZER_FILE}, because "
                f"{type(tokenizer).__name__} splits text next to images differently than the model "
                f"was trained with."
            )
        if prompt is not None and input_ids is None:
            ids = tokenizer.encode(prompt)
        elif prompt is None and input_ids is not None:
            ids = input_ids.flatten().tolist()
        else:
            raise ConfigError("generate needs either prompt or input_ids.")
        vocabulary = seed_x_vocabulary(tokenizer.text)
        if num_img_gen_tokens != vocabulary.tokens_per_image:
            raise ConfigError(
                f"num_img_gen_tokens is {num_img_gen_tokens}, but an image of this tokenizer has "
                f"{vocabulary.tokens_per_image}."
            )
        if image_embeds is not None and patch_positions is None and self.settings.add_patch_pos:
            raise ConfigError(
                "generate needs patch_positions, the centre (x, y) of each view in its image, with "
                "image_embeds: [0.5, 0.5] for a whole image."
            )

        # 2. The prompt: these ids, or embeddings with the images' features in them.
        if image_embeds is None:
            asked = Prompt(ids)
        else:
            embeds = self._embed_images(
                ids, ids_cmp_mask, image_embeds, embeds_cmp_mask, patch_positions
            )
            asked = Prompt.of_embeddings(embeds)
        if ids[-1] == vocabulary.boi_id:
            asked.answered = [vocabulary.boi_id]  # the answer begins inside an image

        # 3. The answer, and the features of its images.
        settings = GenerationSettings(
            do_sample=False, num_beams=num_beams, max_new_tokens=max_new_tokens
        )
        backend = TorchBackend(self.llm, max_rows=num_beams)
        engine = Engine(backend, tokenizer.text, original_constraints=True)
        [request] = engine.run([asked], settings)
        answer = request.answers[0]
        parts = [part for part in request.reader.parts if isinstance(part, ImagePart)]
        states = [request.states_at(part.positions) for part in parts]
        features = [self.output_features(image_states[None]) for image_states in states]
        return {
            "text": answer_text(answer, tokenizer.text),
            "has_img_output": bool(features),
            "num_gen_imgs": len(features),
            "img_gen_feat": torch.cat(features) if features else None,
        }

    def _embed_images(
        self,
        ids: list[int],
        ids_mask: Tensor | None,
        image_embeds: Tensor,
        views_mask: Tensor | None,
        patch_positions: Tensor | None,
    ) -> Tensor:
        """Embeddings `[L, D]` of a prompt; the arguments are those of `generate`."""
        device = self.llm.get_input_embeddings().weight.device
        # Without masks all views are read, and no token is replaced.
        if views_mask is None:
            views_mask = torch.ones(len(image_embeds), dtype=torch.bool)
        if ids_mask is None:
            ids_mask = torch.zeros(1, len(ids))
        views_mask = views_mask.cpu()  # [V]
        features = image_embeds[views_mask.to(image_embeds.device)].to(device)  # [v, N, K]
        centres = None
        if patch_positions is not None:
            centres = patch_positions.cpu()[views_mask].to(device)  # [v, 2]
        batch = torch.tensor([ids], device=device)  # [1, L]
        return self.embed(batch, ids_mask.bool().to(device), features, centres)[0]


__all__ = [
    "ContinuousLVLM",
    "DiscreteModleIdentity",
    "LlamaForCausalLM",
    "LlamaTokenizer",
    "Resampler",
    "VisionTransformerWithAttnPool",
    "process_anyres_image",
]
