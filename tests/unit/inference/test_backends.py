"""llama.cpp and completion servers as engines: their answers equal those of torch."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import TEXT_TEMPLATES
from completion_server import CODES, CompletionServer
from repository import NANO, ROOT
from tiny.language import random_llm, write_hub_tokenizer

from seed_multimodal.cli.main import main
from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.prompt import GenerationSettings, Prompt
from seed_multimodal.language.hub_tokenizer import HubTokenizer
from seed_multimodal.language.llm import load_llm
from seed_multimodal.language.messages import user_message
from seed_multimodal.pipelines.base import MultimodalSystem

LLM = NANO / "seed_llama"
WORDS = NANO / "seed_tokenizer"
IMAGES = [ROOT / "images" / name for name in ("fox.png", "whale.png", "teddy_bear.png")]
TEXTS = ("a red apple", "two blue fish", "a house under a tree")
GREEDY = GenerationSettings(max_new_tokens=60, do_sample=False)
FIRST_TOKEN = """
import sys, llama_cpp
llama = llama_cpp.Llama(sys.argv[1], n_ctx=32, verbose=False)
llama.eval([1, 5])
"""


def open_nano(**options: Any) -> Any:
    return MultimodalSystem.from_pretrained(
        NANO, device="cpu", log=None, load_decoder=False, **options
    )


@pytest.fixture(scope="session")
def nano() -> Any:
    return open_nano()


@pytest.fixture(scope="session")
def gguf(tmp_path_factory) -> dict[str, Path]:
    """nano in every precision.

    Skipped where llama.cpp is not installed or does not compute on this CPU.
    """
    pytest.importorskip("llama_cpp")
    from seed_multimodal.inference.gguf import export_gguf

    folder = tmp_path_factory.mktemp("gguf")
    files: dict[str, Path] = {}
    for quant in ("q8_0", "f16"):
        files[quant] = export_gguf(LLM, WORDS, folder / f"{quant}.gguf", quant)
        command = [sys.executable, "-c", FIRST_TOKEN, str(files[quant])]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"llama.cpp as installed cannot compute {quant} on this CPU")
    return files


@pytest.fixture
def server(nano: Any) -> Iterator[CompletionServer]:
    with CompletionServer(nano.llm) as running:
        yield running
        running.shutdown()


@pytest.fixture
def remote(server: CompletionServer) -> Any:
    return open_nano(engine="openai", url=server.url)


@pytest.fixture(params=[pytest.param("llama.cpp", marks=pytest.mark.process), "a server"])
def other(request) -> Any:
    """nano with another engine than torch."""
    if request.param == "a server":
        return request.getfixturevalue("remote")
    return open_nano(engine="llama.cpp", gguf=request.getfixturevalue("gguf")["f16"])


def llama_engine(nano: Any, file: Path, max_rows: int = 16) -> Engine:
    from seed_multimodal.inference.backends.llama_cpp import LlamaCppBackend

    backend = LlamaCppBackend(LLM, nano.tokenizer.vocabulary, file, max_rows=max_rows)
    return Engine(backend, nano.tokenizer)


def prompts(system: Any) -> list[Prompt]:
    encode = system.tokenizer.encode_parts
    requests = [f"USER: Please draw {text}.\nASSISTANT:" for text in TEXTS]
    return [Prompt(encode([request], add_bos=True)) for request in requests]


def answers(system: Any) -> dict[str, Any]:
    """Descriptions, drawings (forced and free) and a conversation with an image in it, greedily."""
    requests = [user_message([system.tasks.draw_request(text)]) for text in TEXTS]
    free = system.settings("draw")
    forced = system.forced(free, {})
    turns: list[Any] = [{"role": "user", "content": [IMAGES[0], "What is this?"]}]
    chat = []
    for text in ("Please draw it in blue.", "And what is that?"):
        answer = system.chat(turns)
        chat.append(answer.ids)
        turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": text}]
    drawings = {
        "forced": system.generate_answers(requests, "draw", forced, system.tasks.draw_response),
        "free": system.generate_answers(requests, "draw", free),
    }
    ids = {name: [drawing.answer.ids for drawing in group] for name, group in drawings.items()}
    return {"describe": system.describe(IMAGES), "chat": chat, **ids}


@pytest.mark.slow
def test_answers_equal_those_of_torch(nano, other):
    expected = answers(nano)
    assert answers(other) == expected
    boi = nano.tokenizer.vocabulary.boi_id
    assert all(boi in ids for ids in expected["forced"])
    assert any(boi in ids for ids in expected["free"])
    assert other.describe(IMAGES, stop=[" "]) == nano.describe(IMAGES, stop=[" "])


@pytest.mark.slow
def test_callers_in_threads_get_their_own_answers(nano, other):
    # Some leave early: their tokens must not reach others.
    expected = nano.engine.generate(prompts(nano), GREEDY)
    answered: dict[int, list[int]] = {}

    def ask(caller: int) -> None:
        answered[caller] = []
        for token in other.engine.submit(prompts(nano)[caller % 3], GREEDY):
            answered[caller].append(token)
            if caller % 4 == 3 and len(answered[caller]) == 5:
                break

    threads = [threading.Thread(target=ask, args=(caller,)) for caller in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for caller, ids in answered.items():
        complete = expected[caller % 3]
        assert ids == (complete[:5] if caller % 4 == 3 else complete), caller


# ---- llama.cpp

LLAMA_SETTINGS = {
    "sampled": GenerationSettings(max_new_tokens=12, temperature=0.7, top_p=0.9, seed=1),
    "guided": replace(GREEDY, guidance=2.0, force_image=True),
    "long prompts": replace(GREEDY, max_new_tokens=5),
}


@pytest.mark.process
@pytest.mark.parametrize("max_rows", [2, 16])
@pytest.mark.parametrize("name", LLAMA_SETTINGS)
def test_llama_cpp_with_settings_equals_torch(nano, gguf: dict[str, Path], name, max_rows):
    settings = LLAMA_SETTINGS[name]
    asked = prompts(nano)
    if name == "long prompts":
        asked = [Prompt([1, *(3 + (7 * n + row) % 300 for n in range(400))]) for row in range(3)]
    engine = llama_engine(nano, gguf["f16"], max_rows)
    assert engine.generate(asked, settings) == nano.engine.generate(asked, settings)


@pytest.mark.process
def test_export_gguf_writes_a_file_that_describe_reads(gguf: dict[str, Path], tmp_path, capsys):
    out = tmp_path / "new" / "folder" / "nano.gguf"
    assert main(f"export-gguf --model {NANO} --quant q8_0 --out {out}".split()) == 0
    assert out.read_bytes() == gguf["q8_0"].read_bytes()
    command = ["describe", str(IMAGES[0]), "--model", str(NANO), "--engine", "llama.cpp", "--gguf"]
    capsys.readouterr()
    assert main([*command, str(out), "--device", "cpu"]) == 0
    assert "fox" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "none.gguf")]) == 2
    assert out.stat().st_size < 0.6 * gguf["f16"].stat().st_size
    from seed_multimodal.inference.backends.llama_cpp import find_gguf

    with pytest.raises(ConfigError, match="--gguf"):  # two files to choose from
        find_gguf(gguf["f16"].parent)


# Architecture of `tiny.language`, its chat template, fields of its configuration.
GGUF_MODELS = {
    "llama": ("llama", "llama3", {}),
    "llama 3.1": (
        "llama",
        "llama3",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen3": ("qwen3", "qwen3", {"tie_word_embeddings": True}),
    "smollm3": ("smollm3", "smollm3", {"no_rope_layers": [1, 1]}),
    "mistral": ("mistral", "mistral", {}),
    "phi3": ("phi3", "phi3", {}),
}


def write_model(folder: Path, model: str) -> HubTokenizer:
    """A model whose weights are exact in 16 bits, with rows of padding, and its tokenizer."""
    architecture, template, fields = GGUF_MODELS[model]
    write_hub_tokenizer(folder, TEXTS, TEXT_TEMPLATES[template])
    tokenizer = HubTokenizer.create(folder, 16, 4)
    tokenizer.save_pretrained(folder)
    ids: dict[str, Any] = dict(tokenizer.special_ids)
    n_rows = len(tokenizer) + 10
    llm = random_llm(architecture, n_rows, initializer_range=0.3, **fields, **ids)
    llm.half().save_pretrained(folder)
    return tokenizer


@pytest.mark.process
@pytest.mark.parametrize("model", GGUF_MODELS)
def test_llama_cpp_with_other_models_equals_torch(gguf: dict[str, Path], model: str, tmp_path):
    from seed_multimodal.inference.backends.llama_cpp import LlamaCppBackend
    from seed_multimodal.inference.gguf import export_gguf

    tokenizer = write_model(tmp_path, model)
    file = export_gguf(tmp_path, tmp_path, tmp_path / "f16.gguf", "f16")
    backends = (
        LlamaCppBackend(tmp_path, tokenizer.vocabulary, file, max_rows=3),
        TorchBackend(load_llm(tmp_path, tokenizer=tokenizer), max_rows=3),
    )

    # The long prompt ends in an image; llama.cpp keeps keys and values in 16 bits.
    long = tokenizer.encode_parts([" ".join(TEXTS) * 3, [1, 2, 3, 4]], add_bos=True)
    prompts = [Prompt(tokenizer.encode_parts([text], add_bos=True)) for text in TEXTS[1:]]
    prompts.append(Prompt(long))
    settings = replace(GREEDY, max_new_tokens=8)
    answers = [Engine(backend, tokenizer).generate(prompts, settings) for backend in backends]
    assert answers[0] == answers[1]
    assert len(set(map(tuple, answers[0]))) == len(TEXTS)


@pytest.mark.parametrize(
    ("architecture", "fields", "named"),
    [
        ("gemma2", {}, "gemma2"),
        ("mistral sliding", {}, "sliding"),
        ("llama", {"attention_bias": True}, "bias"),
        ("smollm3", {}, "no_rope_layers"),
    ],
)
def test_export_gguf_of_what_llama_cpp_computes_otherwise(architecture, fields, named, tmp_path):
    from seed_multimodal.inference.gguf import export_gguf

    random_llm(architecture, 356, **fields).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=named):
        export_gguf(tmp_path, WORDS, tmp_path / "f16.gguf", "f16")


def test_interleaved_rows_of_rotary_weights():
    from seed_multimodal.inference.gguf import interleaved

    rows = torch.arange(8)[:, None].repeat(1, 2)  # two heads of width 4
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


# ---- completion servers


def test_completion_server_receives_ids_settings_and_key(nano, server: CompletionServer, remote):
    # vLLM's fields: a misspelt one is ignored there, and answers are others.
    sampled = GenerationSettings(
        max_new_tokens=9, temperature=0.8, top_p=0.9, top_k=0, repetition_penalty=1.3, seed=5
    )
    asked = prompts(nano)[:1]
    first = remote.engine.generate(asked, sampled)
    body = server.bodies[0]
    expected = {
        "prompt": asked[0].ids,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": -1,
        "repetition_penalty": 1.3,
        "seed": 5,
    }
    assert {name: body[name] for name in expected} == expected
    # Too few tokens for an image.
    assert str(nano.tokenizer.vocabulary.boi_id) in body["logit_bias"]
    assert remote.engine.generate(asked, sampled) == first

    remote.engine.generate(asked, replace(GREEDY, force_image=True))
    image = next(body for body in server.bodies if len(body.get("allowed_token_ids", ())) > CODES)
    assert image["min_tokens"] == image["max_tokens"] == 32 and image["temperature"] == 0


def test_completion_server_receives_the_key(nano, server: CompletionServer, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    keyed = open_nano(engine="openai", url=f"{server.url}/v1")
    keyed.engine.generate(prompts(nano)[:1], GREEDY)
    assert server.headers[-1]["Authorization"] == "Bearer secret"


def test_completion_server_without_stop_ids(nano, server: CompletionServer, remote):
    server.trims = True
    expected = nano.engine.generate(prompts(nano), GREEDY)
    assert remote.engine.generate(prompts(nano), GREEDY) == expected


def test_completion_server_is_left_at_a_stop(nano, server: CompletionServer, remote):
    """The answer is cut there, and the server's generation is cancelled."""
    server.pause = 0.05
    started = time.monotonic()
    answer = remote.describe(IMAGES[0], stop=[" "], min_new_tokens=200)
    assert nano.describe(IMAGES[0]).startswith(f"{answer} ") and " " not in answer
    assert time.monotonic() - started < 5 < 200 * server.pause


def test_completion_server_that_disconnects(nano, server: CompletionServer, remote):
    server.breaks_after = 3
    with pytest.raises(RequestError):
        remote.engine.generate(prompts(nano), GREEDY)
    server.shutdown()
    server.server_close()
    with pytest.raises(RequestError, match=server.url):
        remote.engine.generate(prompts(nano), GREEDY)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("nano", {"engine": "openai"}, "--url"),
        ("nano", {"engine": "openai", "url": "localhost"}, "localhost"),
        ("nano-x", {"engine": "llama.cpp"}, "SEED-LLaMA"),
    ],
)
def test_from_pretrained_with_an_engine_that_does_not_fit(name, options, named):
    with pytest.raises((ConfigError, RequestError), match=named):
        MultimodalSystem.from_pretrained(name, device="cpu", log=None, **options)


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"guidance": 2.0}])
def test_beams_and_guidance_with_a_completion_server_fail(remote, settings):
    with pytest.raises(ConfigError, match="--engine torch"):
        remote.describe(IMAGES[0], **settings)
