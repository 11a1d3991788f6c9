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
from seed_multimodal.errors import CheckpointError, ConfigError, RequestError
from seed_multimodal.inference.backends.base import PromptChunk
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


@pytest.fixture(scope="session")
def nano() -> Any:
    return MultimodalSystem.from_pretrained(NANO, device="cpu", log=None, load_decoder=False)


@pytest.fixture(scope="session")
def gguf(tmp_path_factory) -> Iterator[dict[str, Path]]:
    """nano in every precision.

    Skipped where llama.cpp is not installed or does not compute on this CPU.
    """
    pytest.importorskip("llama_cpp")
    from seed_multimodal.inference.gguf import export_gguf

    folder = tmp_path_factory.mktemp("gguf")
    files = {
        quant: export_gguf(LLM, WORDS, folder / f"{quant}.gguf", quant)
        for quant in ("q4_k_m", "q8_0", "f16")
    }
    for file in files.values():
        if subprocess.run(
            [sys.executable, "-c", FIRST_TOKEN, str(file)], capture_output=True
        ).returncode:
            pytest.skip(f"llama.cpp as installed cannot compute {file.stem} on this CPU")
    yield files


@pytest.fixture(scope="session")
def laptop(gguf: dict[str, Path]) -> Any:
    return MultimodalSystem.from_pretrained(
        NANO, device="cpu", log=None, load_decoder=False, engine="llama.cpp", gguf=gguf["f16"]
    )


def laptop_engine(nano: Any, file: Path, max_rows: int = 16) -> Engine:
    from seed_multimodal.inference.backends.llama_cpp import LlamaCppBackend

    return Engine(
        LlamaCppBackend(LLM, nano.tokenizer.vocabulary, file, max_rows=max_rows), nano.tokenizer
    )


@pytest.fixture
def server(nano: Any) -> Iterator[CompletionServer]:
    with CompletionServer(nano.llm) as running:
        yield running
        running.shutdown()


@pytest.fixture
def remote(server: CompletionServer) -> Any:
    return MultimodalSystem.from_pretrained(
        NANO, device="cpu", log=None, load_decoder=False, engine="openai", url=server.url
    )


def answers(system: Any) -> dict[str, Any]:
    """Descriptions, drawings (forced and free) and a conversation with an image in it, greedily."""
    requests = [user_message([system.tasks.draw_request(text)]) for text in TEXTS]
    forced = system.forced(system.settings("draw"), {})
    free = system.settings("draw")
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
    return {
        "describe": system.describe(IMAGES),
        "chat": chat,
        **{name: [drawing.answer.ids for drawing in group] for name, group in drawings.items()},
    }


def prompts(system: Any) -> list[Prompt]:
    return [
        Prompt(
            system.tokenizer.encode_parts([f"USER: Please draw {text}.\nASSISTANT:"], add_bos=True)
        )
        for text in TEXTS
    ]


@pytest.mark.process
def test_answers_of_llama_cpp_are_those_of_torch(nano, laptop):
    expected = answers(nano)
    assert answers(laptop) == expected
    boi = nano.tokenizer.vocabulary.boi_id
    assert all(boi in ids for ids in expected["forced"])
    assert any(boi in ids for ids in expected["free"])


@pytest.mark.process
def test_llama_cpp_with_threads_and_cancelled_requests(nano, laptop):
    expected = nano.engine.generate(prompts(nano), GREEDY)
    answered = dict[int, list[int]]()

    def ask(thread: int) -> None:
        answered[thread] = []
        for token in laptop.engine.submit(prompts(nano)[thread % 3], GREEDY):
            answered[thread].append(token)
            if thread % 4 == 3 and len(answered[thread]) == 5:
                break

    together(ask, 24)
    for thread, ids in answered.items():
        assert ids == (expected[thread % 3][:5] if thread % 4 == 3 else expected[thread % 3]), (
            thread
        )


@pytest.mark.process
def test_llama_cpp_with_long_prompts_and_a_single_slot(nano, gguf: dict[str, Path]):
    engine = laptop_engine(nano, gguf["f16"], max_rows=3)
    long = [Prompt([1, *(3 + (7 * n + row) % 300 for n in range(400))]) for row in range(3)]
    settings = replace(GREEDY, max_new_tokens=5)
    assert engine.generate(long, settings) == nano.engine.generate(long, settings)
    alone = laptop_engine(nano, gguf["f16"], max_rows=1)
    assert alone.generate(prompts(nano), GREEDY) == nano.engine.generate(prompts(nano), GREEDY)


@pytest.mark.process
def test_llama_cpp_samples_as_torch_with_a_seed(nano, laptop):
    wild = GenerationSettings(max_new_tokens=12, temperature=0.7, top_p=0.9)
    assert laptop.engine.generate(prompts(nano), wild, seeds=[1, 2, 3]) == nano.engine.generate(
        prompts(nano), wild, seeds=[1, 2, 3]
    )


@pytest.mark.process
def test_llama_cpp_with_beams_and_guidance_equals_torch(nano, laptop):
    for settings in (replace(GREEDY, num_beams=3), replace(GREEDY, guidance=2.0, force_image=True)):
        assert laptop.engine.generate(prompts(nano), settings) == nano.engine.generate(
            prompts(nano), settings
        )


@pytest.mark.process
def test_llama_cpp_ends_at_a_stop(nano, laptop):
    assert laptop.describe(IMAGES, stop=[" "]) == nano.describe(IMAGES, stop=[" "])
    settings = laptop.settings("describe", stop=[" "])
    requests = laptop.build_prompts(
        [user_message([image, nano.tasks.describe]) for image in IMAGES], "describe"
    )
    assert (
        max(map(len, laptop.generate(requests, settings)))
        <= 4
        < len(nano.generate(requests, GREEDY)[0])
    )


@pytest.mark.process
@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m"])
def test_llama_cpp_with_quantised_weights(nano, gguf: dict[str, Path], quant):
    engine = laptop_engine(nano, gguf[quant])
    generated = engine.generate(prompts(nano), replace(GREEDY, force_image=True))
    assert all(nano.read_answer(ids, GREEDY).images == () or len(ids) >= 34 for ids in generated)
    assert gguf[quant].stat().st_size < 0.6 * gguf["f16"].stat().st_size


@pytest.mark.process
def test_llama_cpp_with_a_gguf_of_another_model(nano, gguf: dict[str, Path], tiny_folder: Path):
    from seed_multimodal.inference.backends.llama_cpp import LlamaCppBackend, find_gguf

    with pytest.raises(ConfigError, match="3 \\*.gguf files; choose one with --gguf"):
        find_gguf(gguf["f16"].parent)
    with pytest.raises(CheckpointError, match="seed export-gguf"):
        find_gguf(LLM)
    with pytest.raises(CheckpointError, match="words, width and layers"):
        tiny = MultimodalSystem.from_pretrained(tiny_folder, device="cpu", log=None)
        LlamaCppBackend(tiny_folder / "seed_llama", tiny.tokenizer.vocabulary, gguf["f16"])


@pytest.mark.process
def test_export_gguf_writes_a_file_that_describe_reads(gguf: dict[str, Path], tmp_path, capsys):
    out = tmp_path / "new" / "folder" / "nano.gguf"
    assert main(f"export-gguf --model {NANO} --quant q8_0 --out {out}".split()) == 0
    assert f"seed chat --model {NANO} --engine llama.cpp --gguf {out}" in capsys.readouterr().out
    assert out.read_bytes() == gguf["q8_0"].read_bytes()
    flags = f"--model {NANO} --engine llama.cpp --gguf {out} --device cpu".split()
    assert main(["describe", str(IMAGES[0]), *flags]) == 0
    assert "fox" in capsys.readouterr().out
    assert (
        main(["describe", str(IMAGES[0]), *flags[:-4], "--gguf", str(tmp_path / "none.gguf")]) == 2
    )
    assert "seed export-gguf" in capsys.readouterr().err


@pytest.mark.slow
def test_answers_of_a_completion_server_are_those_of_torch(nano, server: CompletionServer, remote):
    assert answers(remote) == answers(nano)
    images = [body for body in server.bodies if len(body.get("allowed_token_ids", ())) > CODES]
    assert images and all(body["min_tokens"] == body["max_tokens"] == 32 for body in images)
    assert all(
        isinstance(body["prompt"][0], int) and body["temperature"] == 0 for body in server.bodies
    )


def test_completion_server_without_stop_ids(nano, server: CompletionServer, remote):
    server.trims = True
    assert remote.engine.generate(prompts(nano), GREEDY) == nano.engine.generate(
        prompts(nano), GREEDY
    )


def test_completion_server_is_left_at_a_stop(nano, server: CompletionServer, remote):
    """The answer is cut there, and the server's generation is cancelled."""
    description = nano.describe(IMAGES[0])
    server.pause = 0.05
    started = time.monotonic()
    answer = remote.describe(IMAGES[0], stop=[" "], min_new_tokens=200)
    assert description.startswith(answer) and len(answer) < len(description) and " " not in answer
    assert time.monotonic() - started < 5 < 200 * server.pause


@pytest.mark.slow
def test_completion_server_with_threads_and_a_cancelled_request(nano, remote):
    expected = nano.engine.generate(prompts(nano), GREEDY)
    answered = dict[int, list[int]]()

    def ask(thread: int) -> None:
        answered[thread] = []
        for token in remote.engine.submit(prompts(nano)[thread % 3], GREEDY):
            answered[thread].append(token)
            if thread == 7 and len(answered[thread]) == 5:
                break

    together(ask, 8)
    assert [answered[thread] for thread in range(7)] == [
        expected[thread % 3] for thread in range(7)
    ]
    assert answered[7] == expected[1][:5]


def test_completion_server_receives_settings_and_key(
    nano, server: CompletionServer, remote, monkeypatch
):
    wild = GenerationSettings(
        max_new_tokens=9, temperature=0.8, top_p=0.9, top_k=0, repetition_penalty=1.3, seed=5
    )
    first = remote.engine.generate(prompts(nano)[:1], wild)
    body = server.bodies[0]
    assert (
        body["temperature"],
        body["top_p"],
        body["top_k"],
        body["repetition_penalty"],
        body["seed"],
    ) == (0.8, 0.9, -1, 1.3, 5)
    assert (
        str(nano.tokenizer.vocabulary.boi_id) in body["logit_bias"]
    )  # too few tokens for an image
    assert remote.engine.generate(prompts(nano)[:1], wild) == first
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    keyed = MultimodalSystem.from_pretrained(
        NANO, device="cpu", log=None, engine="openai", url=f"{server.url}/v1"
    )
    keyed.engine.generate(prompts(nano)[:1], wild)
    assert server.headers[-1]["Authorization"] == "Bearer secret"


def test_completion_server_that_disconnects(nano, server: CompletionServer, remote):
    server.breaks_after = 3
    with pytest.raises(RequestError, match="broke off its answer"):
        remote.engine.generate(prompts(nano), GREEDY)
    server.shutdown()
    server.server_close()
    with pytest.raises(RequestError, match="No completion server answers at"):
        remote.engine.generate(prompts(nano), GREEDY)
    with pytest.raises(RequestError, match="is not the address of a completion server"):
        MultimodalSystem.from_pretrained(
            NANO, device="cpu", log=None, engine="openai", url="localhost"
        )


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [("nano", {"engine": "openai"}, "--url"), ("nano-x", {"engine": "llama.cpp"}, "SEED-LLaMA")],
)
def test_from_pretrained_with_an_engine_that_does_not_fit(name, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        MultimodalSystem.from_pretrained(name, device="cpu", log=None, **options)


def test_beams_and_guidance_with_a_completion_server_fail(remote):
    with pytest.raises(ConfigError, match="Beams need --engine torch"):
        remote.describe(IMAGES[0], num_beams=2)
    with pytest.raises(ConfigError, match="Guidance needs --engine torch"):
        remote.describe(IMAGES[0], guidance=2.0)


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

    # 1. The scores after a long prompt; llama.cpp keeps keys and values in 16 bits.
    ids = tokenizer.encode_parts([" ".join(TEXTS) * 3, [1, 2, 3, 4]], add_bos=True)
    scores: list[torch.Tensor] = []
    for backend in backends:
        chunk = PromptChunk(backend.prepare(Prompt(ids)), 0, len(ids))
        scores.append(backend.prefill(0, [chunk]).scores[0].float())
    torch.testing.assert_close(*scores, atol=0.05, rtol=0.01)

    # 2. Answers.
    prompts = [Prompt(tokenizer.encode_parts([text], add_bos=True)) for text in TEXTS]
    settings = replace(GREEDY, max_new_tokens=8)
    answers = [Engine(backend, tokenizer).generate(prompts, settings) for backend in backends]
    assert answers[0] == answers[1]
    assert len(set(map(tuple, answers[0]))) == len(TEXTS)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("gemma2", {}, "model_type is 'gemma2'; llama.cpp files are written and read of llama,"),
        ("mistral sliding", {}, "sliding windows cannot be exported"),
        ("llama", {"attention_bias": True}, "only models without biases"),
        ("smollm3", {}, r"every fourth layer, but no_rope_layers is \[1, 0\]"),
    ],
)
def test_export_gguf_of_what_llama_cpp_computes_otherwise(architecture, fields, message, tmp_path):
    from seed_multimodal.inference.gguf import export_gguf

    random_llm(architecture, 356, **fields).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        export_gguf(tmp_path, WORDS, tmp_path / "f16.gguf", "f16")


def test_interleaved_rows_of_rotary_weights():
    from seed_multimodal.inference.gguf import interleaved

    rows = torch.arange(8)[:, None].repeat(1, 2)  # two heads of width 4
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def together(work: Any, count: int) -> None:
    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
