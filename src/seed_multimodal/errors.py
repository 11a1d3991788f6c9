"""Errors for users: one clear sentence that names the file, key or sample.

Everything the package refuses raises a `SeedError`; the command line prints its sentence without a traceback
(`--debug` shows it). Programming errors stay ordinary exceptions and are never caught.
"""

from __future__ import annotations

# What each extra of pyproject.toml brings, as it is imported; a module of several extras stands in one of them.
EXTRAS = {
    "train": ("deepspeed", "torchdata", "hydra", "peft", "tensorboard", "pyarrow", "cv2", "matplotlib"),
    "demo": ("gradio", "flask", "werkzeug", "waitress", "requests", "prometheus_client", "bitsandbytes"),
    "eval": ("torchmetrics", "torch_fidelity", "pycocoevalcap"),
    "lavit": ("spacy",),
    "laptop": ("llama_cpp", "gguf"),
    "harness": ("lmms_eval",),
}
# The packages of modules that are called otherwise.
PACKAGES = {"cv2": "opencv-python-headless", "hydra": "hydra-core", "torch_fidelity": "torch-fidelity",
            "llama_cpp": "llama-cpp-python", "lmms_eval": "lmms-eval", "prometheus_client": "prometheus-client",
            "werkzeug": "flask"}


class SeedError(Exception):
    """Base of every refusal; `str(error)` is the sentence shown to the user."""


class ImageError(SeedError):
    """A picture that cannot be read, or must not be (limits); the sentence starts with its name."""


class CheckpointError(SeedError):
    """Weights that are missing, damaged, unsafe or of another model."""


class CodesError(SeedError):
    """Image codes of the wrong number or outside the codebook."""


class ConfigError(SeedError):
    """A setting that is unknown, of the wrong type or contradictory."""


class DataError(SeedError):
    """A record, shard or annotation file that does not hold what it must."""


class RequestError(SeedError):
    """A request to a server or system that cannot be answered as asked."""


class GenerationError(SeedError):
    """The language model's answer does not hold what was asked for (for example no picture)."""


class SeedWarning(UserWarning):
    """Something a user should look at, in one sentence; the work goes on."""


def first_line(error: BaseException, longest: int = 300) -> str:
    """The first line of another library's error without its full stop, or the error's type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:longest] if lines else type(error).__name__


def package_of(module: str) -> str:
    """The package that a module belongs to."""
    top = module.partition(".")[0]
    return PACKAGES.get(top, top)


def how_to_install(*modules: str) -> str:
    """`bash install.sh --extras demo, or pip install gradio`, of modules of one extra; "" for those of none."""
    top = modules[0].partition(".")[0]
    extra = next((extra for extra, brought in EXTRAS.items() if top in brought), "")
    return extra and f"bash install.sh --extras {extra}, or pip install {' '.join(map(package_of, modules))}"


def counted(number: int, noun: str) -> str:
    """`1 unit`, `2,000 units`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
