"""The process of which `python` runs forks: it has imported the large libraries, and no thread has
begun. It ends with the process that it is started for.

    python server.py FOLDER PID
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import multiprocessing.process
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = """
torch torchvision.transforms torch.distributed.run torch.utils.data PIL.Image numpy yaml tqdm hydra
transformers transformers.models.llama.modeling_llama transformers.models.clip.modeling_clip
transformers.models.bert.modeling_bert diffusers diffusers.models.unets.unet_2d_condition
diffusers.models.autoencoders.autoencoder_kl diffusers.models.autoencoders.autoencoder_tiny
peft webdataset flask waitress requests httpx pydantic matplotlib.figure pyarrow gradio
seed_multimodal.cli.main seed_multimodal.models.seed.pipeline seed_multimodal.models.seed_x.pipeline
seed_multimodal.models.lavit.pipeline seed_multimodal.serving.app seed_multimodal.serving.page
seed_multimodal.training.trainer
""".split()

FORKED = "jemalloc_bg_thd"  # a thread of pyarrow's memory that its forks begin again


# ---- the fork


def run(request: dict[str, Any], descriptors: list[int], executable: str) -> NoReturn:
    """Be the Python process of a request to its end."""
    # 1. Its outputs, folder and environment; what is its own in a fresh process.
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    is_unbuffered = "PYTHONUNBUFFERED" in os.environ
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (as long as the process)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        errors = "backslashreplace" if name == "stderr" else "strict"
        is_direct = is_unbuffered or name == "stderr" or os.isatty(descriptor)
        raw = open(descriptor, "wb", 0 if is_direct else -1, closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(
            raw, "utf-8", errors, line_buffering=is_direct, write_through=is_direct
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    random.seed()
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].seed()
    tempfile.tempdir = None
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]
    sys.executable = executable

    # 2. Its program, and the paths of its imports.
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = [os.path.abspath(folder) for folder in folders if folder]
    sys.path[:] = [*folders, *(folder for folder in sys.path if folder not in folders)]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    kind, *rest = request["arguments"]
    code = 0
    try:
        if kind == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = rest
            runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
        elif kind == "-c":
            sys.path.insert(0, "")
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)  # noqa: S102
        else:
            sys.path.insert(0, os.path.dirname(os.path.realpath(kind)))
            sys.argv = request["arguments"]
            main.__file__ = kind
            code_of_file = compile(Path(kind).read_bytes(), kind, "exec")
            exec(code_of_file, main.__dict__)  # noqa: S102
    except SystemExit as error:
        code = exit_code(error)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001 (as Python itself)
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    finish(code)


def exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def finish(code: int) -> NoReturn:
    """End as Python does: threads, exit functions, outputs."""
    import atexit
    import threading

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


# ---- the server


def read_request(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    length, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    data = b""
    while len(data) < int.from_bytes(length, "big"):
        data += connection.recv(1 << 20) or b"\0"  # of one that was killed: no JSON
    return json.loads(data), descriptors


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def serve(listener: socket.socket, folder: Path, pid: int) -> None:
    running: dict[socket.socket, tuple[int, str]] = {}
    readable, ended = os.pipe()
    os.set_blocking(ended, False)
    signal.set_wakeup_fd(ended)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    waiting = selectors.DefaultSelector()
    for source in (listener, readable):
        waiting.register(source, selectors.EVENT_READ)
    while is_alive(pid):
        for key, _ in waiting.select(1):
            source = key.fileobj
            # 1. A command.
            if source is listener:
                connection, _ = listener.accept()
                try:
                    request, descriptors = read_request(connection)
                except (OSError, ValueError):  # it was killed meanwhile
                    connection.close()
                    continue
                child = os.fork()
                if not child:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for other in (connection, listener, *running):
                        other.close()
                    os.close(readable)
                    os.close(ended)
                    waiting.close()
                    run(request, descriptors, str(folder / "bin" / "python"))
                for descriptor in descriptors:
                    os.close(descriptor)
                running[connection] = child, request["environment"].get("PYTEST_CURRENT_TEST", "")
                waiting.register(connection, selectors.EVENT_READ)
                with contextlib.suppress(OSError):
                    connection.sendall(b"!")
            # 2. Signals for it, or the end of its client.
            elif isinstance(source, socket.socket):
                if source not in running:
                    continue
                numbers = b""
                with contextlib.suppress(OSError):
                    numbers = source.recv(64)
                for number in numbers or [signal.SIGKILL]:
                    os.kill(running[source][0], number)
                if not numbers:
                    waiting.unregister(source)
            # 3. Commands that ended.
            else:
                os.read(readable, 4096)
        for connection, (child, test) in [*running.items()]:
            ended_child, status, usage = os.wait4(child, os.WNOHANG)
            if not ended_child:
                continue
            del running[connection]
            with contextlib.suppress(KeyError):
                waiting.unregister(connection)
            seconds = usage.ru_utime + usage.ru_stime
            with (folder / "times.jsonl").open("a") as file:
                file.write(json.dumps([test, round(seconds, 3)]) + "\n")
            with contextlib.suppress(OSError):
                connection.sendall(status.to_bytes(8, "big"))
            connection.close()


def main() -> None:
    folder = Path(sys.argv[1])
    pid = int(sys.argv[2])
    sys.path.pop(0)
    for name in LIBRARIES:
        importlib.import_module(name)
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    if len([name for name in threads if name != FORKED]) > 1:
        sys.exit(f"Imports began threads, which a fork does not have: {threads}")
    # Until then commands wait.
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    serve(listener, folder, pid)


if __name__ == "__main__":
    main()
