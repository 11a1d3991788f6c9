"""`warm_processes.PYTHON` behaves as `sys.executable`, which the same commands compare."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from llm_runs import environment
from real_processes import run_process
from repository import ROOT
from waiting import wait_until
from warm_processes import PYTHON

pytestmark = pytest.mark.process
IS_FORK = "print('server' + '.py' in open('/proc/self/cmdline').read())"
CODES = {
    "output": "import sys; print(1, sys.argv, __name__); print(2, file=sys.stderr)",
    "exit code": "import sys; sys.exit(3)",
    "exit text": "import sys; sys.exit('wrong')",
    "killed by itself": "import os; os.kill(os.getpid(), 9)",
    "aborted": "import os; os.abort()",
    "interrupted": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "exit functions": "import atexit; atexit.register(print, 'end'); raise SystemExit",
    "a thread": "import threading; threading.Thread(target=print, args=('late',)).start()",
    "module": "-m json.tool --help",
    "defaults of torch": "import torch; print(torch.get_default_dtype(), torch.get_num_threads())",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CODES)
def test_a_command_ends_as_in_a_fresh_process(name):
    code = CODES[name]
    arguments = code.split() if code.startswith("-m") else ["-c", code, "a", "b"]
    options = {"env": environment(), "cwd": ROOT, "timeout": 100}
    fresh, warm = (
        run_process([python, *arguments], **options) for python in (sys.executable, PYTHON)
    )
    assert (warm.returncode, warm.stdout) == (fresh.returncode, fresh.stdout)
    assert warm.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


@pytest.mark.parametrize(
    "variables, options, is_fork",
    [
        ({}, [], True),
        ({"WORLD_SIZE": "2"}, ["-u"], True),
        ({"OMP_NUM_THREADS": "2"}, [], False),
        ({"PYTHONHASHSEED": "1"}, [], False),
        ({"PYTHONPATH": "elsewhere"}, [], False),
        ({}, ["-OO"], False),
    ],
)
def test_what_a_fork_cannot_do_is_a_fresh_process(variables, options, is_fork):
    server = Path(PYTHON).parents[1] / "server.json"
    environment = {**json.loads(server.read_text())["environment"], **variables}
    command = [PYTHON, *options, "-c", IS_FORK]
    assert run_process(command, env=environment, cwd=ROOT).stdout == f"{is_fork}\n"


def test_closed_outputs_need_a_fresh_process():
    command = ["sh", "-c", 'exec "$@" >&-', "sh", PYTHON, "-c", "print(1)"]
    assert run_process(command, env=environment(), timeout=100).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_fork(number):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen([PYTHON, "-c", code], env=environment(), **options)
    stat = Path("/proc", process.stdout.readline().strip(), "stat")
    process.send_signal(number)
    assert process.wait(60) == -number
    wait_until(lambda: not stat.exists())
    process.stdout.close()
