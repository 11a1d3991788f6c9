"""Images of odd sizes and kinds for every route of the shipped systems, for `fuzz.py`."""

from __future__ import annotations

import base64
import io
import json
import logging
import random

from damage import damage_bytes
from PIL import Image
from shared import ROOT

from seed_multimodal.images.io import image_to_bytes

SYSTEMS = ("nano", "nano-x", "nano-lavit")


class ImageRoutes:
    """Requests with images of odd sizes and kinds to all routes of the shipped systems."""

    def __init__(self) -> None:
        from seed_multimodal.pipelines.base import MultimodalSystem
        from seed_multimodal.serving.app import create_app

        logging.disable(logging.CRITICAL)
        self.clients = []
        for name in SYSTEMS:
            system = MultimodalSystem.from_pretrained(
                ROOT / "pretrained" / name, device="cpu", log=None
            )
            self.clients.append(create_app(system).test_client())

    def image(self, rng: random.Random) -> bytes:
        sides = (1, rng.choice((1, 2, 3, 17, 64, 333, 2000, 16_000)))
        size = rng.choice((sides, sides[::-1]))
        kind = rng.choice(("PNG", "PNG", "JPEG", "WEBP"))
        modes = {"JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA")}
        mode = rng.choice(modes.get(kind, ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I")))
        content = image_to_bytes(Image.new(mode, size), kind)
        return damage_bytes(content, rng) if rng.random() < 0.2 else content

    def case(self, rng: random.Random) -> None:
        files = [self.image(rng) for _ in range(rng.choice((1, 1, 1, 2)))]
        encoded = [base64.b64encode(file).decode() for file in files]
        urls = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}
            for text in encoded
        ]
        text = {"type": "text", "text": "What is this?"}
        message = {"role": "user", "content": [*urls, text][: rng.choice((1, 2, 3))]}
        path, body = rng.choice(
            (
                ("/generate", {"text": "<image>" * len(files), "images": encoded}),
                ("/v1/chat/completions", {"messages": [message], "max_tokens": 4}),
                ("/v1/images/tokens", {"images": encoded}),
                ("/v1/images/edits", {}),
            )
        )
        client = rng.choice(self.clients)
        if body:
            response = client.post(path, json={"max_new_tokens": 4, **body})
        else:
            form = {"prompt": "Make it night.", "image": [(io.BytesIO(f), "a") for f in files]}
            response = client.post(path, data=form)
        content = json.loads(response.get_data(as_text=True))
        if response.status_code not in (200, 400):
            raise AssertionError(f"{path}: status {response.status_code}: {content}")
