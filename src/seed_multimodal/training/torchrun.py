"""torchrun that lets the processes save after SIGTERM, with a short error message instead of its
traceback.

    python -m seed_multimodal.training.torchrun --nproc-per-node=2 PROGRAM.py ARGUMENTS…

It accepts torchrun's arguments.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api as launcher
from torch.distributed.run import parse_args, run

from seed_multimodal.entry import SOME_FAILED, log_line, run_guarded
from seed_multimodal.training.distributed import STOPPED


class ProcessesStopped(SignalException):
    """After SIGTERM the processes of this node ended with these exit codes, or at least the first
    failed one did."""

    def __init__(self, codes: list[int]) -> None:
        super().__init__("stopped by SIGTERM", signal.SIGTERM)
        self.codes = codes


class SavingAgent(LocalElasticAgent):
    """torchrun's agent, which would kill the processes 30 s after SIGTERM; this one waits until
    they have saved."""

    def _invoke_run(self, role: str = "default") -> Any:
        try:
            return super()._invoke_run(role)
        except SignalException as error:
            if error.sigval != signal.SIGTERM:
                raise  # Ctrl-C: torchrun's 30 seconds
        # A second SIGTERM must not shorten the wait: Slurm, srun and a shell may each pass it on.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        context: Any = self._pcontext
        processes: list[subprocess.Popen[bytes]] = []
        if context is not None:
            processes = [handler.proc for handler in context.subprocess_handlers.values()]
        for process in processes:
            process.terminate()
        codes = [process.poll() for process in processes]
        while None in codes:
            if any(code not in (None, 0, STOPPED) for code in codes):
                break  # the others would wait for it; torchrun kills them after its 30 seconds
            time.sleep(0.2)
            codes = [process.poll() for process in processes]
        raise ProcessesStopped([code for code in codes if code is not None])


def run_torchrun(arguments: Sequence[str]) -> int:
    """Run this node's processes; returns the exit code of the first failed one, which has printed
    its error.

    After SIGTERM: `STOPPED` if all processes of this node saved.
    """
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    # torch has no setting for the agent.
    launcher.LocalElasticAgent = SavingAgent  # type: ignore[misc]
    try:
        run(parse_args(list(arguments)))
    except ProcessesStopped as stopped:
        if not stopped.codes:
            log_line("torchrun: stopped by SIGTERM before the processes were started.")
            return SOME_FAILED
        return _exit_code(stopped.codes)
    except SignalException as error:  # torchrun forwarded the signal, and the processes ended
        return 128 + error.sigval
    except ChildFailedError as error:
        # A rendezvous error has no process.
        return _exit_code(
            [failure.exitcode for failure in error.failures.values()] or [SOME_FAILED]
        )
    return 0


def _exit_code(codes: list[int]) -> int:
    """torchrun's exit code from those of its processes, negative ones being signals."""
    if set(codes) <= {0, STOPPED}:
        return max(codes)
    # torchrun ends the others by SIGTERM, so another failure was the first.
    failures = [code for code in codes if code not in (0, STOPPED, -signal.SIGTERM)]
    if not failures:
        log_line(
            "torchrun: a process was ended by SIGTERM before it could save a checkpoint; the same "
            "command resumes from the last one."
        )
        return SOME_FAILED
    code = failures[0]
    if code > 0:
        return code
    log_line(
        f"torchrun: a process was killed by signal {-code} (9 often means that memory ran out), "
        "and the others with it; the same command resumes from the last checkpoint."
    )
    return 128 - code


if __name__ == "__main__":
    sys.exit(run_guarded("torchrun", "--debug" in sys.argv, lambda: run_torchrun(sys.argv[1:])))
