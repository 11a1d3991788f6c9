"""User-facing errors; messages name the file, key or sample.

The command line prints a `SeedError` without a traceback (`--debug` shows it). Programming errors
are ordinary exceptions and are never caught.
"""

from __future__ import annotations

import os
import re

# Modules of each extra of pyproject.toml; a module of several extras is listed once.
EXTRAS = {
    "train": "deepspeed torchdata hydra peft tensorboard pyarrow cv2 matplotlib",
    "demo": "gradio httpx flask flask_cors werkzeug waitress requests prometheus_client "
    "bitsandbytes torchao",
    "eval": "torchmetrics torch_fidelity pycocoevalcap",
    "lavit": "spacy",
    "laptop": "llama_cpp gguf",
    "harness": "lmms_eval",
    "ray": "ray",
}
# Packages whose name differs from the module.
PACKAGES = {
    "cv2": "opencv-python-headless",
    "hydra": "hydra-core",
    "torch_fidelity": "torch-fidelity",
    "llama_cpp": "llama-cpp-python",
    "lmms_eval": "lmms-eval",
    "prometheus_client": "prometheus-client",
    "flask_cors": "flask-cors",
    "werkzeug": "flask",
}


# The first bytes of files that come in place of images and weights → what they are, what to do.
_CONTENTS = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file; run git lfs pull"),
    (rb"\s*<(!doctype html|html|head|body)", "an HTML page, not the file; download it again"),
    (rb".{0,1000}<svg", "an SVG drawing; export it as PNG"),
    (rb"%PDF", "a PDF document; export its page as PNG"),
    (rb"%!PS", "a PostScript drawing; export it as PNG"),
    (rb"\xff\x0a|\0{3}\x0cJXL ", "a JPEG XL image; convert it to PNG"),
    (
        rb".{4}ftyp(hei|hev|mif1|msf1)",
        "a HEIC image; convert it to JPEG, or pip install pillow-heif",
    ),
    (rb".{4}ftyp(?!avi)", "a video; give one of its frames"),
    (rb"\0+$", "only zeros, as a download or copy that was interrupted"),
)


class SeedError(Exception):
    """Base of user-facing errors; `str(error)` is the message."""


class ImageError(SeedError):
    """An unreadable image, or one outside the limits; the message starts with its name."""


class CheckpointError(SeedError):
    """Missing, damaged or unsafe weights, or of another model."""


class CodesError(SeedError):
    """Image codes of the wrong number or outside the codebook."""


class ConfigError(SeedError):
    """An unknown, invalid or conflicting setting."""


class DataError(SeedError):
    """An invalid record, shard or annotation file."""


class ReadError(SeedError):
    """A file that the machine or the network could not read, after all attempts; never the fault of
    a record."""


class RequestError(SeedError):
    """An invalid request to a server or system; `field`: the wrong one of an HTTP request."""

    def __init__(self, message: str, field: str = "") -> None:
        self.field = field and short_name(field, 80)
        super().__init__(f"{self.field}: {message}" if field else message)


class GenerationError(SeedError):
    """The language model's answer lacks the requested content (for example an image)."""


class SeedWarning(UserWarning):
    """A user-facing warning; the program continues."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error without its full stop, or the error's type."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0].rstrip(".")[:300]


def printable(name: str) -> str:
    """A name in one line of a terminal: line feeds and other control characters are escaped."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda control: repr(control[0])[1:-1], name)


def short_name(name: str, length: int = 60) -> str:
    """A name for a message; of a long one, its beginning and end."""
    name = printable(name) or "''"
    half = length // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def foreign_content(head: bytes) -> str:
    """What the first bytes of a file are if they are never data, and what to do; else ""."""
    head = head.removeprefix(b"\xef\xbb\xbf")
    for pattern, description in _CONTENTS:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            return description
    return ""


def name_bytes(head: bytes) -> str:
    """What the first bytes of a file that cannot be read are, and what to do; "": unknown."""
    if not head:
        return "empty (0 bytes)"
    content = foreign_content(head)
    if content:
        return content
    # A character may be cut at the end.
    text = head.decode("utf-8", errors="replace").removesuffix("�")
    is_text = "�" not in text and all(letter.isprintable() or letter.isspace() for letter in text)
    return f"a text: {short_name(text.strip())!r}" if is_text else ""


def name_content(file: str | os.PathLike[str]) -> str:
    """`name_bytes` of a file, for one that was read without success."""
    try:
        with open(file, "rb") as handle:
            return name_bytes(handle.read(2000))
    except OSError:
        return ""


def package_of(module: str) -> str:
    """The package of a module."""
    top = module.partition(".")[0]
    return PACKAGES.get(top, top)


def install_hint(*modules: str) -> str:
    """`bash install.sh --extras demo, or pip install gradio`, for modules of one extra; else ""."""
    top = modules[0].partition(".")[0]
    for extra, extra_modules in EXTRAS.items():
        if top in extra_modules.split():
            packages = " ".join(map(package_of, modules))
            return f"bash install.sh --extras {extra}, or pip install {packages}"
    return ""


def pluralize(count: int, noun: str) -> str:
    """`1 unit`, `2,000 units`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
