"""torchrun with a short error message instead of its traceback; accepts torchrun's arguments.

    python -m seed_multimodal.training.torchrun --standalone --nproc-per-node=2 src/train/train.py ARGUMENTS…
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from seed_multimodal.entry import guarded, log_line


def run_torchrun(arguments: Sequence[str]) -> int:
    """Run this node's processes; returns the exit code of the first failed one, which has printed its error."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        run(parse_args(list(arguments)))
    except SignalException as error:  # torchrun forwarded the signal, and the processes ended
        return 128 + error.sigval
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()] or [1]  # a rendezvous error has no process
        code = next((code for code in codes if code not in (143, -15)), codes[0])  # torchrun ends the others by SIGTERM
        if code < 0:
            log_line(f"torchrun: a process was killed by signal {-code} (9 often means that memory ran out), and the "
                     "others with it; the same command resumes from the last checkpoint.")
        return code if code > 0 else 128 - code
    return 0


if __name__ == "__main__":
    sys.exit(guarded("torchrun", "--debug" in sys.argv, lambda: run_torchrun(sys.argv[1:])))
