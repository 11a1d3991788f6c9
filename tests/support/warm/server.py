"""Imports the slow packages once and forks a process for every call of `bin/python`.

This saves two to five seconds of imports per process. Programs behave as in a fresh interpreter,
except that packages are imported already; tests of imports, terminals and process trees use a fresh
one.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import warnings
from types import ModuleType
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
SLOW = (
    "seed_multimodal",
    "multiprocessing.spawn",  # remembers sys.executable of its import, which receives files
    "torch",
    "torch.distributed.run",
    "torch.utils.data",
    "torchvision",
    "numpy",
    "PIL.Image",
    "yaml",
    "omegaconf",
    "hydra",
    "sentencepiece",
    "safetensors.torch",
    "accelerate",
    "peft",
    "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip",
    "transformers.generation.utils",
    "diffusers",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_unclip_img2img",
    "webdataset",
    "tensorboard",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "deepspeed",
    "seed_multimodal.compat.training_flags",
    "seed_multimodal.training.llm.task",
    "seed_multimodal.models.seed_x.train_agent",
    "seed_multimodal.models.seed_x.train_detokenizer",
    "seed_multimodal.models.lavit.train_llm",
    "seed_multimodal.models.lavit.train_pixels",
    "seed_multimodal.models.seed.losses",
    "seed_nano.world.source",
)


def serve(address: str, owner: int) -> dict[str, Any]:
    """Fork for every request until the process `owner` ends; returns the request in the forked
    process."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ, "call")
    waiting.register(os.pidfd_open(owner), selectors.EVENT_READ, "end")
    running: dict[int, tuple[socket.socket, int]] = {}  # process → its caller and its pidfd
    while True:
        for key, _ in waiting.select():
            if key.data == "end":
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.data == "call":
                caller, _ = listener.accept()
                request, streams = received(caller)
                if request is None:
                    caller.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    waiting.close()
                    listener.close()
                    for other, ended in running.values():
                        other.close()
                        os.close(ended)
                    caller.close()
                    for index, stream in enumerate(streams):
                        os.dup2(stream, index)
                        os.close(stream)
                    return request
                for stream in streams:
                    os.close(stream)
                caller.sendall(str(pid).encode())
                running[pid] = caller, os.pidfd_open(pid)
                waiting.register(caller, selectors.EVENT_READ, pid)
                waiting.register(running[pid][1], selectors.EVENT_READ, pid)
            elif key.data in running:
                caller, ended = running[key.data]
                if key.fileobj is caller:  # the caller was killed: it never sends anything
                    waiting.unregister(caller)
                    os.kill(key.data, signal.SIGKILL)
                    continue
                _, status = os.waitpid(key.data, 0)
                waiting.unregister(ended)
                os.close(ended)
                if caller in {entry.fileobj for entry in waiting.get_map().values()}:
                    waiting.unregister(caller)
                    try:
                        caller.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                    except OSError:
                        pass
                caller.close()
                del running[key.data]


def received(caller: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The request and the standard streams that came with it."""
    length, streams, _, _ = socket.recv_fds(caller, 4, 3)
    content = b""
    while length and len(content) < int.from_bytes(length, "big"):
        part = caller.recv(65536)
        if not part:
            break
        content += part
    return (json.loads(content) if content else None), list(streams)


def run(request: dict[str, Any], base: list[str]) -> None:
    """Run `python ARGUMENTS`: options, then `-c CODE`, `-m MODULE` or a script."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.executable = os.path.join(HERE, "bin", "python")  # what torchrun starts, too
    random.seed()
    arguments = request["arguments"]
    if os.environ.get("PYTHONUNBUFFERED"):
        arguments = ["-u", *arguments]
    while arguments and arguments[0] in ("-u", "-W", "-B"):
        if arguments[0] == "-u":
            sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        elif arguments[0] == "-W":
            warnings.simplefilter(arguments[1])  # type: ignore[arg-type]
            arguments = arguments[1:]
        arguments = arguments[1:]
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [*folders, *(folder for folder in base if folder not in folders)]
    importlib.invalidate_caches()
    from seed_multimodal.models.registry import families

    families.cache_clear()  # there may be others in the folders of this process
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = ["-m", *rest[1:]]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        code = compile(rest[0], "<string>", "exec")
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        main.__file__ = os.path.abspath(kind)
        with open(kind, "rb") as file:
            code = compile(file.read(), kind, "exec")
    exec(code, main.__dict__)  # noqa: S102


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C ends pytest, and that ends the server
    base = sys.path[1:]
    sys.path.insert(1, os.path.join(os.path.dirname(HERE), "..", "..", "src"))
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    # Builds of torch for CUDA come with triton, which would report its frozen objects (see
    # `gc.freeze` below) as leaked when a process exits.
    import torch

    if not torch.cuda.is_available():
        sys.modules["triton"] = None  # type: ignore[assignment]
    for name in SLOW:
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # an extra that is not installed
    gc.collect()
    gc.freeze()
    request = serve(sys.argv[1], int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(request, base)
