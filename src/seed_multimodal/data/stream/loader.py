"""Results of worker processes in order, by torchdata's `StatefulDataLoader`."""

from __future__ import annotations

import atexit
import pickle
import signal
import warnings
from collections.abc import Callable, Generator, Iterable
from io import BytesIO
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.entry import kill_with_parent
from seed_multimodal.errors import DataError, SeedError

Job = TypeVar("Job")
Result = TypeVar("Result")
SHARED_BYTES = 1 << 14  # of an array that passes through shared memory
ALIGNMENT = 64  # bytes
WORKER_KILLED = (
    "A data worker process was killed (often because memory ran out, in a container that of "
    "/dev/shm: docker run --shm-size=16g or --ipc=host); resume from the last checkpoint, with "
    "fewer workers if it happens again."
)


def load(
    fetch: Callable[[Job], Result], jobs: Iterable[Job], workers: int = 0
) -> Generator[Result, None, None]:
    """Results of `fetch` for each job, in order; `close` stops the workers.

    Raises SeedError: as `fetch`; DataError: a worker was killed.

    workers: processes; 0: this one.
    """
    if not workers:
        yield from map(fetch, jobs)
        return
    from torchdata.stateful_dataloader import StatefulDataLoader  # in the extra `train`

    # 1. Start the workers. They have a separate generator, so that training's random numbers do not
    #    change.
    with warnings.catch_warnings():
        # Of torchdata 0.11 with newer torch, and of more workers than cores.
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = StatefulDataLoader(
            _Fetch(fetch),
            batch_size=None,
            sampler=jobs,
            num_workers=workers,
            worker_init_fn=_init_worker,
            generator=torch.Generator(),
            snapshot_every_n_steps=None,
        )
        results = [iter(loader)]
    del loader

    # 2. Results, or the error of a worker. Without their iterator workers end, also at exit, where
    #    they ignore SIGTERM.
    atexit.register(results.clear)
    try:
        while (result := next(results[0], None)) is not None:
            if isinstance(result, SeedError):
                raise result
            yield _unpack(*ForkingPickler.loads(result))
    except (RuntimeError, OSError, EOFError) as error:
        if "in DataLoader worker process" in str(error):  # raised by `fetch`
            raise
        raise DataError(WORKER_KILLED) from error
    finally:
        results.clear()
        atexit.unregister(results.clear)


class _Fetch(Generic[Job, Result]):
    """The data set in the workers.

    Returns a `SeedError`, since raising would wrap it in a traceback.
    """

    def __init__(self, fetch: Callable[[Job], Result]) -> None:
        self.fetch = fetch

    def __getitem__(self, job: Job) -> bytes | SeedError:
        try:
            result = self.fetch(job)
        except SeedError as error:
            return error
        try:
            # Here, since the thread that sends results drops those that fail.
            return bytes(ForkingPickler.dumps(_pack(result)))
        except (RuntimeError, OSError):  # no room in shared memory
            return DataError(WORKER_KILLED)


def _init_worker(worker: int) -> None:
    """Make a worker ignore torchrun's SIGTERM and Ctrl-C, and end when its parent dies."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kill_with_parent()  # elsewhere than on Linux torch's workers watch their parent themselves


class _ArrayPickler(pickle.Pickler):
    """Pickles tensors as numpy arrays, whose contents `buffer_callback` gets."""

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, Tensor) or value.dtype == torch.bfloat16:
            return NotImplemented
        return torch.from_numpy, (value.numpy(),)


def _pack(result: object) -> tuple[bytes, list[int], Tensor]:
    """A pickled result; where its large arrays begin and end in one shared tensor.

    A tensor for each would keep as many files open.
    """
    parts = [np.zeros(ALIGNMENT, np.uint8)]

    def stays(buffer: pickle.PickleBuffer) -> bool:
        """Whether an array stays in the pickle; else the next begins where any type may."""
        array = np.frombuffer(buffer, np.uint8)
        is_small = len(array) < SHARED_BYTES
        if not is_small:
            parts.extend((array, np.zeros(-len(array) % ALIGNMENT, np.uint8)))
        return is_small

    pickled = BytesIO()
    _ArrayPickler(pickled, pickle.HIGHEST_PROTOCOL, buffer_callback=stays).dump(result)
    shared = torch.from_numpy(np.concatenate(parts)).share_memory_()
    return pickled.getvalue(), np.cumsum([len(part) for part in parts]).tolist(), shared


def _unpack(pickled: bytes, borders: list[int], shared: Tensor) -> Any:
    """The result, whose large arrays are parts of the shared tensor."""
    return ForkingPickler.loads(pickled, buffers=np.split(shared.numpy(), borders)[1::2])
