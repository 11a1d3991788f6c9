"""LaVIT's dynamic tokenizer: a picture becomes as many tokens as there is to see.

    pixels ─ EVA ViT ─► patch features ─ selector ─► kept patches ─ merger ─► rows ─┬─ projector ─► continuous (reading)
                                                                                    └─ quantiser ─► codes      (drawing)

    tokenizer = load_dynamic_tokenizer(folder, understanding=False)        # lavit_files.py
    codes = tokenizer.encode(tokenizer.pixels([picture]), mode="threshold")      # [LongTensor[n]], 0 … K − 1

Notes: the tower is used without its final norm, and its class token is dropped. Language models read the continuous
rows and write codes; the released model has another merger for either (`lavit_files.py`). With half-precision layers
everything runs under autocast and the residual streams stay fp32, as released; but codes are compared in fp32 (the
released comparison in bf16 changes some codes). Patches stay in raster order.

Source: specification §1 and §2; parameter names are the released ones. Shape suffixes: B batch, N patches, D vision
width, T rows of all pictures, C code width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, CodesError, ConfigError
from seed_multimodal.finite import not_numbers
from seed_multimodal.images.transforms import ImageTransform, seed_image_processor
from seed_multimodal.nn.eva import EvaConfig, EvaVit
from seed_multimodal.nn.layers import LayerNorm
from seed_multimodal.nn.quantizer import VectorQuantizer
from seed_multimodal.settings import read_settings, setting
from seed_multimodal.tokenizers.lavit_merger import Merger
from seed_multimodal.tokenizers.lavit_selector import Generators, Selection, Selector, choose
from seed_multimodal.weights import LoadReport

__all__ = ["DynamicTokenizer", "LavitTokenizerConfig", "Selection", "as_nested", "kept_rows", "padded"]

MODEL_TYPE = "lavit_tokenizer"


@dataclass(frozen=True)
class LavitTokenizerConfig:
    """Sizes of the dynamic tokenizer; the defaults are the released ones.

    `vit_head`: width of the tower's classification head, which the released file holds with a final norm and nothing
    uses; 0: neither is there. `llm_width`: of the language model that reads the continuous rows. `grad_checkpoint`: the
    merger's blocks are computed again going backward (otherwise they keep about 600 MB a picture at full size).
    """

    vit: EvaConfig = field(default_factory=lambda: EvaConfig(depth=40))
    vit_head: int = setting(1024, least=0)
    merger_depth: int = setting(12, least=1)
    merger_heads: int = setting(16, least=1)
    merger_mlp_width: int = setting(6144, least=1)
    codebook_size: int = setting(16384, least=1)
    codebook_dim: int = setting(32, least=1)
    llm_width: int = setting(4096, least=1)
    grad_checkpoint: bool = False

    @property
    def patches(self) -> int:
        """Patches of a picture, the most tokens that it can have."""
        return self.vit.grid**2

    def to_dict(self) -> dict[str, object]:
        """Plain values for `config.json`."""
        return {"model_type": MODEL_TYPE, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str | Path = "config.json") -> LavitTokenizerConfig:
        """Inverse of `to_dict`; an unknown key is a `ConfigError` that names the nearest known one."""
        values = dict(values)
        if values.pop("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise ConfigError(f"{source}: this is not the configuration of a LaVIT tokenizer.")
        return read_settings(cls, values, str(source))

    @classmethod
    def read(cls, file: Path) -> LavitTokenizerConfig:
        """Read `config.json`; raises `ConfigError` when it is damaged or describes another model."""
        return cls.from_dict(read_json_object(file, ConfigError), file)


class LavitVit(EvaVit):
    """The tower as LaVIT uses it: all blocks, an fp32 residual stream, no final norm; norm and head are kept so that
    the released file is complete."""

    def __init__(self, config: EvaConfig, head_width: int) -> None:
        super().__init__(config)
        if head_width:
            self.norm = LayerNorm(config.width, eps=1e-6)
            self.head = nn.Linear(config.width, head_width)


class DynamicTokenizer(nn.Module):
    """Pixels → a list with one entry a picture, of as many rows or codes as its picture needs.

    Args:
        ema_decay: moving-average codebook, for training.

    Attributes:
        vit_proj: to the language model's width; None where the weights hold none (drawing only).
        load_reports: what the loader read from which file.
    """

    def __init__(self, config: LavitTokenizerConfig, *, ema_decay: float | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.vit.width
        self.encoder = LavitVit(config.vit, config.vit_head)
        self.token_predictor = Selector(width)
        self.causal_encoder = Merger(width, config.merger_depth, config.merger_heads, config.merger_mlp_width,
                                     grad_checkpoint=config.grad_checkpoint)
        self.quantize = VectorQuantizer(config.codebook_size, config.codebook_dim, unit_rows=True,
                                        ema_decay=ema_decay)
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(),
                                               nn.Linear(width, config.codebook_dim))
        self.vit_proj: nn.Linear | None = nn.Linear(width, config.llm_width)
        self.load_reports: list[LoadReport] = []

    @property
    def transform(self) -> ImageTransform:
        """A picture of any size → what the tower reads: squashed to its size, bicubic, CLIP's mean and deviation."""
        return seed_image_processor(self.config.vit.image_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encode_task_layer[0].weight.device

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size → `[B, 3, S, S]` on the model's device."""
        return self.transform.batch(pictures).to(self.device)

    # ---- the parts

    def patch_features(self, pixels_B3HW: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → the last block's patches `[B, N, D]`, fp32, without the class token.

        Raises:
            ImageError: for another image size than the tower's.
        """
        with self.precision():
            return self.encoder(pixels_B3HW)[:, 1:].float()

    def select(self, features_BND: Tensor, *, mode: str = "draw", generator: Generators = None,
               noise: Tensor | None = None, allow_empty: bool = False) -> Selection:
        """Which patches are kept; the arguments are those of `choose`. Differentiable (straight through)."""
        with self.precision():
            log_probs_BN2 = self._numbers(self.token_predictor(features_BND))
        return choose(log_probs_BN2, mode=mode, generator=generator, noise=noise, allow_empty=allow_empty)

    def merge(self, features_BND: Tensor, keep_BN: Tensor) -> Tensor:
        """Raw features `[B, N, D]`, kept or not `[B, N]` → `[B, N, D]`; only rows of kept patches mean something."""
        with self.precision():
            return self.causal_encoder(features_BND, keep_BN).float()

    def to_codebook(self, rows_TD: Tensor) -> Tensor:
        """Merged rows `[T, D]` → vectors that the codebook is asked about `[T, C]`, not normalised yet."""
        with self.precision():
            return self.encode_task_layer(rows_TD).float()

    def quantize_rows(self, rows_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Merged rows `[T, D]` → codes `[T]` int64, codebook rows `[T, C]` (no gradient to `rows_TD`)."""
        codes_T = self.quantize.nearest(self._numbers(self.to_codebook(rows_TD)))
        return codes_T, self._numbers(self.quantize.lookup(codes_T))

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes `[...]` int64 → their rows `[..., C]`.

        Raises:
            CodesError: a code outside the codebook.
        """
        size = self.config.codebook_size
        outside = codes[(codes < 0) | (codes >= size)]
        if len(outside):
            raise CodesError(f"The code {int(outside[0])} is not in the codebook, which has 0 to {size - 1}.")
        return self.quantize.lookup(codes)

    # ---- pictures to tokens

    def rows(self, pixels_B3HW: Tensor, **selection: Any) -> tuple[Tensor, Tensor]:
        """Pixels → merged rows of the kept patches of all pictures `[T, D]`, and how many each has `[B]` int64."""
        features_BND = self.patch_features(pixels_B3HW)
        keep_BN = self.select(features_BND, **selection).keep_BN
        return kept_rows(self.merge(features_BND, keep_BN), keep_BN)

    def continuous(self, pixels_B3HW: Tensor, **selection: Any) -> list[Tensor]:
        """Pixels → for each picture the rows that a language model reads, `[n_b, llm_width]`.

        Args:
            selection: as of `select`.

        Raises:
            CheckpointError: the weights hold no projector.
        """
        if self.vit_proj is None:
            raise CheckpointError("These tokenizer weights are for drawing alone: they hold no vit_proj; load them "
                                  "with understanding=True.")
        rows_TD, counts_B = self.rows(pixels_B3HW, **selection)
        with self.precision():
            return list(self.vit_proj(rows_TD).split(counts_B.tolist()))

    @torch.no_grad()
    def encode(self, pixels_B3HW: Tensor, **selection: Any) -> list[Tensor]:
        """Pixels → for each picture its codes `[n_b]` int64, 0 … codebook_size − 1; `selection` as of `select`."""
        rows_TD, counts_B = self.rows(pixels_B3HW, **selection)
        return list(self.quantize_rows(rows_TD)[0].split(counts_B.tolist()))

    def _numbers(self, values: Tensor) -> Tensor:
        """`values`; outside of training NaN and infinity are refused, which decisions and codes would hide."""
        if not self.training and not bool(torch.isfinite(values).all()):
            raise not_numbers("The image tokenizer", self)
        return values

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast to the layers' precision, if that is half; a surrounding autocast holds otherwise."""
        dtype = self.encode_task_layer[0].weight.dtype
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)


def kept_rows(merged_BND: Tensor, keep_BN: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, N, D]` → rows of kept patches in raster order `[T, D]`, and the number of each picture's `[B]` int64."""
    kept_BN = keep_BN > 0.5
    return merged_BND[kept_BN], kept_BN.sum(1)


def as_nested(parts: Sequence[Tensor]) -> Tensor:
    """Tensors `[n_b, …]` → one nested tensor `[B, n*, …]` (jagged layout)."""
    lengths_B = _lengths(parts)
    return torch.nested.nested_tensor_from_jagged(torch.cat(list(parts)), F.pad(lengths_B.cumsum(0), [1, 0]))


def padded(parts: Sequence[Tensor], value: float = 0) -> tuple[Tensor, Tensor]:
    """Tensors `[n_b, …]` → `[B, longest, …]` filled up with `value` at the end, and the lengths `[B]` int64."""
    return nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=value), _lengths(parts)


def _lengths(parts: Sequence[Tensor]) -> Tensor:
    return torch.tensor([len(part) for part in parts], device=parts[0].device)
