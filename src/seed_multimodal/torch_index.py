"""Find the tensors of a torch file (`.pt`, `.pth`, `.bin`, `.ckpt`); `torch_files` starts it.

    python -I -S torch_index.py [--placeholders] < FILE > INDEX.json

The pickle in the file is read here, in a process that cannot do anything else: names in it resolve
to inert functions, and after `confine` the process reads its input and writes its output only.
Tensors are not read, only found. This program uses the standard library only, so that it starts in
a few hundredths of a second.

INDEX.json is {"tensors": {name: [dtype, position, nbytes, offset, size, stride]}}, where a storage
is `nbytes` bytes at `position` of the file, and `offset`, `size`, `stride` are of the tensor in it,
in elements; or {"unsafe": NAME of a function or class}, or {"damaged": REASON}.
"""

import ctypes
import gc
import json
import platform
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pickle import Unpickler, UnpicklingError
from typing import IO, Any, BinaryIO

MEMORY = 512 << 20  # bytes
CPU_SECONDS = 60
INDEX_BYTES = 64 << 20

WRAPPERS = ("model", "state_dict", "module")  # keys under which files have their tensors, nested
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of files of torch before 1.6
LEGACY_PROTOCOL = 1001

# Bytes of an element by dtype, and the dtypes of the storage classes.
ITEM_SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex64": 8, "complex128": 16,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    "uint16": 2, "uint32": 4, "uint64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}  # fmt: skip

# System calls after `confine`, by processor: the number of AUDIT_ARCH, and those of read, write,
# close, fstat, newfstatat, lseek, pread64, mmap, mprotect, munmap, mremap, brk, madvise,
# rt_sigaction, rt_sigprocmask, rt_sigreturn, sigaltstack, futex, clock_gettime, getrandom, exit,
# exit_group.
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, (0, 1, 3, 5, 262, 8, 17, 9, 10, 11, 25, 12, 28,
                            13, 14, 15, 131, 202, 228, 318, 60, 231)),
    "aarch64": (0xC00000B7, (63, 64, 57, 80, 79, 62, 67, 222, 226, 215, 216, 214, 233,
                             134, 135, 139, 132, 98, 113, 278, 93, 94)),
}  # fmt: skip


# ---- the process


class _Filter(ctypes.Structure):
    """`struct sock_fprog` of linux/filter.h."""

    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_char_p)]


def confine() -> None:
    """Limit memory, processor time and output (where the system can); on Linux also forbid all
    system calls but `SYSTEM_CALLS`: no network, no opening, writing or removing of files, no
    programs."""
    # 1. Limits.
    import resource  # not on Windows

    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_FSIZE, INDEX_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):  # macOS has no limit of memory
            continue
    if sys.platform != "linux" or platform.machine() not in SYSTEM_CALLS:
        return

    # 2. The filter: each instruction is (operation, jump if true, jump if false, value).
    architecture, numbers = SYSTEM_CALLS[platform.machine()]
    load, equal, answer = 0x20, 0x15, 0x06
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000  # refuse: EPERM
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    for number in numbers:
        program += [(equal, 0, 1, number), (answer, 0, 0, allow)]
    program.append((answer, 0, 0, refuse))
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)

    # 3. PR_SET_NO_NEW_PRIVS, then PR_SET_SECCOMP. A kernel without it leaves the limits.
    prctl = ctypes.CDLL(None).prctl
    prctl(38, 1, 0, 0, 0)
    prctl(22, 2, ctypes.byref(_Filter(len(program), code)), 0, 0)


# ---- what names of the pickle resolve to


class Storage:
    """A storage of the file; `position` is None until it is known."""

    def __init__(self, dtype: str, n_elements: int, position: int | None) -> None:
        self.nbytes = n_elements * ITEM_SIZES[dtype]
        self.dtype = dtype
        self.position = position


class Tensor:
    """A view of a storage; `base`: of a storage that is a view of another one, in elements."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any) -> None:
        self.storage, self.base = storage
        self.dtype = dtype or self.storage.dtype
        self.layout = (offset + self.base, size, stride)


class Inert:
    """In place of an object that is no tensor: accepts any arguments and state, does nothing."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> Tensor:
    return Tensor(storage, offset, size, stride, None)


def _tensor_of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    return Tensor(storage, offset, size, stride, dtype)


def _parameter(tensor: Any, *_: object) -> Any:
    return tensor


def _subclass(rebuild: Callable[..., Any], kind: object, arguments: Any, state: object) -> Any:
    return rebuild(*arguments)


# The names that `torch.load(weights_only=True)` allows, where tensors are dense.
RESOLVED: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
    "builtins.set": set,
    "builtins.complex": complex,
    "__builtin__.set": set,
    "__builtin__.complex": complex,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    **{f"torch.{name}": name for name in ITEM_SIZES},
    **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
    "torch.storage.UntypedStorage": "uint8",
}
INERT = (
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "_codecs.encode",
    "builtins.bytearray",
    "__builtin__.bytearray",
)


class UnsafeName(Exception):
    """A name in the pickle that is not of a tensor or a plain value."""


class IndexUnpickler(Unpickler):
    """Reads a pickle of a torch file; `storage` makes the storage of a persistent id."""

    def __init__(
        self, file: IO[bytes], storage: Callable[..., tuple[Storage, int]], placeholders: bool
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self.storage = storage
        self.placeholders = placeholders

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in RESOLVED:
            return RESOLVED[full_name]
        if full_name in INERT or self.placeholders:
            return type("Inert", (Inert,), {})
        raise UnsafeName(full_name)

    def persistent_load(self, pid: Any) -> tuple[Storage, int]:
        """The storage, and the tensor's first element in it."""
        kind, *values = pid
        if kind != "storage":
            raise UnpicklingError(f"a reference to {kind!r}")
        return self.storage(*values)


# ---- the two formats


def read_zip(file: BinaryIO, placeholders: bool) -> object:
    """The content of a file of torch 1.6 and newer: a zip of `data.pkl` and the storages."""
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    names = [name for name in members if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise ValueError(f"a zip with {len(names)} data.pkl")
    folder = names[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in members:
        raise ValueError("a TorchScript archive")
    if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("big-endian numbers")

    def storage(dtype: str, key: str, location: str, n_elements: int) -> tuple[Storage, int]:
        info = members[f"{folder}data/{key}"]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} is compressed")
        # The member's header: 26 bytes, the lengths of its name and of an extra field, these two.
        file.seek(info.header_offset + 26)
        n_name, n_extra = struct.unpack("<HH", file.read(4))
        position = info.header_offset + 30 + n_name + n_extra
        found = Storage(dtype, n_elements, position)
        if found.nbytes > info.file_size:
            raise ValueError(f"{info.filename} is too short")
        return found, 0

    with archive.open(names[0]) as pickled:
        return IndexUnpickler(pickled, storage, placeholders).load()


def read_legacy(file: BinaryIO, placeholders: bool) -> object:
    """The content of an older file: five pickles, then each storage after its length."""
    storages: dict[str, Storage] = {}

    def storage(
        dtype: str, key: str, location: str, n_elements: int, view: Any = None
    ) -> tuple[Storage, int]:
        if key not in storages:
            storages[key] = Storage(dtype, n_elements, None)
        return storages[key], view[1] if view else 0

    def load() -> Any:
        return IndexUnpickler(file, storage, placeholders).load()

    if load() != LEGACY_MAGIC or load() != LEGACY_PROTOCOL:
        raise ValueError("not a torch file")
    if not load()["little_endian"]:
        raise ValueError("big-endian numbers")
    content = load()
    for key in load():
        (n_elements,) = struct.unpack("<q", file.read(8))
        if n_elements * ITEM_SIZES[storages[key].dtype] != storages[key].nbytes:
            raise ValueError(f"storage {key} has another length")
        storages[key].position = file.tell()
        file.seek(storages[key].nbytes, 1)
    return content


def unwrap(content: object) -> dict[str, Tensor]:
    """The tensors by name; a file that is one tensor has it under ""."""
    if isinstance(content, Tensor):
        return {"": content}
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {}
    # Other values are such as the step of a training's checkpoint.
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value
    return tensors


def main() -> None:
    """Answer for standard input."""
    gc.disable()  # large pickles of small objects
    "".encode("cp437")  # loads the codec of zips' names
    confine()
    file = sys.stdin.buffer
    try:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        content = (read_zip if is_zip else read_legacy)(file, "--placeholders" in sys.argv)
        tensors = {}
        for name, tensor in unwrap(content).items():
            storage = tensor.storage
            tensors[name] = (tensor.dtype, storage.position, storage.nbytes, *tensor.layout)
        answer = json.dumps({"tensors": tensors})
    except UnsafeName as error:
        answer = json.dumps({"unsafe": str(error)})
    except Exception as error:  # noqa: BLE001  (wrong bytes end in errors of many types)
        reason = str(error) or type(error).__name__
        answer = json.dumps({"damaged": reason})
    sys.stdout.write(answer)


if __name__ == "__main__":
    main()
