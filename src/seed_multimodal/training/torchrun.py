"""torchrun with one sentence in place of its report and traceback: how both applications start several processes.

    python -m seed_multimodal.training.torchrun --standalone --nproc-per-node=2 src/train/train.py ARGUMENTS…

The arguments are torchrun's own, the script and its arguments; with `--debug` among the latter nothing is hidden.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from seed_multimodal.entry import guarded, log_line
from seed_multimodal.errors import first_line
from seed_multimodal.training.failures import TrainingError

_KILLED, _ENDED = 9, 15


def run_torchrun(arguments: Sequence[str], program: str, debug: bool = False) -> int:
    """Start and watch this node's processes.

    Args:
        program: named in sentences.
        debug: leave torchrun's log and traceback.

    Returns:
        0; the exit code of the process that failed first (it has said why); 128 and the number of the signal that ended
        a process, or this one.

    Raises:
        TrainingError: the nodes did not meet.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    options = parse_args(list(arguments))
    if not debug:
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        run(options)
    except ChildFailedError as error:
        if debug:
            raise
        return _lost(error, program)
    except SignalException as error:  # torchrun has passed the signal on, and the processes have ended
        if debug:
            raise
        log_line(f"{program}: ended by {error.sigval.name}, and its {options.nproc_per_node} processes with it.")
        return 128 + error.sigval
    except (DistError, RendezvousError) as error:
        raise TrainingError(f"The nodes did not meet, or one of them is gone, at {options.master_addr}:"
                            f"{options.master_port} ({first_line(error)}); the same command resumes from the last "
                            "checkpoint.") from error
    return 0


def _lost(error: object, program: str) -> int:
    """The exit code for processes that failed; one that was killed could not say anything, so it is said here."""
    failures = getattr(error, "failures", {})
    killed = {rank: -failure.exitcode for rank, failure in failures.items() if failure.exitcode < 0}
    refused = sorted((failure.timestamp, failure.exitcode) for failure in failures.values() if failure.exitcode > 0)
    # torchrun ends the others by SIGTERM, which may be recorded before the exit code that it did it for.
    if refused and set(killed.values()) <= {_ENDED}:
        return int(refused[0][1])
    rank, signal = next(iter(killed.items()))
    hint = " (which often means that memory ran out)" if signal == _KILLED else ""
    log_line(f"{program}: process {rank} was killed by signal {signal}{hint}, and the others of this node were "
             "ended with it; the same command resumes from the last checkpoint.")
    return 128 + signal


def main(arguments: Sequence[str]) -> int:
    """`run_torchrun` as a program."""
    program = next((Path(word).name for word in arguments if word.endswith(".py")), "torchrun")
    debug = "--debug" in arguments
    return guarded(program, debug, lambda: run_torchrun(arguments, program, debug))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
