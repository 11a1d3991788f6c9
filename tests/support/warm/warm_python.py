"""`PYTHON`: a replacement for `sys.executable` whose processes have the slow packages imported (see
bin/python).

Tests of imports, of the interpreter, of terminals and of process trees use `sys.executable`: the
process that works is no child of the one that was started.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FORKS = hasattr(os, "pidfd_open")  # otherwise the interpreter itself is used

PYTHON = str(HERE / "bin" / "python") if FORKS else sys.executable
ENVIRONMENT = (
    str(HERE) if FORKS else sys.prefix
)  # for scripts that take bin/python of a virtual environment


def _announce() -> None:
    """Set the socket where the first call of `PYTHON` starts the server, which ends with this
    process."""
    folder = tempfile.mkdtemp(prefix="warm")
    owner = os.getpid()
    os.environ.update(
        WARM_PYTHON_SOCKET=f"{folder}/socket",
        WARM_PYTHON_OWNER=str(owner),
        WARM_PYTHON_REAL=sys.executable,
    )
    atexit.register(
        lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None
    )


_announce()
