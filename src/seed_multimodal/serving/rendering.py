"""From generated token ids to the JSON answer: our rendering, and the released server's own for parity.

`render_answer` walks the ids once and guarantees that the text holds exactly one `<image>` per entry of `images`.
`render_original` repeats the released server: brackets are paired by position, the text is found by string replacement,
so a picture at the very end of the ids stays `<img> </img>` (no `<image>` for it) and text before the end token gains a
blank. Both report broken pictures in `error_msg` and keep their place with `""`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from PIL import Image

from seed_multimodal.errors import CodesError, GenerationError
from seed_multimodal.images.io import image_to_base64
from seed_multimodal.language.answer import BrokenImagePart, ImagePart, TextPart, split_answer
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.serving.schema import GenerateResponse

if TYPE_CHECKING:
    from seed_multimodal.language.tokenizer import MultimodalTokenizer

Draw = Callable[[ImagePart], Image.Image]

# Spelling of the released server: clients compare these sentences.
COUNT_MESSAGE = ("Num of BOI (begain of image) tokens: {boi} is not equal to EOI(end of image tokens): {eoi}, "
                 "some image Some images will fail to decode.")
LENGTH_MESSAGE = "Len(image_ids) {found} is not equal to {expected}"
RANGE_MESSAGE = "Some image_id out of range: [0, {n_codes})"


def render_answer(ids: list[int], tokenizer: MultimodalTokenizer, draw: Draw) -> GenerateResponse:
    """`ids` (generated ones only) as text and pictures in order; `draw` draws a whole one.

    Where pictures have no codes, None stands for those of a drawn one: clients send it again as a picture.
    """
    response = GenerateResponse()
    pieces: list[str] = []
    for part in split_answer(ids, tokenizer):
        if isinstance(part, TextPart):
            # The model may spell the placeholder in ordinary letters: it must not count as a picture.
            pieces.append(part.text.replace(PLACEHOLDER, "<image >").strip())
            continue
        pieces.append(PLACEHOLDER)
        if isinstance(part, ImagePart):
            response.images.append(_drawn(part, draw, response))
            known = not (tokenizer.vocabulary.in_order and response.images[-1])
            response.images_ids.append(list(part.codes) if known else None)
        else:
            assert isinstance(part, BrokenImagePart)
            response.images_ids.append([i - tokenizer.vocabulary.code_start for i in part.ids
                                        if tokenizer.vocabulary.is_code_id(i)])
            response.images.append("")
            response.error_msg.append(part.reason)
    response.text = " ".join(piece for piece in pieces if piece)
    return response


def render_original(ids: list[int], tokenizer: MultimodalTokenizer, draw: Draw) -> GenerateResponse:
    """`ids` as the released server answers, quirks included (see the module's docstring)."""
    vocabulary = tokenizer.vocabulary
    response = GenerateResponse()
    opened = [i for i, token in enumerate(ids) if token == vocabulary.boi_id]
    closed = [i for i, token in enumerate(ids) if token == vocabulary.eoi_id]
    if len(opened) != len(closed):
        response.error_msg.append(COUNT_MESSAGE.format(boi=len(opened), eoi=len(closed)))
    inner: set[int] = set()
    for start, end in zip(opened, closed, strict=False):
        codes = [token - vocabulary.n_text for token in ids[start + 1:end]]
        inner.update(range(start + 1, end))
        response.images_ids.append(codes)
        if len(codes) != vocabulary.tokens_per_image:
            response.error_msg.append(LENGTH_MESSAGE.format(found=len(codes), expected=vocabulary.tokens_per_image))
            response.images.append("")
        elif not all(0 <= code < vocabulary.n_codes for code in codes):
            response.error_msg.append(RANGE_MESSAGE.format(n_codes=vocabulary.n_codes))
            response.images.append("")
        else:
            response.images.append(_drawn(ImagePart(codes, place=start + 1), draw, response))
    kept = [token for i, token in enumerate(ids) if i not in inner]
    text = tokenizer.decode(kept, skip_special_tokens=False)
    response.text = text.replace("<img> </img> ", PLACEHOLDER).replace("</s>", "")
    return response


def _drawn(part: ImagePart, draw: Draw, response: GenerateResponse) -> str:
    try:
        return image_to_base64(draw(part))
    except (CodesError, GenerationError) as error:  # one bad picture must not lose the others
        response.error_msg.append(str(error))
        return ""
