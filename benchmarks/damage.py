"""Random damage to the content of files, for `fuzz.py`."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zipfile
from typing import Any

INTEGERS = (0, 1, -1, 2**31 - 1, -(2**31), 2**32, 2**63 - 1, -(2**63))
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    float("nan"),
    "",
    "\ud800",
    "../" * 50,
    [],
    {},
    [[[]]],
    {"a": {"b": []}},
    "x" * 10_000,
)


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """A copy with a few changes: flipped bits, integers, pieces that are removed or repeated."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        # Headers are at the beginning, or the end.
        position = rng.randrange(max(len(data), 1))
        if rng.random() < 0.5:
            position = min(int(rng.expovariate(1 / 100)), max(len(data) - 1, 0))
        elif rng.random() < 0.3:
            position = max(len(data) - 1 - int(rng.expovariate(1 / 100)), 0)
        length = rng.choice((1, 4, 16, 500))
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            packed = struct.pack("<q", rng.choice(INTEGERS))
            data[position : position + 8] = packed[: rng.choice((1, 4, 8))]
        elif kind == 2:
            del data[position : position + length]
        elif kind == 3:
            data[position:position] = data[position : position + length]
        elif kind == 4:
            data[position : position + length] = rng.randbytes(length)
        elif rng.random() < 0.3:
            del data[position:]
    return bytes(data)


def damage_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one change somewhere."""
    if rng.random() < 0.2 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(VALUES)
    copy = value.copy()
    key = rng.choice([*copy]) if isinstance(copy, dict) else rng.randrange(len(copy))
    kind = rng.random()
    if kind < 0.15:
        del copy[key]
    elif kind < 0.25 and isinstance(copy, dict):
        copy[f"{key}x"] = copy.pop(key)
    else:
        copy[key] = damage_value(copy[key], rng)
    return copy


def damage_json(content: bytes, rng: random.Random) -> bytes:
    """Changes of values, or of bytes."""
    if rng.random() < 0.3:
        return damage_bytes(content, rng)
    return json.dumps(damage_value(json.loads(content), rng)).encode()


def damage_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines()
    index = rng.randrange(len(lines))
    lines[index] = damage_json(lines[index], rng)
    return b"\n".join(lines)


def damage_tar(content: bytes, rng: random.Random) -> bytes:
    """Half of the headers that are changed get a valid checksum."""
    data = bytearray(damage_bytes(content, rng))
    if rng.random() < 0.5 and len(data) >= tarfile.BLOCKSIZE:
        begin = rng.randrange(len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        header = data[begin : begin + tarfile.BLOCKSIZE]
        first, size = rng.choice(((0, 100), (124, 12), (156, 1), (345, 155)))  # name, size, type …
        length = rng.randint(1, size)
        header[first : first + length] = rng.randbytes(length)
        checksum, _ = tarfile.calc_chksums(bytes(header))
        header[148:156] = b"%06o\0 " % checksum
        data[begin : begin + tarfile.BLOCKSIZE] = header
    return bytes(data)


def damage_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Changes of the header's JSON, its length kept right, or of bytes."""
    if rng.random() < 0.4:
        return damage_bytes(content, rng)
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(damage_value(json.loads(content[8 : 8 + length]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def damage_torch(content: bytes, rng: random.Random) -> bytes:
    """Changes of the pickle, its checksum in the zip kept right, or of bytes."""
    if rng.random() < 0.3:
        return damage_bytes(content, rng)
    damaged = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(damaged, "w") as target:
        for name in source.namelist():
            member = source.read(name)
            if name.endswith("/data.pkl"):
                member = damage_bytes(member, rng)
            target.writestr(name, member)
    return damaged.getvalue()
