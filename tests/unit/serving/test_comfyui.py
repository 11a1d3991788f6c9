"""ComfyUI's nodes without ComfyUI: as it calls them, against nano's server on loopback."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from real_processes import free_port
from repository import ROOT
from served import Running, read

from seed_multimodal import proxies

TOKEN = "a secret of nobody"


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    file = ROOT / "integrations" / "comfyui" / "seed_multimodal_nodes.py"
    spec = importlib.util.spec_from_file_location("seed_multimodal_nodes", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def address(nano) -> str:
    return Running(nano, token=TOKEN).root


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    monkeypatch.setenv("SEED_TOKEN", TOKEN)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # for the internet, not this machine


def run(nodes: ModuleType, name: str, **inputs: Any) -> tuple[Any, ...]:
    """A node as ComfyUI calls it: inputs by name, defaults of its widgets, outputs by type."""
    node = nodes.NODE_CLASS_MAPPINGS[f"SeedMultimodal{name}"]
    assert node.CATEGORY and nodes.NODE_DISPLAY_NAME_MAPPINGS[f"SeedMultimodal{name}"]
    types = node.INPUT_TYPES()
    assert inputs.keys() <= {*types["required"], *types.get("optional", {})}
    for key, (_, *options) in types["required"].items():
        if options:
            inputs.setdefault(key, options[0]["default"])
    outputs = getattr(node(), node.FUNCTION)(**inputs)
    assert len(outputs) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    for output, kind in zip(outputs, node.RETURN_TYPES, strict=True):
        if kind == "IMAGE":
            assert output.dtype == torch.float32 and output.ndim == 4 and output.shape[-1] == 3
            assert 0 <= output.min() and output.max() <= 1
        elif kind == "STRING":
            assert isinstance(output, str)
    return outputs


def tensor(name: str) -> torch.Tensor:
    pixels = np.asarray(Image.open(ROOT / "images" / name).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 255)[None]


def image(batch: torch.Tensor) -> Image.Image:
    return Image.fromarray((batch[0] * 255).round().to(torch.uint8).numpy())


@pytest.mark.parametrize(
    "url, is_direct",
    [
        *((f"http://{host}:7890/v1", True) for host in ("127.0.0.1", "localhost", "[::1]")),
        *(
            (f"http://{host}", True)
            for host in ("10.1.2.3", "192.168.0.9", "backend", "host.docker.internal", "a.local")
        ),
        *(
            (f"https://{host}", False)
            for host in ("8.8.8.8", "[2606:4700::1111]", "seed.example.com")
        ),
        ("http://[::1", False),
    ],
)
def test_proxies_are_for_hosts_of_the_internet(nodes: ModuleType, url, is_direct):
    # The node's copy of the rule is the package's, which it does not import.
    assert nodes.direct(url) is proxies.direct(url) is is_direct


def test_ask_describes_an_image(nodes: ModuleType, address: str):
    # The address as the server prints it, but without a scheme.
    (server,) = run(nodes, "Server", address=f"{address.removeprefix('http://')}/generate")
    text, notes = run(nodes, "Ask", server=server, images=tensor("fox_and_snowman.png"))
    assert "fox" in text and "snowman" in text and notes == ""
    question = "Is there a fluent zebra?"
    _, notes = run(nodes, "Ask", server=server, images=tensor("fox.png"), question=question)
    assert "zebra" in notes


@pytest.mark.slow
def test_draw_is_what_the_library_draws(nodes: ModuleType, address: str, nano):
    prompt = "a noto zebra left of a tree in a meadow"
    images, notes = run(nodes, "Draw", server=address, prompt=prompt, count=2, seed=3)
    assert images.shape[0] == 2 and "zebra" in notes
    # With several threads, a batch of two is rounded otherwise than one image.
    expected = np.asarray(nano.draw(prompt, seed=3), np.int16)
    assert np.abs(np.asarray(image(images), np.int16) - expected).max() <= 1


@pytest.mark.slow
def test_chat_continues_a_history_that_edit_began(nodes: ModuleType, address: str):
    # 1. Each image of a batch is edited.
    crabs = tensor("two_crabs.png")
    prompt = "Put it at night."
    images, _ = run(nodes, "Edit", server=address, images=crabs.repeat(2, 1, 1, 1), prompt=prompt)
    assert images.shape[0] == 2
    # 2. A conversation about an image, with an image in its last answer.
    message = "How many crabs are there?"
    text, images, history, notes = run(
        nodes, "Chat", server=address, message=message, images=images[:1]
    )
    assert text == "Two." and images.max() == 0 and notes == nodes.NO_IMAGE
    text, images, history, notes = run(
        nodes, "Chat", server=address, message=prompt, history=history
    )
    assert "night" in text and images.max() > 0 and len(history) == 4 and notes == ""


@pytest.mark.slow
@pytest.mark.parametrize("count, side", [(1, 3000), (6, 1700)])
def test_large_images_are_reduced_to_what_the_server_takes(nodes: ModuleType, count, side):
    # Noise has the largest files: three bytes for each pixel, and a third more in base64.
    batch = torch.zeros(1, side, side, 3).expand(count, -1, -1, -1)
    sizes = [read(url).size for url in nodes.data_urls(batch)]
    assert sum(width * height * 4 for width, height in sizes) <= 64 << 20
    assert min(sizes) > (1000, 1000)


def test_errors_are_the_servers(nodes: ModuleType, address: str, nano, monkeypatch):
    small = Running(nano, token=TOKEN, max_body_bytes=1 << 20).root
    with pytest.raises(RuntimeError, match=r"\(400\)"):
        run(nodes, "Chat", server=address, message=" ")
    # The server ends the connection while the request is written; its answer may come through.
    with pytest.raises(RuntimeError, match=r"3 MiB|Entity Too Large"):
        run(nodes, "Draw", server=small, prompt="x" * (3 << 20))
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RuntimeError, match=nobody):
        run(nodes, "Draw", server=nobody)
    monkeypatch.setenv("SEED_TOKEN", "wrong")
    with pytest.raises(RuntimeError, match=r"\(401\)"):
        run(nodes, "Draw", server=address)
