"""A GLM-Image as a system: its folder, what it refuses, its routes, transformers' pipeline."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_glm_image as tiny
import torch
from PIL import Image, ImageChops
from transformers.models.glm_image.image_processing_pil_glm_image import (
    GlmImageImageProcessorPil,
)

from seed_multimodal import MultimodalSystem
from seed_multimodal.cli.main import main
from seed_multimodal.errors import CheckpointError, ConfigError, SeedError
from seed_multimodal.images.io import image_to_base64
from seed_multimodal.serving.app import create_app

SMALL = {"height": 64, "width": 96, "num_inference_steps": 1}


# ---- its folder


def change(file: str, **values: Any) -> Callable[[Path], None]:
    """A function that changes keys of a JSON file."""

    def apply(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply


def remove(path: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return apply


def cut(path: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        target = folder / path
        target.write_bytes(target.read_bytes()[:-100])

    return apply


LLM = "vision_language_encoder"
PROCESSOR = "processor/processor_config.json"
FAULTS = [
    (remove("transformer"), "no such folder"),
    (remove("text_encoder/model.safetensors"), "text_encoder"),
    (remove("tokenizer/tokenizer_config.json"), "tokenizer_config.json"),
    (remove("scheduler"), "scheduler"),
    (remove("processor/tokenizer.json"), "tokenizer.json"),
    (remove("processor/processor_config.json"), "processor_config.json"),
    (remove(f"{LLM}/model.safetensors"), LLM),
    (cut(f"{LLM}/model.safetensors"), LLM),
    (cut("transformer/diffusion_pytorch_model.safetensors"), "transformer"),
    (change("text_encoder/config.json", architectures=["CLIPTextModel"]), "CLIPTextModel"),
    (change("tokenizer/tokenizer_config.json", tokenizer_class="CLIPTokenizer"), "CLIPTokenizer"),
    (change("transformer/config.json", _class_name="FluxTransformer2DModel"), "Flux"),
    (change("transformer/config.json", num_layers=3), "transformer"),
    (change("transformer/config.json", patch_size=4, in_channels=1), ""),
    (change(f"{LLM}/config.json", model_type="glm4v"), "glm4v"),
    (change("system.json", side=100), "side"),
    (change("scheduler/scheduler_config.json", _class_name="DDIMScheduler"), "DDIMScheduler"),
    (change("scheduler/scheduler_config.json", base_image_seq_len=0), "base_image_seq_len"),
    (change("scheduler/scheduler_config.json", base_shift="a"), "base_shift"),
    (change("vae/config.json", latents_mean=[1.0]), "1 values for 4 channels"),
    (change("vae/config.json", latents_std=None), "latents_std"),
    (change("vae/config.json", latents_mean="x"), "latents_mean"),
    (change(f"{LLM}/config.json", text_config=None), "text_config"),
    (change(PROCESSOR, image_processor=3), "processor_config.json"),
    *(
        (change(PROCESSOR, image_processor=values | {name: value}), name)
        for values in ({"size": {"shortest_edge": 4096, "longest_edge": 65_536}},)
        for name, value in (
            ("size", None),
            ("size", [1]),
            ("size", {"shortest_edge": 4096}),
            ("size", {"shortest_edge": "a", "longest_edge": 9}),
            ("size", {"shortest_edge": 0, "longest_edge": 0}),
            ("size", {"shortest_edge": 4096, "longest_edge": 1024}),
            ("size", {"shortest_edge": 4096, "longest_edge": 10**12}),
            ("image_mean", [0.5]),
            ("image_std", [0.5, 0.5, 0]),
            ("patch_size", 14),
            ("merge_size", 2),
            ("resample", 2),
            ("rescale_factor", 1.0),
            ("do_resize", False),
            ("do_normalize", False),
        )
    ),
    (change("system.json", sides=64), "did you mean 'side'"),
]


@pytest.mark.parametrize(("damage", "message"), FAULTS)
def test_a_damaged_folder_is_refused(folder, tmp_path, damage, message):
    copy = tmp_path / "system"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        MultimodalSystem.from_pretrained(copy, device="cpu", log=None).images.prepare_drawing()


def test_sizes_are_read_where_earlier_releases_wrote_them(folder, tmp_path):
    copy = tmp_path / "system"
    shutil.copytree(folder, copy)
    values = json.loads((copy / PROCESSOR).read_text())
    (copy / "processor/preprocessor_config.json").write_text(json.dumps(values["image_processor"]))
    (copy / PROCESSOR).write_text(json.dumps({"processor_class": values["processor_class"]}))
    system = MultimodalSystem.from_pretrained(copy, device="cpu", log=None)
    assert (system.images.shortest, system.images.longest) == (64, 256)


def test_the_original_s_folder_is_recognised(folder, tmp_path):
    copy = tmp_path / "GLM-Image"
    shutil.copytree(folder, copy)
    (copy / "system.json").unlink()
    system = MultimodalSystem.from_pretrained(copy, device="cpu", log=None)
    assert system.config.system == "seed_glm_image" and system.config.side == 1024
    assert system.draw("a fox", **SMALL).size == (96, 64)


def test_a_saved_system_draws_the_same(system, tmp_path):
    saved = MultimodalSystem.from_pretrained(
        system.save_pretrained(tmp_path / "saved"), device="cpu", log=None
    )
    before = system.draw("a fox", seed=3, **SMALL)
    assert saved.draw("a fox", seed=3, **SMALL).tobytes() == before.tobytes()
    files = [path.parent.name for path in (tmp_path / "saved").rglob("*.safetensors")]
    assert sorted(files) == ["llm", "text_encoder", "transformer", "vae"]


@pytest.mark.slow
def test_transformers_draws_by_any_to_any(system, tmp_path):
    from transformers import pipeline

    pipe = pipeline("any-to-any", model=str(system.save_pretrained(tmp_path / "saved")))
    content: list[dict[str, Any]] = [{"type": "text", "text": "a fox"}]
    source = {"type": "image", "image": tiny.picture(96, 64)}
    for parts, size in ((content, (128, 128)), ([source, *content], (96, 64))):
        chat = [{"role": "user", "content": parts}]
        (answer,) = pipe(text=chat, generation_mode="image")
        assert answer["generated_image"].size == size

    # A size is the prompt's; images of a batch have sizes of their own; a text is a request.
    small = {"generation_mode": "image", "height": 64, "width": 96}
    ((image,),) = pipe(text=[chat], **small)
    assert image["generated_image"].size == (96, 64)
    chats = [
        [{"role": "user", "content": [{**source, "image": tiny.picture(*size)}, *content]}]
        for size in ((96, 64), (64, 96))
    ]
    rows = pipe(text=chats, generation_mode="image", batch_size=2)
    assert [row["generated_image"].size for (row,) in rows] == [(96, 64), (64, 96)]
    (image,) = pipe("a fox", **small)
    assert image["generated_image"].size == (96, 64)
    with pytest.raises(ConfigError, match="generate"):
        pipe.model.decode_image_tokens(torch.zeros(1, 4, dtype=torch.long))


# ---- what it does not do


PICTURE = tiny.picture(96, 64)
REFUSED: list[tuple[str, Callable[[MultimodalSystem], Any], str]] = [
    ("describe", lambda system: system.describe(PICTURE), "writes no text"),
    ("ask", lambda system: system.ask(PICTURE, "What?"), "writes no text"),
    ("chat", lambda system: system.chat([{"role": "user", "content": "hi"}]), "writes no text"),
    ("detect", lambda system: system.detect(PICTURE, "a fox"), "detection"),
    ("plain", lambda system: system.use_plain_prompts(), "not of ids alone"),
    ("beams", lambda system: system.draw("a", num_beams=2, **SMALL), "no beams"),
    ("guidance", lambda system: system.draw("a", guidance=3.0, **SMALL), "no guidance"),
    ("likelihood", lambda system: system.image_likelihoods(PICTURE, "a"), "grids of codes"),
    ("previews", lambda system: system.draw("a", stream=True, previews=[9], **SMALL), "previews"),
    ("read back", lambda system: system.draw("a", read_back=True, **SMALL), "writes no text"),
    ("negative", lambda system: system.draw("a", negative_prompt="b", **SMALL), "negative_prompt"),
    ("preset", lambda system: system.draw("a", preset="fast", **SMALL), "preset"),
    ("size", lambda system: system.draw("a", height=50, width=64), "multiples of 32"),
    ("too large", lambda system: system.draw("a", height=1024, width=2048), "image needs"),
    ("too few tokens", lambda system: system.draw("a", max_new_tokens=9, **SMALL), "image needs"),
    ("strip", lambda system: system.edit(tiny.picture(500, 64), "a"), "too long"),
    ("codes", lambda system: system.edit([[[[1, 2], [3, 4]]]], "a"), ""),
    ("row", lambda system: system.reconstruct([[1, 2, 3]]), "grid of codes"),
    ("code", lambda system: system.reconstruct([torch.tensor([[1, 64]])]), "outside 0 to 63"),
    (
        "other size",
        lambda system: system.reconstruct([torch.tensor([[1, 2]])], height=64),
        "of 32 pixels",
    ),
]


@pytest.mark.parametrize(
    ("call", "message"), [row[1:] for row in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_what_it_does_not_do_is_refused(system, call, message):
    with pytest.raises(SeedError, match=message):
        result = call(system)
        list(result)  # of a stream


COMMANDS = """describe IMAGE
ask IMAGE what
detect IMAGE fox
chat
eval vqa --questions FILE --out OUT
eval caption --captions FILE --out OUT"""
FILES = {"IMAGE": "a.png", "FILE": "b.json", "OUT": "out"}


@pytest.mark.parametrize("command", COMMANDS.splitlines())
def test_commands_are_refused_before_weights_are_loaded(folder, tmp_path, command, capsys):
    copy = shutil.copytree(folder, tmp_path / "glm")
    for file in copy.rglob("*.safetensors"):
        file.write_bytes(b"")
    PICTURE.save(tmp_path / "a.png")
    sample = {"image": "a.png", "caption": "a", "question": "b", "question_id": 1, "answer": "c"}
    (tmp_path / "b.json").write_text(json.dumps([sample]))
    paths = {name: str(tmp_path / file) for name, file in FILES.items()}
    words = [paths.get(word, word) for word in command.split()]
    assert main([*words, "--model", str(copy)]) == 2
    assert re.search("writes no text|detection", capsys.readouterr().err)


@pytest.mark.parametrize("engine", ["openai", "llama.cpp"])
def test_other_engines_are_refused(folder, engine):
    url = {"url": "http://127.0.0.1:9"} if engine == "openai" else {}
    with pytest.raises((ConfigError, ImportError), match=r"engine torch|ids alone|llama_cpp"):
        MultimodalSystem.from_pretrained(folder, device="cpu", log=None, engine=engine, **url)


def test_an_edit_has_the_size_of_its_source(system):
    source = tiny.picture(160, 96)
    assert system.edit(source, "a", num_inference_steps=1).size == (160, 96)
    assert system.edit(source, "a", num_inference_steps=1, height=64).size == (160, 64)


def test_an_edit_has_its_own_source_in_a_batch(system):
    # Images of equal bytes and other shapes.
    sources = [Image.new("RGB", size, "white") for size in ((64, 128), (128, 64))]
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "do_sample": False}
    together = system.edit(sources, "a", seed=[3, 3], **options)
    for source, image in zip(sources, together, strict=True):
        difference = ImageChops.difference(image, system.edit(source, "a", seed=3, **options))
        assert max(high for _, high in difference.getextrema()) <= 1


def test_settings_of_the_folder_are_followed(folder, tmp_path):
    copy = tmp_path / "system"
    shutil.copytree(folder, copy)
    (copy / "seed_decode.json").write_text('{"height": 96, "num_inference_steps": 1}')
    inner = json.loads((copy / PROCESSOR).read_text())["image_processor"]
    change(PROCESSOR, image_processor={**inner, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})(
        copy
    )
    system = MultimodalSystem.from_pretrained(copy, device="cpu", log=None)
    assert system.draw("a fox").size == (128, 96)
    processor = GlmImageImageProcessorPil.from_pretrained(copy / "processor")
    picture = tiny.picture(160, 96)
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    pixels = theirs.view(3, 5, 3, 16, 16).permute(2, 0, 3, 1, 4).reshape(3, 48, 80)
    assert torch.equal(system.tokenize(picture)[0], system.images.model.codes([pixels])[0])


def test_control_words_in_quotes_do_not_fail_a_batch(system):
    # ByT5 reads such a name as one token.
    texts = ["x 'abcd'", "x '</s>'", "x '<pad>a'"]
    together = system.draw(texts, seed=[1, 1, 1], **SMALL)
    for text, image in zip(texts, together, strict=True):
        assert image.tobytes() == system.draw(text, seed=1, **SMALL).tobytes()


def test_the_language_model_alone_does_not_generate(system):
    # transformers would count positions on one line.
    with pytest.raises(ConfigError, match=r"MultimodalSystem\.draw"):
        system.llm.generate(torch.tensor([[1, 2]]))


def test_every_backend_has_what_the_engine_asks():
    from seed_multimodal.inference.backends.llama_cpp import LlamaCppBackend
    from seed_multimodal.inference.backends.torch import TorchBackend

    for backend in (LlamaCppBackend, TorchBackend):
        assert isinstance(backend.cheap_copies, bool) and isinstance(backend.has_axes, bool)


def test_assembled_parts_have_an_image_tokenizer(system, folder, tmp_path, capsys):
    system.llm.save_pretrained(tmp_path / "llm")  # the language model alone
    command = ["assemble", "seed-glm-image", "--llm", tmp_path / "llm", "--tokenizer"]
    command += [folder / "processor", "--decoder", folder, "--out", tmp_path / "out"]
    assert main([*map(str, command)]) == 2
    assert "--encoder" in capsys.readouterr().err
    command += ["--encoder", folder / "vision_language_encoder"]
    assert main([*map(str, command)]) == 0
    whole = MultimodalSystem.from_pretrained(tmp_path / "out", device="cpu", log=None)
    assert whole.draw("a", **SMALL).tobytes() == system.draw("a", **SMALL).tobytes()


def test_the_context_is_limited(folder, tmp_path):
    # A row of the published context would need 5 GiB; the configuration stays.
    copy = tmp_path / "system"
    shutil.copytree(folder, copy)
    file = copy / LLM / "config.json"
    values = json.loads(file.read_text())
    values["text_config"]["max_position_embeddings"] = 131_072
    file.write_text(json.dumps(values))
    system = MultimodalSystem.from_pretrained(copy, device="cpu", log=None)
    assert system.engine.context == 8192
    assert system.llm.config.max_position_embeddings == 131_072


def test_codes_are_grids(system):
    (codes,) = system.tokenize(tiny.picture(160, 96))
    assert codes.shape == (3, 5)
    first, second = system.reconstruct(
        [codes, codes.numpy().astype("uint64")], seed=1, num_inference_steps=1
    )
    assert first.size == (160, 96) and first.tobytes() == second.tobytes()
    turned = system.reconstruct([codes.T], seed=1, num_inference_steps=1)[0]
    assert turned.size == (96, 160)


# ---- its routes


@pytest.fixture(scope="module")
def client(system: MultimodalSystem):
    return create_app(system).test_client()


def picture_of(response: Any) -> Image.Image:
    assert response.status_code == 200, response.json
    return Image.open(io.BytesIO(base64.b64decode(response.json["data"][0]["b64_json"])))


def test_routes_draw_and_edit(client):
    request = {"prompt": "a fox", "size": "96x64", "seed": 1}
    assert picture_of(client.post("/v1/images/generations", json=request)).size == (96, 64)
    files = [
        (io.BytesIO(base64.b64decode(image_to_base64(tiny.picture(*size)))), "a.png")
        for size in ((96, 64), (64, 64))
    ]
    form = {**request, "image": files, "size": "64x96"}
    assert picture_of(client.post("/v1/images/edits", data=form)).size == (64, 96)


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        ("/v1/images/generations", {"prompt": "a", "size": "100x64"}, "multiples of 32"),
        ("/v1/images/generations", {"prompt": "a", "size": "96x64", "ratio": "1:1"}, "ratio"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, "no text"),
        ("/generate", {"text": "hi", "images": []}, "no text"),
        ("/v1/images/tokens", {"images": []}, ""),
    ],
)
def test_routes_refuse_what_it_does_not_do(client, route, body, message):
    response = client.post(route, json=body)
    assert 400 <= response.status_code < 500
    assert message in str(response.json)
