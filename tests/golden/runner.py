"""Golden fixtures: recorded inputs and outputs of the original programs, one folder per fixture.

    pytest tests/golden                          # the fixtures in tests/golden/data
    pytest tests/golden --golden-dir DIR         # every fixture folder in DIR
    pytest tests/golden -k preprocessing         # one kind

Each folder in DIR is one test. Its name starts with its kind (`seed2_tokenizer_q8` is of kind
`seed2_tokenizer`). A module of `tests/golden/kinds` has a table `KINDS` of kinds and their
functions `check(recording)`, which raise AssertionError if the library disagrees. A check derives
every size from the fixture, because further fixtures of a kind have other sizes and seeds; the
module's docstring lists what is not compared, and `UNREAD` names recorded outputs that no check
reads: any other that stays unread is a failure. Large json files in tests/golden/data are
compressed (`x.json.gz`); the functions below read `x.json` or `x.json.gz`.
"""

from __future__ import annotations

import fnmatch
import functools
import gzip
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEFAULT_DIR = HERE / "data"
CLOSE = 1e-5, 1e-4  # absolute and relative tolerance of a network's outputs
EXACT = 0.0, 0.0


def fixture_folders(directory: Path) -> list[Path]:
    """Every fixture folder directly inside `directory`, sorted; raises ValueError when there is
    none."""
    folders = sorted(p for p in directory.glob("*") if p.is_dir() and p.name[0] not in "._")
    if not folders:
        raise ValueError(f"--golden-dir {directory}: there is no fixture folder in it.")
    return folders


@functools.cache
def load_kinds() -> dict[str, tuple[Check, tuple[str, ...]]]:
    """Kind → its check and the outputs that it leaves unread, from every module in `kinds/`."""
    kinds = {}
    for file in sorted((HERE / "kinds").glob("*.py")):
        module = importlib.import_module(f"kinds.{file.stem}")
        unread = getattr(module, "UNREAD", {})
        kinds |= {kind: (check, unread.get(kind, ())) for kind, check in module.KINDS.items()}
    return kinds


def kind_of(folder, kinds: Mapping) -> str:
    """The longest kind that starts the folder's name; AssertionError when there is none."""
    matches = [kind for kind in kinds if folder.name.startswith(kind)]
    assert matches, (
        f"{folder.name}: no module in tests/golden/kinds checks this kind "
        f"({', '.join(sorted(kinds))})."
    )
    return max(matches, key=len)


def check_fixture(folder):
    """Run the check of a fixture's kind; it must read each recorded output."""
    kinds = load_kinds()
    check, unread = kinds[kind_of(folder, kinds)]
    recording = Recording(folder)
    check(recording)
    if (folder / "outputs.safetensors").is_file():
        rest = recording.outputs.keys() - recording.outputs.read
        rest -= {name for name in rest if any(fnmatch.fnmatch(name, p) for p in unread)}
        assert not rest, f"{folder.name}: no check reads {sorted(rest)}"


# ---- files of a fixture


class Tensors(dict[str, Any]):
    """Recorded tensors. `read`: the names of those that a check has read, in the whole file."""

    def __init__(self, values: Mapping, prefix: str = "", read: set[str] | None = None):
        super().__init__(values)
        self.prefix = prefix
        self.read: set[str] = set() if read is None else read

    def __getitem__(self, name):
        self.read.add(self.prefix + name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        return self[name] if name in self else default

    def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        return ((name, self[name]) for name in self)

    def part(self, name) -> Tensors:
        """The tensors whose names begin with `name.`, without this prefix."""
        start = f"{name}."
        values = {
            key.removeprefix(start): super(Tensors, self).__getitem__(key)
            for key in self
            if key.startswith(start)
        }
        return Tensors(values, self.prefix + start, self.read)

    def parts(self) -> list[str]:
        """First words of the names, sorted."""
        return sorted({name.partition(".")[0] for name in self})

    def compare(self, prefix: str = "", tolerance: tuple[float, float] = CLOSE, /, **actual):
        """`assert_close` of every value with the recorded tensor `prefix + its keyword`."""
        for name, value in actual.items():
            self.close(prefix + name, value, tolerance)

    def close(self, name, actual, tolerance: tuple[float, float] = CLOSE):
        assert_close(actual, self[name], *tolerance, what=self.prefix + name)


@dataclass
class Recording:
    """The files of a fixture."""

    folder: Path

    def json(self, name):
        return read_json(self.folder / name)

    def tensors(self, name) -> Tensors:
        from safetensors.torch import load_file

        path = self.folder / f"{name}.safetensors"
        assert path.is_file(), f"{path}: the fixture lacks this file."
        return Tensors(load_file(path))

    @functools.cached_property
    def config(self):
        return self.json("config.json")

    @functools.cached_property
    def meta(self):
        return self.json("meta.json")

    @functools.cached_property
    def cases(self):
        return self.json("cases.json")

    @functools.cached_property
    def weights(self) -> Tensors:
        return self.tensors("weights")

    @functools.cached_property
    def inputs(self) -> Tensors:
        return self.tensors("inputs")

    @functools.cached_property
    def outputs(self) -> Tensors:
        return self.tensors("outputs")

    def case(self) -> tuple[Any, Tensors, Tensors, Tensors]:
        """The configuration, and the tensors of weights, inputs and outputs."""
        return self.config, self.weights, self.inputs, self.outputs

    def files(self, pattern: str) -> list[Path]:
        """Files that match, sorted, by their names without `.gz`; not none."""
        files = set(self.folder.glob(pattern)) | {
            path.with_name(path.name[:-3]) for path in self.folder.glob(pattern + ".gz")
        }
        assert files, f"{self.folder}: the fixture has no {pattern}."
        return sorted(files)

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer of the fixture, of an `llm_sequences*` fixture next to it, or of
        tests/golden/data."""
        for candidate in (self.folder, *sorted(self.folder.parent.glob("llm_sequences*"))):
            if (candidate / "tokenizer" / "tokenizer.model").is_file():
                return candidate / "tokenizer"
        return DEFAULT_DIR / "llm_sequences" / "tokenizer"


Check = Callable[[Recording], None]


def read_text(path) -> str:
    """A text file of a fixture, compressed or not."""
    packed = path.with_name(path.name + ".gz")
    assert path.is_file() or packed.is_file(), f"{path}: the fixture lacks this file."
    data = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
    return data.decode("utf-8")


def read_json(path):
    return json.loads(read_text(path))


def read_json_lines(path) -> list:
    """A file with one json value per line; not empty."""
    values = [json.loads(line) for line in read_text(path).splitlines() if line.strip()]
    assert values, f"{path}: the fixture holds no cases."
    return values


# ---- comparisons


def assert_close(actual, expected, atol: float, rtol: float = 0.0, what="tensor"):
    """Same shape and |actual - expected| <= atol + rtol * |expected| everywhere; names `what` and
    the worst element."""
    import torch

    got = torch.as_tensor(actual).detach().double().cpu()
    want = torch.as_tensor(expected).double().cpu()
    assert got.shape == want.shape, (
        f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    )
    if got.numel() == 0:
        return
    assert torch.isfinite(got).eq(torch.isfinite(want)).all(), (
        f"{what}: not finite in other places than expected"
    )
    excess = (got - want).abs().nan_to_num() - (atol + rtol * want.abs().nan_to_num())
    worst = int(excess.argmax())
    assert excess.max() <= 0, (
        f"{what}: element {worst} is {got.flatten()[worst]:.6g}, expected "
        f"{want.flatten()[worst]:.6g} (atol {atol:g}, rtol {rtol:g}; "
        f"{int((excess > 0).sum())} of {got.numel()} elements are off)"
    )


def assert_gradients(
    model,
    want: Tensors,
    norms: Mapping[str, float | None],
    atol: float = 1e-6,
    norm_tolerance: tuple[float, float] = (1e-5, 1e-3),
):
    """Gradients by parameter (of large tables the first rows) and their norms; None: there is no
    gradient."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, value in want.items():
        gradient = gradients[name]
        want.close(name, gradient[: len(value)] if value.ndim else gradient, (atol, 1e-3))
    for name, norm in norms.items():
        assert_same(gradients[name] is None, norm is None, f"{want.prefix}{name} has no gradient")
        if norm is not None:
            assert_close(gradients[name].norm(), norm, *norm_tolerance, f"gradient norm of {name}")


def assert_same(actual, expected, what):
    """Exact equality of plain Python values."""
    assert actual == expected, (
        f"{what}:\n  got      {str(actual)[:1500]!r}\n  expected {str(expected)[:1500]!r}"
    )
