"""Two CUDA devices on a machine without a GPU, to find mistakes of device and dtype, and races.

    python tests/support/pretend_cuda.py SCRIPT [ARGUMENT ...]     # sees two devices of 80 GiB

Tensors of `cuda:N` are ordinary ones whose memory is the host's: `pretend_cuda.cpp` gives torch's
dispatcher CUDA kernels that check the devices of all arguments (tensors, indices, generators) and
then call the CPU's kernels. Device guards, dtype rules, autocast, autograd, module moves and
`from_pretrained(device_map=…)` are torch's own. Answers equal the CPU's. Not covered: speed,
streams, CUDA graphs, kernels of bitsandbytes and torchao.

It works with every build of torch but ROCm's: in a CUDA build it replaces all kernels. The library
is loaded before torch and cannot be unloaded: use it in a process of its own.
"""

import ctypes
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

SOURCE = Path(__file__).with_suffix(".cpp")
FOLDER = SOURCE.parents[2] / ".pytest_cache" / "pretend_cuda"  # of the compiled library
DEVICES = 2
COMPILERS = ("c++", "g++", "clang++")
# Without optimisation: it compiles in 7 s of a core.
FLAGS = ("-std=c++20", "-O0", "-w", "-shared", "-fPIC")

_library: ctypes.CDLL | None = None
_empty_cache_calls = 0


@dataclass(frozen=True)
class Transfers:
    """Bytes copied so far between host and devices, and calls of `torch.cuda.empty_cache`."""

    to_device: int
    to_host: int
    empty_cache: int


def why_unavailable() -> str:
    """Why this machine cannot pretend CUDA devices, or an empty string."""
    if sys.platform != "linux":
        return "the pretended CUDA is for Linux"
    if (torch_folder() / "lib" / "libtorch_hip.so").exists():
        return "this torch is ROCm's"
    if not any(map(shutil.which, COMPILERS)):
        return f"no C++ compiler ({', '.join(COMPILERS)})"
    return ""


def torch_folder() -> Path:
    """The folder of torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def build() -> Path:
    """Compile the library into `FOLDER`, unless it is there; returns its path."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)))

    # The name tells the source and the torch version, so an outdated file is never loaded.
    contents = SOURCE.read_bytes() + importlib.metadata.version("torch").encode()
    library = FOLDER / f"pretend_cuda_{hashlib.sha256(contents).hexdigest()[:16]}.so"
    if library.is_file():
        return library

    # Compile under another name: several processes may build at once.
    FOLDER.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    include = torch_folder() / "include"
    libraries = torch_folder() / "lib"
    linked = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = [compiler, *FLAGS, f"-I{include}", str(SOURCE), "-o", str(unfinished), *linked]
    subprocess.run(command, check=True)
    unfinished.rename(library)
    return library


def install():
    """Load the library, built if needed, and answer `torch.cuda`'s questions.

    Call it before `import torch`.
    """
    global _library
    assert "torch" not in sys.modules, "torch asks for CUDA while it is imported"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # it compiles for a GPU
    _library = library = ctypes.CDLL(str(build()))
    for name in ("allocated", "peak", "capacity", "bytes_to_host", "bytes_to_device"):
        getattr(library, f"pretend_{name}").restype = ctypes.c_int64

    # bitsandbytes (imported by diffusers) looks for its CUDA kernels if CUDA is available.
    if importlib.util.find_spec("bitsandbytes"):
        importlib.import_module("bitsandbytes")
    _answer_questions(library)


def transfers() -> Transfers:
    """What was copied so far."""
    assert _library is not None
    return Transfers(
        _library.pretend_bytes_to_device(), _library.pretend_bytes_to_host(), _empty_cache_calls
    )


def set_memory(device: int, n_bytes):
    """Limit a device's memory: more raises `torch.OutOfMemoryError`."""
    assert _library is not None
    _library.pretend_set_capacity(device, ctypes.c_int64(n_bytes))


def set_bandwidth(bytes_per_second: int):
    """Let copies between host and devices take time, as those of large weights; 0: none."""
    assert _library is not None
    _library.pretend_set_bandwidth(ctypes.c_int64(bytes_per_second))


def _answer_questions(library: ctypes.CDLL):
    """Replace the functions of `torch.cuda` that call the CUDA library."""
    import torch

    def index_of(device=None) -> int:
        if isinstance(device, int):
            return device
        index = None if device is None else torch.device(device).index
        return library.pretend_current_device() if index is None else index

    exchange_device = library.pretend_exchange_device

    def set_device(device):
        exchange_device(index_of(device))

    def empty_cache():
        global _empty_cache_calls
        _empty_cache_calls += 1

    def mem_get_info(device=None) -> tuple[int, int]:
        total = library.pretend_capacity(index_of(device))
        return total - library.pretend_allocated(index_of(device)), total

    def nothing(*arguments):
        """Nothing to do."""

    def properties(device=None) -> SimpleNamespace:
        total = library.pretend_capacity(index_of(device))
        return SimpleNamespace(
            name="NVIDIA H100", major=9, minor=0, total_memory=total, multi_processor_count=132
        )

    answers = {
        # devices
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": nothing,
        "device_count": lambda: DEVICES,
        "current_device": index_of,
        "set_device": set_device,
        "_exchange_device": exchange_device,
        "_maybe_exchange_device": exchange_device,
        "synchronize": nothing,
        # kind of device
        "get_device_name": lambda device=None: "NVIDIA H100",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        # memory
        "empty_cache": empty_cache,
        "mem_get_info": mem_get_info,
        "memory_allocated": lambda device=None: library.pretend_allocated(index_of(device)),
        "memory_reserved": lambda device=None: library.pretend_allocated(index_of(device)),
        "max_memory_allocated": lambda device=None: library.pretend_peak(index_of(device)),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)

    # `torch.manual_seed` and `torch.cuda.get_rng_state` read this tuple.
    generators = tuple(torch.Generator(f"cuda:{index}") for index in range(DEVICES))
    for index, generator in enumerate(generators):
        library.pretend_set_default_generator(index, ctypes.c_void_p(generator._cdata))
    torch.cuda.default_generators = generators

    # Copies and `torch.load` would ask the CUDA library for memory.
    create = torch.UntypedStorage.__new__

    def new_storage(storage_class, *arguments, device="cpu", **options):
        if torch.device(device).type == "cuda":
            return torch.empty(*arguments, dtype=torch.uint8, device=device).untyped_storage()
        return create(storage_class, *arguments, device=device, **options)

    torch.UntypedStorage.__new__ = new_storage


def main():
    """Run a script with pretended devices; its folder, and this one, are on the import path."""
    import pretend_cuda  # this file by its name, as the script imports it

    if reason := why_unavailable():
        sys.exit(reason)
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    pretend_cuda.install()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
