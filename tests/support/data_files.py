"""Files of training data: JPEG noise, shards, JSON lines."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import webdataset
from random_images import noise

from seed_multimodal.data.decoders.base import TrainingSequence
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.images.io import image_to_bytes
from seed_multimodal.language.vocabulary import IGNORE_INDEX


def jpeg(index, width=64, height=64) -> bytes:
    """The bytes of image `index`."""
    return image_to_bytes(noise(index, (width, height)), "JPEG", quality=90)


def write_tar(path, samples: Iterable[Mapping]) -> Path:
    """A shard by webdataset's writer; a sample is `{"__key__": .., "jpg": bytes, ..}`."""
    with webdataset.TarWriter(str(path), encoder=True) as writer:
        for sample in samples:
            writer.write(dict(sample))
    return path


def shard(path, records: Iterable[dict | bytes]) -> Path:
    """A webdataset tar of KEY.json members; bytes are kept as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Broken members are written as they are.
    samples = []
    for index, record in enumerate(records):
        content = record if isinstance(record, bytes) else json.dumps(record).encode()
        samples.append((f"{index:05d}", {"json": content}))
    write_shard(path, samples)
    return path


def write(path, content: str | bytes) -> Path:
    """A file of this text or these bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(path, records: Iterable[dict | str]) -> Path:
    """A jsonl file; texts are written as they are."""
    texts = [record if isinstance(record, str) else json.dumps(record) for record in records]
    return write(path, "".join(f"{text}\n" for text in texts))


def write_any(path, content) -> Path:
    """A text as it is, lines of JSON (`.jsonl`), or JSON."""
    if not isinstance(content, str):
        items = content if path.suffix == ".jsonl" else [content]
        content = "\n".join(map(json.dumps, items))
    return write(path, content)


def fields_of(source) -> list[dict]:
    """The fields of all records."""
    return [source.read(index).fields for index in range(len(source))]


def learned(sequence: TrainingSequence) -> list[int]:
    """Labels without those that are ignored."""
    return [label for label in sequence.labels if label != IGNORE_INDEX]


@contextmanager
def serve_folder(folder) -> Iterator[str]:
    """The URL of a folder on a server on loopback."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
