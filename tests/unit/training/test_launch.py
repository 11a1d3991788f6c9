"""Shell scripts that start trainings and evaluations, by dash: the command and the variables that
Python gets."""

import os
import shutil
from pathlib import Path

import pytest
from real_processes import run_process
from repository import ROOT
from yaml_tables import read_tables

SCRIPTS = sorted(
    [
        *(ROOT / "MultiModalLLM" / "scripts").glob("train*.sh"),
        *(ROOT / "SEED_Tokenizer" / "train_scripts").glob("*.sh"),
    ]
)
FIRST = {"train_lavit_detokenizer.sh": "highres", "train_seed_x_detokenizer.sh": "1"}
SHELL = shutil.which("dash") or "sh"
PYTHON = """#!/bin/sh
echo "command=$*"
echo "OMP_NUM_THREADS=${OMP_NUM_THREADS:-}"
echo "GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-}"
"""
# Node 0 has 10.0.0.1 (its own hosts file says 127.0.1.1), node 1 has 10.0.0.2; the default route
# is of another interface.
IP = """#!/bin/sh
case "$*" in
    *"route get 127.0.1.1") echo "local 127.0.1.1 dev lo src 127.0.0.1 uid 0" ;;
    *"route get 10.0.0.1") echo "$ROUTE" ;;
    *"addr show to 10.0.0.1") echo "2: ib0    inet 10.0.0.1/24 brd 10.0.0.255 scope global ib0" ;;
    *"route show default") echo "default via 192.0.2.1 dev eth0 proto dhcp" ;;
esac
"""
GETENT = """#!/bin/sh
[ "$2" = first ] && echo "10.0.0.1        STREAM first"
[ "$2" = own-name ] && echo "127.0.1.1       STREAM own-name"
"""
pytestmark = pytest.mark.process


def write_program(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def launch(tmp_path):
    """Run a script with these variables; returns what its Python printed."""
    for name, text in (("python", PYTHON), ("ip", IP), ("getent", GETENT)):
        write_program(tmp_path / "bin" / name, text)

    def run(script: Path, cores: set[int] | None = None, **variables: str) -> dict[str, str]:
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(tmp_path),
            "NPROC": "2",
            **variables,
        }
        # README runs them in the application's folder.
        relative_path = script.relative_to(script.parents[1])
        done = run_process(
            [SHELL, str(relative_path), *FIRST.get(script.name, "").split(), "--last"],
            cwd=script.parents[1],
            env=environment,
            timeout=60,
            preexec_fn=lambda: os.sched_setaffinity(0, cores) if cores else None,
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        return dict(line.split("=", 1) for line in done.stdout.splitlines())

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_training_script_by_dash(script, launch):
    # The shell of Debian, with the arguments of the user last.
    command = launch(script)["command"].split()
    module = "-m seed_multimodal.training.torchrun --standalone --nproc_per_node=2"
    assert command[:4] == module.split()
    assert (script.parents[1] / command[4]).is_file()
    assert command[-1] == "--last"


def test_launch_divides_the_cores_of_the_job(launch):
    # A job may have fewer than the machine.
    core = min(os.sched_getaffinity(0))
    assert launch(SCRIPTS[0], {core}, NNODES="2", NPROC="1")["OMP_NUM_THREADS"] == "1"
    assert launch(SCRIPTS[0], {core}, OMP_NUM_THREADS="7")["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("case", read_tables(__file__), ids=str)
def test_launch_chooses_the_interface_of_gloo(case, launch):
    # That of the route between the nodes: gloo alone takes the hosts file's, and hangs.
    variables = launch(SCRIPTS[0], **case["variables"])
    assert variables["GLOO_SOCKET_IFNAME"] == case["interface"]


@pytest.mark.parametrize(
    "variables",
    [
        {"NODE_RANK": "1"},
        {"NODE_RANK": "2", "NNODES": "2"},
        {"INDEX": "first", "HOST_NUM": "2"},
        {"MASTER_PORT": "high", "NNODES": "2"},
        {"NPROC": "0"},
    ],
    ids=str,
)
def test_launch_refuses_what_is_no_node_of_the_run(variables):
    # A node that does not know of the others would train alone.
    environment = {"PATH": os.environ["PATH"], "VIRTUAL_ENV": "/nowhere", "NPROC": "1"}
    done = run_process(
        [SHELL, str(SCRIPTS[0])],
        cwd=SCRIPTS[0].parents[1],
        env={**environment, **variables},
        timeout=60,
    )
    assert done.returncode == 2 and next(iter(variables)) in done.stderr, done


def test_retrieval_script_reads_its_variables(launch):
    from seed_multimodal.cli.main import build_parser

    variables = {"MODEL": "m", "DATA": "d", "STAGE1": "s", "IMAGES": "i", "OUT": "o"}
    script = ROOT / "SEED_Tokenizer" / "eval_scripts" / "retrieval_flickr.sh"
    *arguments, last = launch(script, **variables)["command"].split()
    assert (arguments[:2], last) == (["-m", "seed_multimodal"], "--last")
    read = vars(build_parser().parse_args(arguments[2:]))
    names = ("model", "data", "stage1", "image_root", "out")
    assert [str(read[name]) for name in names] == list(variables.values())


# srun's exit code, the job's state then → whether it is queued again.
ENDS = {(143, "RUNNING"): True, (143, "COMPLETING"): False, (2, "RUNNING"): False}


@pytest.mark.parametrize("code, state", ENDS)
@pytest.mark.parametrize("variables, cores", [({"SLURM_CPUS_PER_TASK": "64"}, "64"), ({}, "unset")])
def test_job_of_slurm(tmp_path, variables, cores, code, state):
    # Since Slurm 22.05 srun does not inherit the cores, and a node would train on one of them. A
    # job that saved before its time limit goes on; one that failed or was cancelled does not.
    write_program(
        tmp_path / "srun", f'#!/bin/sh\necho "${{SRUN_CPUS_PER_TASK:-unset}}"\nexit {code}\n'
    )
    write_program(tmp_path / "scontrol", '#!/bin/sh\necho "$1 $2"\n')
    write_program(tmp_path / "squeue", f"#!/bin/sh\necho {state}\n")
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b"}
    command = f". {ROOT}/scripts/slurm/cluster.sh; on_every_node true"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **job, **variables}
    done = run_process([SHELL, "-euc", command], cwd=tmp_path, timeout=60, env=environment)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == [cores, *["requeue 7"][: ENDS[code, state]]]


def test_logs_of_slurm_need_no_folder():
    # Slurm opens them before the script runs, and makes no folder.
    for file in (ROOT / "scripts" / "slurm").glob("*.sbatch"):
        assert "\n#SBATCH --output=%x-%" in file.read_text(), file
