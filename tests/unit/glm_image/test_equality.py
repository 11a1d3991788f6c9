"""GLM-Image against the installed transformers and diffusers, with tiny random weights.

Skipped where a release lacks its classes. Editing is compared with diffusers' pipeline after
`tiny.mend_editing`: as released it fails (see `docs/explanation/glm_image.md`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny_glm_image as tiny
import torch
from PIL import Image

from seed_multimodal import MultimodalSystem
from seed_multimodal.inference.engine import Engine

pytest.importorskip("transformers.models.glm_image.modeling_glm_image")
pytest.importorskip("diffusers.pipelines.glm_image.pipeline_glm_image")
from seed_glm_image.processing import build_prompt, position_ids, source_grid  # noqa: E402

GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0}


class Request(NamedTuple):
    """A text, height and width, and sizes (width, height) of source images."""

    text: str
    height: int
    width: int
    sources: tuple[tuple[int, int], ...] = ()

    @property
    def images(self) -> list[Image.Image]:
        return [tiny.picture(*size) for size in self.sources]


REQUESTS = [
    Request("a fox", 64, 96),
    Request("a fox in the snow", 64, 64),
    Request("an owl", 128, 64),
    Request("a strip", 32, 128),
    Request("make it red", 64, 96, ((96, 64),)),
    Request("make it blue", 96, 64, ((128, 64), (64, 128))),
]
NAMES = [f"{row.text} {row.height} {row.width}" for row in REQUESTS]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline()


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("glm_image")
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def system(pipe: Any, folder: Path) -> MultimodalSystem:
    """The folder's system, whose de-tokenizer has the pipeline's networks: tensors of a file are
    aligned otherwise in memory, which changes the last bits of sums."""
    system = MultimodalSystem.from_pretrained(folder, device="cpu", log=None)
    decoder = system.images.decoder
    for name, part in (
        ("denoiser", pipe.transformer),
        ("vae", pipe.vae),
        ("t5_encoder", pipe.text_encoder),
    ):
        loaded = getattr(decoder, name).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in part.state_dict().items())
        setattr(decoder, name, part)
    return system


@pytest.fixture(autouse=True)
def no_state(request: pytest.FixtureRequest) -> None:
    """transformers keeps positions of the last request on the module."""
    if "pipe" in request.fixturenames:
        request.getfixturevalue("pipe").vision_language_encoder.model.rope_deltas = None


def processed(pipe: Any, request: Request) -> Any:
    """The processor's inputs of a request."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in request.images]
    content.append({"type": "text", "text": request.text})
    return pipe.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        target_h=request.height,
        target_w=request.width,
        return_dict=True,
        return_tensors="pt",
    )


def codes_of(pipe: Any, request: Request, inputs: Any) -> list[torch.Tensor]:
    """The codes of the source images."""
    if not request.sources:
        return []
    model = pipe.vision_language_encoder.model
    grids = inputs["image_grid_thw"][: len(request.sources)]
    features = model.get_image_features(inputs["pixel_values"], grids, return_dict=True)
    return [
        model.get_image_tokens([state]).view(*state.shape[1:]) for state in features.pooler_output
    ]


def drawing(request: Request) -> dict[str, int]:
    return {"height": request.height, "width": request.width}


def prompt_of(system: MultimodalSystem, request: Request) -> Any:
    from seed_multimodal.language.messages import user_message

    content = [*request.images, request.text]
    kind = "edit" if request.sources else "draw"
    return system.family.prompts([user_message(content)], kind, drawing=drawing(request))[0]


@pytest.mark.parametrize("request_", REQUESTS, ids=NAMES)
def test_prompts(pipe, system, request_):
    """Ids and positions equal those of processor and model."""
    inputs = processed(pipe, request_)
    whole = pipe.vision_language_encoder
    codes = codes_of(pipe, request_, inputs)
    ids = inputs["input_ids"]
    is_image = ids == whole.config.image_token_id
    flat = [grid.flatten() for grid in codes] or [torch.zeros(0, dtype=torch.long)]
    ids = ids.masked_scatter(is_image, torch.cat(flat))
    expected, _ = whole.model.get_rope_index(
        input_ids=ids,
        image_grid_thw=inputs["image_grid_thw"],
        images_per_sample=inputs["images_per_sample"],
    )
    answer = whole.model._cached_decode_position_ids[0]

    prompt = prompt_of(system, request_)
    assert [*prompt.ids, tiny.START] == ids[0].tolist()
    assert torch.equal(prompt.position_ids, torch.cat([expected[:, 0], answer], dim=1))
    assert prompt.n_codes == answer.shape[1] - 1


def test_codes_of_images(pipe, system):
    """They equal transformers', in a batch as alone."""
    sizes = ((96, 64), (64, 128), (256, 128), (64, 64))
    expected = []
    for size in sizes:
        request = Request("", 64, 64, (size,))
        expected += codes_of(pipe, request, processed(pipe, request))
    together = system.tokenize([tiny.picture(*size) for size in sizes])
    alone = [system.tokenize(tiny.picture(*size))[0] for size in sizes]
    assert [*map(torch.Tensor.tolist, together)] == [*map(torch.Tensor.tolist, expected)]
    assert [*map(torch.Tensor.tolist, alone)] == [*map(torch.Tensor.tolist, expected)]
    assert len(torch.cat([codes.flatten() for codes in together]).unique()) > 10


def greedy_codes(pipe: Any, request: Request) -> list[int]:
    inputs = processed(pipe, request)
    n_sources = len(request.sources)
    n_codes = int(inputs["image_grid_thw"][n_sources:].prod(-1).sum())
    whole = pipe.vision_language_encoder
    ids = whole.generate(**inputs, max_new_tokens=n_codes, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def engine_codes(system: MultimodalSystem, engine: Any, requests: list[Request]) -> list[list[int]]:
    settings = system.settings("draw", images="forced", **GREEDY)
    prompts = [prompt_of(system, request) for request in requests]
    return [ids[1:] for ids in engine.generate(prompts, settings)]


@pytest.mark.slow
def test_greedy_codes(pipe, system):
    """They equal `generate`'s: alone, in one batch, and in rows that are reused."""
    expected = [[*greedy_codes(pipe, request), tiny.END] for request in REQUESTS]
    assert max(len(set(ids)) for ids in expected) > 10
    assert [engine_codes(system, system.engine, [row])[0] for row in REQUESTS] == expected
    for _ in range(2):
        assert engine_codes(system, system.engine, REQUESTS) == expected


@pytest.mark.nightly
@pytest.mark.process  # the compiler
def test_compiled_codes(pipe, folder):
    system = MultimodalSystem.from_pretrained(folder, device="cpu", log=None, compiled=True)
    expected = [[*greedy_codes(pipe, request), tiny.END] for request in REQUESTS]
    assert engine_codes(system, system.engine, REQUESTS) == expected


def test_equal_codes_at_other_positions(system):
    """They do not share a row of the cache: log-probabilities are those of a new engine."""
    codes = torch.arange(6)
    settings = system.settings("edit", images="forced", **GREEDY)
    answers: dict[tuple[int, int], list[Any]] = {}
    for order in ((2, 3), (3, 2)), ((3, 2), (2, 3)):
        engine = Engine(system.engine.backend, system.tokenizer)
        engine.forget()
        for grid in order:
            prompt = build_prompt(system.tokenizer, "as it is", (2, 3), [codes.view(*grid)])
            answers.setdefault(grid, []).append(engine.sample([prompt], settings)[0].log_probs)
    assert answers[2, 3][0] == answers[2, 3][1]
    assert answers[3, 2][0] == answers[3, 2][1]
    assert answers[2, 3][0] != answers[3, 2][0]


def test_a_grid_is_complete_where_its_end_is_likelier(system):
    """The model chooses the end at once, if it may."""
    head = system.llm.get_output_embeddings().weight
    before = head.detach().clone()
    with torch.no_grad():
        head[tiny.END] = 10 * head[: tiny.N_CODES].mean(0) + 20 * head[0]
    try:
        for request in REQUESTS:
            (ids,) = engine_codes(system, system.engine, [request])
            assert len(ids) == prompt_of(system, request).n_codes + 1
            assert max(ids[:-1]) < tiny.N_CODES
            assert ids[-1] == tiny.END
    finally:
        with torch.no_grad():
            head.copy_(before)


DRAWINGS = [
    (Request("a fox", 64, 96), {}),
    (Request("a fox", 64, 96), {"guidance_scale": 1.0}),
    (Request('a sign "open"', 96, 64), {}),
    (Request('a sign "open" and 「hi」', 96, 64), {}),
    (Request("it's \u201cone\u201d, a dog's \"two\" and 「three」", 64, 64), {}),
    (Request("make it red", 64, 96, ((96, 64),)), {}),
    (Request("join \u201cboth\u201d", 96, 64, ((96, 64), (128, 96))), {"guidance_scale": 4.0}),
]


@pytest.mark.parametrize(("request_", "options"), DRAWINGS)
def test_pixels(pipe, system, request_, options):
    """Codes and noise of the same seed give the pixels of diffusers' pipeline."""
    expected = pipe(
        request_.text,
        image=request_.images or None,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(7),
        **drawing(request_),
        **options,
    ).images[0]
    options = {"seed": 7, "num_inference_steps": 4, **drawing(request_), **options}
    if request_.sources:
        image = system.edit([request_.images], request_.text, **options)[0]
    else:
        image = system.draw(request_.text, **options)
    assert np.asarray(expected).std() > 5
    assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_an_image_does_not_depend_on_its_batch(system):
    """Also next to one with longer letters, which diffusers pads without a mask."""
    texts = ["a fox", 'a sign "open now"', "a cat", 'a sign "shut now"']
    options = {"height": 64, "width": 64, "num_inference_steps": 2}
    together = system.draw(texts, seed=[1, 2, 3, 4], **options)
    for index, text in enumerate(texts):
        alone = system.draw(text, seed=index + 1, **options)
        difference = np.abs(np.asarray(together[index]).astype(int) - np.asarray(alone).astype(int))
        assert difference.max() <= 1


@pytest.mark.parametrize("size", [(96, 80), (300, 300), (600, 400), (32, 48), (288, 256)])
def test_sizes_of_source_images(pipe, system, size):
    """Those that crash diffusers' pipeline are resized once; equal to it on the resized image."""
    source = tiny.picture(*size)
    resized = system.images.read([source])[0].value.image
    assert resized.width % 32 == resized.height % 32 == 0
    options = {"height": 64, "width": 64, "num_inference_steps": 2}
    image = system.edit(source, "make it red", seed=3, **options)
    # What the resized image itself has, where the library reads it so.
    if max(resized.size) <= tiny.LONGEST and min(resized.size) >= tiny.SHORTEST:
        again = system.edit(resized, "make it red", seed=3, **options)
        generator = torch.Generator().manual_seed(3)
        expected = pipe("make it red", image=[resized], generator=generator, **options).images[0]
        assert np.array_equal(np.asarray(again), np.asarray(expected))
        assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("size", [(64, 96), (100, 100), (1080, 1920), (480, 640), (3000, 2000)])
def test_grids_of_source_images(size):
    """As transformers' resizing, for its published sides."""
    from transformers.models.glm_image.image_processing_glm_image import smart_resize

    width, height = size
    expected = smart_resize(height, width, 16, 512 * 512, 2048 * 2048)
    assert source_grid(size, 512, 2048) == tuple(side // 16 for side in expected)


def test_positions_by_hand():
    """Two tokens, a grid of 2 x 3 from position 2 on, and a token behind its larger side."""
    times = [0, 1, 2, 2, 2, 2, 2, 2, 5]
    rows = [0, 1, 2, 2, 2, 3, 3, 3, 5]
    columns = [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert position_ids([2, (2, 3), 1]).tolist() == [times, rows, columns]
