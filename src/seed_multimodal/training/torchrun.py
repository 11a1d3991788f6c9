"""torchrun that lets the processes save after SIGTERM, with a short error message instead of its
traceback.

    python -m seed_multimodal.training.torchrun --nproc-per-node=2 PROGRAM.py ARGUMENTS…

It accepts torchrun's arguments.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, Store, TCPStore
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api as launcher
from torch.distributed.run import parse_args, run

from seed_multimodal.entry import SOME_FAILED, log_line, run_guarded
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.training.distributed import STOPPED, TrainingError
from seed_multimodal.training.rendezvous import meeting

FAILURE = "seed/failure"  # key of the nodes' store: which node failed first
CHECK_SECONDS = 1.0  # between two looks at it
# Processes that notice the failure themselves say more about it.
NOTICE_SECONDS = 5.0


class ProcessesStopped(SignalException):
    """After SIGTERM the processes of this node ended with these exit codes, or at least the first
    failed one did."""

    def __init__(self, codes: list[int]) -> None:
        super().__init__("stopped by SIGTERM", signal.SIGTERM)
        self.codes = codes


class SavingAgent(LocalElasticAgent):
    """torchrun's agent, which waits until the processes have saved after SIGTERM (torchrun kills
    them after 30 s), and ends them soon after another node has failed (torchrun: never)."""

    failure = ""  # of another node
    next_check = 0.0
    end_at = float("inf")

    def _monitor_workers(self, worker_group: Any) -> Any:
        """As torchrun's; publishes a failure of this node, and watches for those of others."""
        result = super()._monitor_workers(worker_group)
        now = time.monotonic()
        if worker_group.group_world_size > 1 and (result.is_failed() or now >= self.next_check):
            self.next_check = now + CHECK_SECONDS
            # Without its store node 0 has ended, which the processes notice.
            with contextlib.suppress(DistError):
                self._exchange_failures(worker_group, result, now)
        if now >= self.end_at and not result.is_failed():
            raise TrainingError(f"{self.failure}; its output says why. This node ends, too.")
        return result

    def _exchange_failures(self, worker_group: Any, result: Any, now: float) -> None:
        store = worker_group.store
        if not self.failure and store.check([FAILURE]):
            self.failure = store.get(FAILURE).decode()
            self.end_at = now + NOTICE_SECONDS
            if result.is_failed():
                log_line(f"torchrun: {self.failure}.")
        if not self.failure:
            self._publish([failure.exitcode for failure in result.failures.values()])

    def _publish(self, codes: Sequence[int]) -> None:
        """Tell the other nodes, unless the processes with these exit codes have saved."""
        group = self._worker_group
        failures = set(codes) - {0, STOPPED}
        if group.group_world_size in (None, 1) or not failures:
            return
        name = f"node {group.group_rank} ({socket.gethostname()})"
        group.store.set(FAILURE, f"{name} failed first ({_describe(failures)})")
        if group.group_rank == 0:
            # The store ends with this process: the others must have read it.
            time.sleep(2 * CHECK_SECONDS)

    def _invoke_run(self, role: str = "default") -> Any:
        try:
            return super()._invoke_run(role)
        except SignalException as error:
            if error.sigval not in (signal.SIGTERM, signal.SIGINT):
                raise
        # A second SIGTERM must not shorten the wait: Slurm, srun and a shell may each pass it on.
        # A second Ctrl-C does.
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
        ended = [code for code in codes if code is not None]
        with contextlib.suppress(DistError):
            self._publish(ended)
        raise ProcessesStopped(ended)


def run_torchrun(arguments: Sequence[str]) -> int:
    """Run this node's processes; returns the exit code of the first failed one, which has printed
    its error.

    After SIGTERM: `STOPPED` if all processes of this node saved.

    Raises ConfigError: the nodes do not find each other. TrainingError: another node failed.
    """
    # The agent's own log lines, some with tracebacks of successful runs.
    if "--debug" not in arguments:
        logging.disable(logging.CRITICAL)
    # torch has no setting for the agent.
    launcher.LocalElasticAgent = SavingAgent  # type: ignore[misc]
    args = parse_args(list(arguments))
    try:
        store = _meet_nodes(args)
        run(args)
        del store
    except ProcessesStopped as stopped:
        if not stopped.codes:
            log_line("torchrun: stopped by SIGTERM before the processes were started.")
            return STOPPED
        return _exit_code(stopped.codes, by_sigterm=True)
    except SignalException as error:  # torchrun forwarded the signal, and the processes ended
        return 128 + error.sigval
    except ChildFailedError as error:
        return _exit_code([failure.exitcode for failure in error.failures.values()])
    except DistError as error:
        raise ConfigError(
            f"node {args.node_rank} ({socket.gethostname()}) lost the other nodes at "
            f"{args.master_addr}:{args.master_port} while they were starting ({first_line(error)})."
        ) from error
    return 0


def _meet_nodes(args: Namespace) -> Store | None:
    """Wait for all nodes of torch's static rendezvous; returns node 0's store, for torch to use."""
    is_static = args.rdzv_backend == "static" and not args.rdzv_endpoint and not args.standalone
    if not is_static or args.nnodes == "1" or not args.nnodes.isdigit():
        return None
    address = args.master_addr
    port = int(args.master_port)
    with meeting(address, port, int(args.node_rank), int(args.nnodes)) as seconds:
        args.rdzv_conf = args.rdzv_conf or f"timeout={seconds:.0f}"
        if int(args.node_rank) != 0:
            return None
        # Open before the others look for it; torch's rendezvous in this process uses the same one.
        return TCPStore(
            address,
            port,
            is_master=True,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )


def _exit_code(codes: list[int], by_sigterm: bool = False) -> int:
    """torchrun's exit code from those of its processes, negative ones being signals."""
    if set(codes) <= {0, STOPPED}:
        return max(codes)
    # torchrun ends the others by SIGTERM, so another failure was the first.
    failures = [code for code in codes if code not in (0, STOPPED, -signal.SIGTERM)]
    if not failures:
        log_line(
            "torchrun: SIGTERM ended the processes before their first step, so they saved nothing; "
            "the same command starts again, from a checkpoint if there is an earlier one."
        )
        return STOPPED if by_sigterm else SOME_FAILED
    code = failures[0]
    if code > 0:
        return code
    log_line(
        f"torchrun: a process of {socket.gethostname()} was {_describe({code})} (9 often means "
        "that memory ran out), and the others with it; the same command resumes from the last "
        "checkpoint, if there is one."
    )
    return 128 - code


def _describe(codes: set[int]) -> str:
    """Exit codes of processes in words."""
    code = max(codes)
    return f"exit code {code}" if code > 0 else f"killed by signal {-code}"


if __name__ == "__main__":
    for name in ("RANK", "WORLD_SIZE"):  # of whoever started it; its processes get their own
        os.environ.pop(name, None)
    sys.exit(run_guarded("torchrun", "--debug" in sys.argv, lambda: run_torchrun(sys.argv[1:])))
