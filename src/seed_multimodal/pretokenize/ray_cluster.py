"""Pre-tokenization by the workers of a Ray cluster."""

from __future__ import annotations

import os
from dataclasses import replace

from seed_multimodal.errors import DataError
from seed_multimodal.pretokenize.run import RunSettings, run

RESTARTS = 10  # of a killed worker; an image that crashes its worker must not do so forever


def run_on_ray(settings: RunSettings, n_workers: int | None) -> int:
    """As `run`, by Ray tasks that each have an encoder and a GPU; equal shards.

    All machines must see the working directory, the input and `save_dir`. The cluster is that of
    `ray.init` or RAY_ADDRESS, else a local one. Ray restarts a killed worker.

    n_workers: among whom the shards are divided, instead of by `settings.shard`; None: one for
        each GPU of the cluster, or 1.

    Raises SeedError: as `run`; DataError: a worker was killed too often.
    """
    import ray  # in the extra `ray`

    # 1. The cluster. One that grows on demand has no GPU yet, so `cuda` always requests one.
    ray.init(include_dashboard=False, ignore_reinit_error=True)
    n_gpus = int(ray.cluster_resources().get("GPU", 0)) if settings.device != "cpu" else 0
    n_workers = n_workers or n_gpus or 1
    needs_gpu = n_gpus > 0 or settings.device == "cuda"
    task = ray.remote(max_retries=RESTARTS, num_gpus=int(needs_gpu))(_run_in)

    # 2. A share for each worker; the first error ends the run.
    shares = [replace(settings, shard=(index, n_workers)) for index in range(n_workers)]
    jobs = [task.remote(os.getcwd(), share) for share in shares]
    try:
        return max(ray.get(jobs))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise DataError(f"{settings.save_dir}: {error} The same command resumes.") from error


def _run_in(folder: str, settings: RunSettings) -> int:
    """`run` with relative paths from a folder."""
    os.chdir(folder)
    return run(settings)
