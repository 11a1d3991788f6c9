"""SEED-X's classes with the original names and arguments, as its YAML files and programs use them.

visual_encoder = hydra.utils.instantiate(OmegaConf.load("configs/visual_encoder/qwen_vitg_448.yaml"))
agent = hydra.utils.instantiate(OmegaConf.load("configs/clm_models/agent_seed_x_i.yaml"), llm=llm)
output = agent.eval().to("cuda", dtype=torch.float16).generate(tokenizer=tokenizer, input_ids=ids, …)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.device import DTYPES
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import local_folder, locate
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.prompt import GenerationSettings, HiddenStates, Prompt
from seed_multimodal.language.llama import load_llm
from seed_multimodal.language.llama_tokenizer import LlamaTokenizer
from seed_multimodal.seed_x import modeling, original, vision
from seed_multimodal.seed_x.processing import answer_text, seed_x_vocabulary
from seed_multimodal.seed_x.views import AnyResolution, patch_positions

TOKENIZER_FILE = "configs/tokenizer/clm_llama_tokenizer_224loc_anyres.yaml"


# ---- vision encoder


class Resampler(vision.Resampler):
    """`src.models.tokenizer.qwen_visual.Resampler`; `norm_eps` is an addition."""

    def __init__(
        self,
        grid_size: int,
        embed_dim: int,
        num_heads: int,
        kv_dim: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(vision.ResamplerConfig(grid_size, embed_dim, num_heads, kv_dim, norm_eps))


class VisionTransformerWithAttnPool(vision.QwenVit):
    """`src.models.tokenizer.qwen_visual.VisionTransformerWithAttnPool`: `[B, 3, S, S]` → `[B, 256, 4096]`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_path: str | Path, **sizes: Any) -> Self:  # type: ignore[override]
        """The encoder in float32 on the CPU; a `config.json` next to the weights overrides the sizes."""
        part = original.vision_encoder(str(pretrained_model_path), **sizes)
        return super().from_pretrained(locate(part.path) or part.path, config=part.sizes)


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
    image_transform: Any,
    grid_pinpoints: Sequence[Sequence[int]],
    base_image_size: int,
) -> tuple[Tensor, Tensor]:
    """`src.data.any_res.process_anyres_image`: an image → its views `[V, 3, S, S]` (the whole last) and their centres
    `[V, 2]`; `grid_pinpoints`: (width, height) of each allowed grid in pixels."""
    grids = tuple(
        f"{width // base_image_size}x{height // base_image_size}"
        for width, height in grid_pinpoints
    )
    views = AnyResolution(base_image_size, grids)
    cut = [Image.fromarray(view.permute(1, 2, 0).numpy()) for view in views.cut(image)]
    return torch.stack([image_transform(view) for view in cut]), patch_positions(
        views.grid(image.size)
    )


# ---- language model


class LlamaForCausalLM:
    """`src.models.mllm.modeling_llama_xformer.LlamaForCausalLM`; what it loads is transformers' own LLaMA."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        torch_dtype: str | torch.dtype = "float32",
        low_cpu_mem_usage: bool = True,
    ) -> Any:
        """The language model on the CPU, in eval mode. Raises CheckpointError: missing or damaged files."""
        folder = local_folder(pretrained_model_name_or_path)
        if folder is None:
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: no such language model; pretrained/README.md "
                f"lists the original ones."
            )
        dtype = torch_dtype if isinstance(torch_dtype, torch.dtype) else DTYPES[torch_dtype]
        return load_llm(folder, dtype=dtype)


class ContinuousLVLM(modeling.ContinuousLVLM):
    """`src.models.mllm.seed_x.ContinuousLVLM`, the agent."""

    def __init__(
        self,
        llm: Any,
        input_resampler: nn.Module,
        output_resampler: nn.Module,
        lm_loss_scale: float = 1.0,
        rec_loss_scale: float = 1.0,
        add_patch_pos: bool = False,
        vit_down: bool = False,
        mse: bool = False,
    ) -> None:
        settings = modeling.AgentSettings(
            lm_loss_scale, rec_loss_scale, add_patch_pos, vit_down, mse
        )
        super().__init__(llm, input_resampler, output_resampler, settings)

    @classmethod
    def from_pretrained(
        cls,
        llm: Any,
        input_resampler: nn.Module,
        output_resampler: nn.Module,
        pretrained_model_path: str | Path | None = None,
        **settings: Any,
    ) -> Self:
        """The agent with the weights of a file, which may also hold those of a LoRA on `llm`; None: new ones.

        Raises:
            CheckpointError: missing, damaged or incomplete weights, or tensors of another size.
        """
        agent = cls(llm, input_resampler, output_resampler, **settings)
        if pretrained_model_path is not None:
            modeling.load_agent(agent, locate(pretrained_model_path) or pretrained_model_path)
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
        logits_processor: Any = None,
        num_img_gen_tokens: int = 64,
        temperature: float = 0.7,
        num_beams: int = 1,
        max_new_tokens: int = 120,
        top_p: float = 0.5,
        dtype: Any = None,
        device: Any = None,
        patch_positions: Tensor | None = None,
    ) -> dict[str, Any]:
        """The answer to one prompt, a text or ids `[1, L]`: `text`, `has_img_output`, `num_gen_imgs`, and
        `img_gen_feat` `[n, 64, K]` (None without images). Greedy, as originally: `temperature`, `top_p`,
        `logits_processor`, `dtype` and `device` have no effect.

        Args:
            image_embeds: features `[V, N, K]` of views; `embeds_cmp_mask` `[V]`: those that are read, `patch_positions`
                `[V, 2]`: their centres, `ids_cmp_mask` `[1, L]`: the tokens that they replace.

        Raises:
            ConfigError: another tokenizer, neither or both of prompt and ids, features without `patch_positions`.
            DataError: other numbers of features and tokens.
        """
        if not isinstance(tokenizer, LlamaTokenizer):
            raise ConfigError(
                f"generate needs the tokenizer of {TOKENIZER_FILE}, because {type(tokenizer).__name__} "
                f"splits text next to images differently than the model was trained with."
            )
        if (prompt is None) == (input_ids is None):
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
        ids = tokenizer.encode(prompt) if prompt is not None else input_ids.flatten().tolist()  # type: ignore[union-attr]

        embeds = None
        if image_embeds is not None:
            device = self.llm.get_input_embeddings().weight.device
            read = (
                torch.ones(len(image_embeds), dtype=torch.bool)
                if embeds_cmp_mask is None
                else embeds_cmp_mask.cpu()
            )
            mask = torch.zeros(1, len(ids)) if ids_cmp_mask is None else ids_cmp_mask
            centres = None if patch_positions is None else patch_positions.cpu()[read].to(device)
            embeds = self.embed(
                torch.tensor([ids], device=device),
                mask.bool().to(device),
                image_embeds[read.to(image_embeds.device)].to(device),
                centres,
            )[0]
        opened = (
            [vocabulary.boi_id] if ids[-1] == vocabulary.boi_id else []
        )  # the prompt ends in <img>
        settings = GenerationSettings(
            do_sample=False, num_beams=num_beams, max_new_tokens=max_new_tokens
        )
        states = HiddenStates()
        request = Prompt(ids) if embeds is None else Prompt.of_embeddings(embeds)
        request.answered = opened
        engine = Engine(
            TorchBackend(self.llm, max_rows=num_beams), tokenizer.text, original_constraints=True
        )
        answer = engine.generate([request], settings, states=states)[0]

        # Each image is 64 tokens before </img>; its features come from the states at these tokens.
        run = vocabulary.run()
        ends = [
            place for place in range(len(answer)) if answer[place + 1 - len(run) : place + 1] == run
        ]
        features = [
            self.output_features(states.at(0, range(end + 2 - len(run), end))[None]) for end in ends
        ]
        return {
            "text": answer_text(answer, tokenizer.text),
            "has_img_output": bool(ends),
            "num_gen_imgs": len(ends),
            "img_gen_feat": torch.cat(features) if features else None,
        }


__all__ = [
    "ContinuousLVLM",
    "DiscreteModleIdentity",
    "LlamaForCausalLM",
    "LlamaTokenizer",
    "Resampler",
    "VisionTransformerWithAttnPool",
    "process_anyres_image",
]
