"""One system in several threads: answers are those of calls one after another, and an unread stream stops nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seed_multimodal.systems import pictures
from seed_multimodal.systems.llama_tokenizer import SeedLlamaTokenizer
from seed_multimodal.systems.seed_llama import SeedLlama

WILD = {"temperature": 3.0, "top_p": 1.0, "top_k": 0}


def picture(number: int) -> Image.Image:
    return Image.fromarray((np.random.default_rng(number).random((30, 40, 3)) * 255).astype(np.uint8))


@contextmanager
def watched(module: torch.nn.Module) -> Iterator[dict[str, int]]:
    """Counts passes through `module`, and how many ran at the same time at most; a pass takes a little longer."""
    counts = {"passes": 0, "inside": 0, "most": 0}
    guard = threading.Lock()

    def enter(*_: Any) -> None:
        with guard:
            counts["passes"] += 1
            counts["inside"] += 1
            counts["most"] = max(counts["most"], counts["inside"])
        time.sleep(0.001)

    def leave(*_: Any) -> None:
        with guard:
            counts["inside"] -= 1

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def jobs(system: SeedLlama) -> list[Callable[[], Any]]:
    """Every kind of request, with seeds of their own."""
    messages = [{"role": "user", "content": [picture(1), "hello"]}]

    def streamed(seed: int) -> Any:
        events = list(system.chat(messages, stream=True, max_new_tokens=30, seed=seed, **WILD))
        return events[-1]["answer"].ids

    return [work for seed in range(3) for work in (
        lambda seed=seed: system.chat(messages, max_new_tokens=30, seed=seed, **WILD).ids,
        lambda seed=seed: streamed(seed),
        lambda seed=seed: np.asarray(system.draw("a fish", seed=seed, **WILD)).tolist(),
        lambda seed=seed: np.asarray(system.reconstruct(picture(seed), seed=seed, num_inference_steps=2 + seed)[0]
                                     ).tolist(),
        lambda seed=seed: np.asarray(system.reconstruct(picture(seed), scheduler="EulerDiscreteScheduler")[0]).tolist(),
        lambda seed=seed: system.tokenize([picture(seed), picture(seed + 1)]).tolist(),
        lambda seed=seed: system.chat(messages, max_new_tokens=20, seed=seed, num_beams=2, **WILD).ids)]


@pytest.mark.slow
def test_many_threads_answer_as_one_after_another(tiny_folder: Path) -> None:
    system = SeedLlama.from_pretrained(tiny_folder, device="cpu", log=None)
    work = jobs(system)
    with watched(system.llm) as llm, watched(system.pictures.model.visual_encoder) as tower:
        with ThreadPoolExecutor(8) as pool:  # first: the de-tokenizer is loaded by whoever comes first
            together = [one.result() for one in [pool.submit(job) for job in work]]
        assert llm["most"] == 1 and tower["most"] == 1 and llm["passes"] > 100
    assert together == [job() for job in work]


def test_torchs_global_state_is_left_alone(tiny_folder: Path) -> None:
    """Also by what is loaded when the first picture is drawn; a call without a seed takes one number."""
    before, plain = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    system = SeedLlama.from_pretrained(tiny_folder, log=None)
    system.draw("a fish", num_inference_steps=1)
    SeedLlamaTokenizer.from_pretrained(tiny_folder / "seed_tokenizer", load_diffusion=True)
    for job in jobs(system):
        job()
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], plain)  # type: ignore[index]
    system.describe(picture(1), max_new_tokens=2, **WILD)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randint(2**63 - 1, ())
    assert torch.equal(torch.get_rng_state(), after)


def test_a_stream_that_nobody_reads_on_stops_nobody(tiny: SeedLlama) -> None:
    messages = [{"role": "user", "content": "hello"}]
    idle = tiny.chat(messages, stream=True, max_new_tokens=60, **WILD)
    unread = tiny.chat(messages, stream=True, max_new_tokens=60, seed=1, **WILD)
    next(unread)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(tiny.describe, picture(2)).result(timeout=60) == tiny.describe(picture(2))
    assert list(unread)[-1]["answer"].ids == tiny.chat(messages, max_new_tokens=60, seed=1, **WILD).ids
    idle.close()


def test_pictures_of_earlier_turns_are_encoded_once(tiny: SeedLlama, tmp_path: Path) -> None:
    picture(11).save(tmp_path / "a.png")
    first = {"role": "user", "content": [tmp_path / "a.png", picture(12), "hello"]}
    again = {"role": "user", "content": [(tmp_path / "a.png").read_bytes(), picture(13), "and this?"]}
    with watched(tiny.pictures.model.visual_encoder) as tower:
        said = tiny.chat([first], max_new_tokens=3)
        assert tower["passes"] == 1  # one batch
        turns = [first, {"role": "assistant", "content": said}, again]
        answer = tiny.chat(turns, max_new_tokens=3)
        assert tower["passes"] == 2 and tiny.chat(turns, max_new_tokens=3).ids == answer.ids
        assert tiny.ask(picture(13), "What is it?") and tower["passes"] == 2
        (tmp_path / "a.png").unlink()
        picture(14).save(tmp_path / "a.png")  # the same name, another content
        tiny.chat(turns, max_new_tokens=3)
        assert tower["passes"] == 3
    codes = [tiny.tokenize(picture(number))[0].tolist() for number in (14, 12)]
    fresh = tiny.chat([{"role": "user", "content": [*codes, "hello"]}], max_new_tokens=3)
    assert tiny.chat([first], max_new_tokens=3).ids == fresh.ids


def test_codes_that_are_kept_are_bounded(tiny: SeedLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pictures.REMEMBERED <= 10_000
    monkeypatch.setattr("seed_multimodal.systems.pictures.REMEMBERED", 3)
    pixels = torch.stack([tiny.transform(picture(number)) for number in range(5)])
    want = tiny.encode_pixels(pixels)
    for order in (range(5), (4, 4, 0), (3, 2, 1, 0), (0, 0)):
        assert torch.equal(tiny.pictures.encode_once(pixels[[*order]]), want[[*order]])
    with watched(tiny.pictures.model.visual_encoder) as tower:
        tiny.pictures.encode_once(pixels[[0, 1]])
        assert tower["passes"] == 0
        tiny.pictures.encode_once(pixels[[4]])
        assert tower["passes"] == 1
    assert len(tiny.pictures._known) == 3
