"""`POST /generate` with the requests recorded from the original server.

The recorded stubs (answers of the language model, codes of images, 4x4 drawings) replace the
networks of a SEED-LLaMA.
Compared: prompt ids and generation settings of the language model, inputs of the image encoder and
decoder, codes, texts and drawings of well-formed answers. Where the original breaks its own rules
(`<img> </img>` left in a text, broken images, text after `</s>`, code lists of any length and
value, HTTP 500 pages), the answer must be as documented: one `<image>` per image, a reason for each
broken one, the end at the first `</s>`, no incomplete images, a 4xx error.

Not compared: blanks in texts, the prompt of a forced image (it ends as in tuning) and of control
tokens typed by users (they are encoded as text), `prompt_text` (printed by the original), bodies of
the pages for 400, 404 and 415.
"""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from recorded_engine import RecordedEngine
from runner import assert_close, assert_same
from torch import nn

from seed_multimodal.device import Runtime
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import get_transform
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.models.seed.pipeline import SeedImageCodec, SeedLlamaFamily
from seed_multimodal.models.seed.spec import SeedLlamaConfig
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.images import Encoded, Placement
from seed_multimodal.serving.app import create_app

TEMPLATES = {"cases_8b.json": "vicuna", "cases_14b.json": "llama2"}


class RecordedImages(SeedImageCodec):
    """Encodes image i of a batch as the codes 7 k + 11 i + 5; draws 4x4 pixels of one colour."""

    def __init__(self, vocabulary):
        # Sizes are all that the codec asks of a tokenizer.
        encoder = nn.Module()
        encoder.visual_encoder = SimpleNamespace(image_size=224)
        encoder.config = SimpleNamespace(
            num_query=vocabulary.tokens_per_image,
            codebook_size=vocabulary.n_codes,
            vit=SimpleNamespace(image_size=224),
        )
        runtime = Runtime(torch.device("cpu"), torch.float32)
        super().__init__(
            encoder,
            get_transform("clip", keep_ratio=False, image_size=224),
            Placement(runtime, runtime, runtime),
        )  # type: ignore[arg-type]
        self.load_decoder = lambda: None
        self.vocabulary = vocabulary
        self.shapes = list[list[int]]()
        self.drawn = list[list[list[int]]]()
        self.encoded: dict[bytes, torch.Tensor] = {}

    def read(self, images, **seed) -> list[Encoded]:
        pixels = torch.stack([self.transform(self.open(row)) for row in images])
        return [*map(Encoded, self.encode_pixels(pixels))]

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """The same codes for a batch that was encoded before."""
        batch = pixels.numpy().tobytes()
        positions = torch.arange(self.vocabulary.tokens_per_image)
        if batch not in self.encoded:
            self.shapes.append(list(pixels.shape))
            rows = [7 * positions + 11 * index + 5 for index in range(len(pixels))]
            self.encoded[batch] = torch.stack(rows) % self.vocabulary.n_codes
        return self.encoded[batch]

    def draw(self, values, **settings) -> list[Image.Image]:
        # The colour tells the codes.
        self.drawn.append([list(codes) for codes in values])
        return [
            Image.new("RGB", (4, 4), (codes[0] % 256, codes[1] % 256, len(codes) % 256))
            for codes in values
        ]


class RecordedSystem(MultimodalSystem):
    """A SEED-LLaMA whose language model generates the recorded ids."""

    def __init__(self, tokenizer, template: str, new_ids: list[int]):
        engine = RecordedEngine(tokenizer, new_ids)
        config = SeedLlamaConfig(template=template, tasks=SeedLlamaConfig.of_original("8b").tasks)
        images = RecordedImages(tokenizer.vocabulary)
        family = SeedLlamaFamily(config, tokenizer, None, images, get_template(template, tokenizer))
        super().__init__(family, engine)
        self.calls = engine.calls


def check(recording):
    tokenizer = MultimodalTokenizer.from_pretrained(recording.tokenizer_folder)
    for file in recording.files("cases*.json"):
        for case in recording.json(file.name):
            system = RecordedSystem(
                tokenizer, TEMPLATES[file.name], case.get("stub_generated_ids") or []
            )
            what = f"{file.name}, case {case['name']!r}"
            (check_case if "request" in case else check_page)(case, system, what)


def check_case(case, system: RecordedSystem, what):
    """A request to `/generate`: the answer, and what the networks were given for it."""
    vocabulary = system.tokenizer.vocabulary
    request = case["request"]
    # Codes in place of images: wrong numbers of them or unknown ones are errors.
    lists = [image for image in request.get("images", []) if isinstance(image, list)]
    wrong = [
        codes
        for codes in lists
        if len(codes) != vocabulary.tokens_per_image
        or not set(codes) <= set(range(vocabulary.n_codes))
    ]
    client = create_app(system).test_client()
    response = client.open("/generate", method=case["method"], json=request)
    if wrong or case["status"] == 500:
        assert_client_error(response, what)
        assert not system.calls, f"{what}: the model ran for an invalid request"
        return
    assert_same(response.status_code, 200, f"{what}, status")
    answer = response.get_json()
    assert_same(response.content_type, case["content_type"], f"{what}, content type")
    check_calls(case, system, what)
    check_answer(case, answer, system.tokenizer.eos_token_id, what)


def check_calls(case, system: RecordedSystem, what):
    (call,) = system.calls
    recorded = case["model_call"]
    actual = {
        "generation_config": call["generation_config"],
        "encode_image_shapes": system.images.shapes,
    }
    wanted = {**case, **recorded}
    if case["request"].get("force_boi"):
        # Raised if no image fits into it.
        limit = recorded["generation_config"]["max_new_tokens"]
        actual["generation_config"]["max_new_tokens"] = limit
    elif "<" not in case["request"]["text"].replace("<image>", ""):
        actual["input_ids"] = call["input_ids"]
    # Where an image was broken, the original drew all the same.
    if not case["response"]["error_msg"]:
        actual["decode_image_ids"] = system.images.drawn
    assert_same(actual, {key: wanted[key] for key in actual}, f"{what}, calls")


def check_answer(case, answer, eos: int, what):
    recorded = case["response"]
    # Images of the request come first.
    n_read = len(case["request"]["images"])
    n_drawn = len(answer["images"])
    assert_same(answer["text"].count("<image>"), n_drawn, f"{what}, placeholders")
    assert_same(len(answer["images_ids"]), n_read + n_drawn, f"{what}, lists of codes")
    codes_read = recorded["images_ids"][:n_read]
    assert_same(answer["images_ids"][:n_read], codes_read, f"{what}, codes of the request")

    # Where the original breaks its own rules, the answer is as documented.
    if eos in case["stub_generated_ids"][:-1]:
        assert recorded["text"].split()[0].startswith(answer["text"].split()[0]), what
        return
    if recorded["error_msg"]:
        assert answer["error_msg"], f"{what}: the broken image is not reported"
        return
    assert_same(answer["images_ids"], recorded["images_ids"], f"{what}, codes")
    for image, wanted in zip(answer["images"], recorded["images"], strict=True):
        pixels, expected = (np.array(open_image(text).image) for text in (image, wanted))
        assert_close(pixels, expected, 0, what=f"{what}, drawing")
    texts = [
        text.replace("<img> </img>", "<image>").replace("<image>", " <image> ").split()
        for text in (answer["text"], recorded["text"])
    ]
    assert_same(*texts, f"{what}, text")


def check_page(case, system: RecordedSystem, what):
    # Broken requests were recorded by name.
    requests = {
        "invalid json": {"data": "{not json", "content_type": "application/json"},
        "wrong content type": {"data": "text", "content_type": "text/plain"},
        "unknown path": {"path": "/no/such/path", "method": "GET"},
    }
    request = {"path": "/generate", "method": "POST", **requests[case["name"]]}
    response = create_app(system).test_client().open(**request)
    assert_same(response.status_code, case["status"], f"{what}, status")
    assert_client_error(response, what)


def assert_client_error(response, what):
    body = response.get_json()
    assert 400 <= response.status_code < 500, f"{what}: status {response.status_code}, expected 4xx"
    assert body["error"] and body["error_msg"] == [body["error"]], (
        f"{what}: no error message: {body}"
    )


KINDS = {"flask_api": check}
