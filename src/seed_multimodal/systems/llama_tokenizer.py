"""The original's tokenizer object: text ↔ ids as a slow LLaMA tokenizer, and pictures ↔ codes.

    tokenizer = SeedLlamaTokenizer.from_pretrained("pretrained/seed_tokenizer", diffusion_path=FOLDER)
    codes = tokenizer.encode_image(image_path="cat.jpg")                 # [1, 32]
    pictures = tokenizer.decode_image(codes, negative_indices=other)     # [PIL]
    ids = tokenizer(tokenizer.bos_token + "USER: hello", add_special_tokens=False, return_tensors="pt").input_ids

Members, defaults and results are those of the original; what transformers' class has beyond them is not here. Different
from it: pictures of any mode and batches of any size work, drawing is seeded, the drawing half loads on first use, `to`
gives the object back, and refusals are sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.device import RELEASED_FP16, choose_device
from seed_multimodal.errors import CheckpointError, CodesError, ConfigError, first_line
from seed_multimodal.hub import PARTS, local_folder, not_on_disk
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.settings import check_value
from seed_multimodal.systems.picture_half import Picture
from seed_multimodal.systems.pictures import Codes, PictureCodec, open_codec

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchEncoding

YAML_RUNS = "of the shipped ones `--tokenizer configs/tokenizer/nano.yaml`, in MultiModalLLM, runs now"


class SeedLlamaTokenizer:
    """`text`: the words; `pictures`: the codes; both can be used by themselves.

    Attributes:
        fp16: whether half precision was asked for (where `device` computes it).
        pad_token: `<unk>`, as released; may be set to another word.
    """

    bos_token, eos_token, unk_token = "<s>", "</s>", "<unk>"
    padding_side, truncation_side = "right", "right"
    add_bos_token, add_eos_token = True, False

    def __init__(self, text: MultimodalTokenizer, pictures: PictureCodec, *, fp16: bool = True) -> None:
        self.text, self.pictures, self.fp16 = text, pictures, fp16
        self.pad_token = self.unk_token
        self.processor = seed_image_processor(pictures.model.config.vit.image_size)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, fp16: bool = True, load_diffusion: bool = False,
        encoder_url: str | None = None, diffusion_path: str | None = None, device: str = "auto", dtype: Any = "auto",
    ) -> SeedLlamaTokenizer:
        """The released SEED-2 tokenizer from a folder (or a hub name whose files are in the local cache).

        Args:
            fp16: float16 on CUDA devices (CPUs compute in float32, where half precision is slow); False: float32.
            load_diffusion: load the drawing half now rather than when the first picture is drawn.
            encoder_url: where the original downloaded `seed_quantizer.pt` from; the file in the folder is used.
            diffusion_path: diffusers folder or hub name; default: the folder's `diffusion_model`, else
                `pretrained/stable-diffusion-2-1-unclip`.
            dtype: a precision, whatever `fp16` says.

        Raises:
            CheckpointError: a part that is not there: what to download and where to put it.
        """
        folder = local_folder(pretrained_model_name_or_path)
        if folder is None:
            raise CheckpointError(f"{not_on_disk([('tokenizer', pretrained_model_name_or_path)])}; {YAML_RUNS}.")
        inside = folder / "diffusion_model"
        drawing = diffusion_path or (inside if inside.is_dir() else PARTS["unclip"].folder)
        runtime = choose_device(device, "float32" if dtype == "auto" and not fp16 else dtype, fp16=RELEASED_FP16)
        codec = open_codec(folder, detokenizer=local_folder(drawing) or Path(drawing), device=runtime.device,
                           transform={"type": "clip", "keep_ratio": False}, dtype=runtime.dtype)
        if load_diffusion:
            _ = codec.decoder
        return cls(MultimodalTokenizer.from_pretrained(folder), codec, fp16=fp16)

    # ---- pictures ⇄ codes

    @property
    def num_image_tokens(self) -> int:
        """How many codes there are (8192 in the released tokenizer)."""
        return self.text.vocabulary.n_codes

    @property
    def image_tokenizer(self) -> PictureCodec:
        """The picture half; its `model` is the tokenizer's network."""
        return self.pictures

    @property
    def device(self) -> torch.device:
        """Where pictures are read and drawn."""
        return self.pictures.device

    def to(self, device: str | torch.device) -> SeedLlamaTokenizer:
        """Move the picture half, the drawing model too; returns self (the original returns None)."""
        self.pictures.to(choose_device(device, torch.float32, log=None).device)
        return self

    def encode_image(self, image_path: Picture | None = None, image_pil: Image | None = None,
                     image_torch: Tensor | None = None, image_size: int | None = None) -> Tensor:
        """Exactly one of a file, a picture and pixels → codes, int64 on the tokenizer's device.

        Args:
            image_path, image_pil: squashed to the tower's size (bicubic) → `[1, 32]`.
            image_torch: normalised pixels `[3, S, S]` → `[1, 32]`, or `[B, 3, S, S]` → `[B, 32]`; on any device.
            image_size: without effect, as in the original.

        Raises:
            ConfigError: none or several given. ImageError: a picture that cannot be read, pixels of another shape.
        """
        given = [value for value in (image_path, image_pil, image_torch) if value is not None]
        if len(given) != 1:
            raise ConfigError(f"encode_image takes exactly one of image_path, image_pil and image_torch, not "
                              f"{len(given)}.")
        if image_torch is None:
            image_torch = self.processor(self.pictures.open(given[0]))
        pixels = image_torch if image_torch.ndim == 4 else image_torch[None]
        return self.pictures.encode(pixels).to(self.device)

    def decode_image(self, indices: Codes | Sequence[Sequence[int]],
                     negative_indices: Codes | Sequence[Sequence[int]] | None = None,
                     guidance_scale: float | None = None, num_inference_steps: int | None = None, *,
                     seed: int | Sequence[int] = 0, **decode: Any) -> list[Image]:
        """Codes `[B, 32]` (or one row of 32) → B pictures.

        Args:
            negative_indices: codes of what to steer away from, one row for all pictures or one for each.
            guidance_scale, num_inference_steps: None: the de-tokenizer's own (released: 10 and 20).
            seed: of the noise, one for all pictures or one each.
            decode: further settings of the de-tokenizer (`noise_level`, `scheduler`).
        """
        return self.pictures.draw(indices, negative_codes=negative_indices, guidance_scale=guidance_scale,
                                  num_inference_steps=num_inference_steps, seed=seed, **decode)

    # ---- text ⇄ ids

    @property
    def vocab_size(self) -> int:
        """Words of the text alone, without the image words."""
        return self.text.vocabulary.n_text

    @property
    def bos_token_id(self) -> int:
        """Id of `bos_token`; `eos_token_id`, `unk_token_id` and `pad_token_id` likewise."""
        return self.text.word_id(self.bos_token)

    @property
    def eos_token_id(self) -> int:
        """Id of `eos_token`."""
        return self.text.word_id(self.eos_token)

    @property
    def unk_token_id(self) -> int:
        """Id of `unk_token`."""
        return self.text.word_id(self.unk_token)

    @property
    def pad_token_id(self) -> int:
        """Id of `pad_token`."""
        return self.text.word_id(self.pad_token)

    def __len__(self) -> int:
        return len(self.text)

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True, padding: bool | str = False,
                 truncation: bool = False, max_length: int | None = None,
                 return_tensors: str | None = None) -> BatchEncoding:
        """Text, or several → `input_ids` and `attention_mask`, with control words in the text taken as such.

        Args:
            padding: False; True or "longest"; "max_length".
            return_tensors: "pt" or "np", for one text with a batch axis; None: lists.
        """
        from transformers import BatchEncoding

        check_value(str | Sequence[str], text, "text")
        check_value(Literal[False, True, "longest", "max_length"], padding, "padding")
        check_value(bool, truncation, "truncation")
        check_value(int | None, max_length, "max_length", least=0)
        check_value(Literal["pt", "np"] | None, return_tensors, "return_tensors")
        if (truncation or padding == "max_length") and max_length is None:
            raise ConfigError("truncation and padding='max_length' need max_length.")
        several = not isinstance(text, str)
        texts = [text] if isinstance(text, str) else text
        rows = [self.encode(one, add_special_tokens)[:max_length if truncation else None] for one in texts]
        if padding is not False:
            length = max_length if padding == "max_length" else max(map(len, rows), default=0)
            filled = [[self.pad_token_id] * ((length or 0) - len(row)) for row in rows]
        else:
            filled = [[] for _ in rows]
        left = self.padding_side == "left"
        ids = [pad + row if left else row + pad for row, pad in zip(rows, filled, strict=True)]
        mask = [[0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad)
                for row, pad in zip(rows, filled, strict=True)]
        if return_tensors is not None and len({len(row) for row in ids}) > 1:
            raise ConfigError("Texts of different lengths make no tensor: give padding=True.")
        whole = several or return_tensors is not None
        return BatchEncoding({"input_ids": ids if whole else ids[0], "attention_mask": mask if whole else mask[0]},
                             tensor_type=return_tensors)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text → ids; `add_special_tokens` puts `<s>` in front."""
        return self.text.encode(text, add_bos=add_special_tokens)

    def decode(self, token_ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """Ids → text."""
        if isinstance(token_ids, Tensor | np.ndarray):
            token_ids = token_ids.flatten().tolist()
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self.text.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Iterable[Iterable[int]], skip_special_tokens: bool = False) -> list[str]:
        """Rows of ids → texts."""
        try:
            rows = list(sequences)
        except TypeError as error:
            raise CodesError(f"batch_decode takes rows of token ids ({first_line(error)}).") from error
        return [self.decode(row, skip_special_tokens) for row in rows]

    def tokenize(self, text: str) -> list[str]:
        """Text → its pieces and words (`▁hell`, `<img_00005>`)."""
        return self.text.tokens(self.text.encode(text))

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Pieces or words → ids; what is none is `<unk>`."""
        if isinstance(tokens, str):
            return self.text.word_id(tokens)
        return [self.text.word_id(token) for token in check_value(Sequence[str], tokens, "tokens")]

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | list[str]:
        """Ids → pieces or words."""
        return self.text.tokens([ids])[0] if isinstance(ids, int) else self.text.tokens(ids)
