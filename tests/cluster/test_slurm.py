"""Check the Slurm scripts on a real Slurm: a controller and two nodes, all on this machine."""

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from studies.engine.ledger import LEDGER, Ledger

ROOT = Path(__file__).parents[2]
PLACES = "/usr/sbin:/usr/bin:/sbin:/bin"
TOOLS = ("slurmctld", "slurmd", "munged", "sbatch")
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.faults,
    pytest.mark.skipif(
        os.geteuid() != 0
        or not all(shutil.which(tool, path="/usr/sbin:/usr/bin") for tool in TOOLS),
        reason="needs root and Slurm (Debian's slurm-wlm and munge)",
    ),
]

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    """A running Slurm, and the environment in which its tools find it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *words: str) -> str:
        """Run a command, check that it succeeds, and return its output."""
        done = subprocess.run(
            words, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return the state of a job."""
        shown = self.run("scontrol", "show", "job", job)
        return shown.split("JobState=")[1].split()[0]

    def ended(self, job: str, log: Path, seconds: float = 400) -> str:
        """Wait until a job has ended, and return its state."""
        end = time.monotonic() + seconds
        while (state := self.state(job)) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            assert time.monotonic() < end, (state, log.read_text())
            time.sleep(0.5)
        return state


@pytest.fixture
def slurm(
    tmp_path: Path, free_port: Callable[[], int], environment: dict[str, str]
) -> Iterator[Slurm]:
    folder = tmp_path / "slurm"
    for part in (folder, folder / "state", folder / "n1", folder / "n2"):
        part.mkdir()
    configuration = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    controller, first, second = (free_port() for _ in range(3))
    configuration.write_text(CONFIGURATION.format(**locals()))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    home = tmp_path / "home"
    home.mkdir()
    variables = environment | {
        "SLURM_CONF": str(configuration),
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{PLACES}",
        "USER": pwd.getpwuid(os.geteuid()).pw_name,
    }
    running = Slurm(folder, variables)
    munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munge += [f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
    munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    daemons = []
    try:
        nodes = [["slurmd", "-D", "-N", name] for name in ("n1", "n2")]
        for words in (munge, ["slurmctld", "-D"], *nodes):
            log = (folder / f"{words[0]}{words[-1]}.out".replace("/", "_")).open("w")
            daemons.append(subprocess.Popen(words, env=variables, stdout=log, stderr=log))
            log.close()
            time.sleep(0.5)
        end = time.monotonic() + 60
        while running.run("sinfo", "--noheader", "--states=idle", "--format=%D") != "2":
            assert time.monotonic() < end, (folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        yield running
        running.run("scancel", "--user=root")  # Ends jobs and processes of a failed test.
        while running.run("squeue", "--noheader"):
            time.sleep(0.2)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=30)


def _submit(slurm: Slurm, script: str, log: Path, nodes: int, *words: str) -> str:
    return slurm.run(
        "sbatch",
        "--parsable",
        f"--nodes={nodes}",
        "--cpus-per-task=1",
        f"--output={log}",
        f"cluster/slurm/{script}",
        *words,
    )


def test_nodes_join_a_job_and_one_that_is_cut_goes_on_on_two_nodes(
    slurm: Slurm, tmp_path: Path
) -> None:
    log, out = tmp_path / "log", tmp_path / "results"
    words = ["--study", "cut", "--num-trials", "4", "--max-epochs", "8", "--resolutions", "14"]
    words += ["--min-epochs", "8", "--cpus-per-trial", "1", "--out", str(out)]
    job = _submit(slurm, "sweep.sh", log, 1, *words)
    ledger = out / "cut" / LEDGER
    end = time.monotonic() + 200
    while not ledger.exists() or '"epoch":1' not in ledger.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)
    other = tmp_path / "join"
    joined = _submit(slurm, "join.sh", other, 1, job)
    while "Ray runtime started" not in (other.read_text() if other.exists() else ""):
        assert time.monotonic() < end, (log.read_text(), other)
        time.sleep(0.2)
    # Slurm sends this signal two minutes before a job's time limit.
    slurm.run("scancel", "--batch", "--signal=TERM", job)
    assert slurm.ended(job, log) == "FAILED"
    assert "resume with --study cut --resume" in log.read_text()
    slurm.run("scancel", joined)
    slurm.ended(joined, other)

    again = _submit(slurm, "sweep.sh", log, 2, *words, "--resume")
    assert slurm.ended(again, log) == "COMPLETED", log.read_text()
    assert "\n2 nodes\n" in log.read_text()
    assert [trial.state for trial in Ledger(ledger).trials] == ["completed"] * 4
    assert json.loads((out / "cut" / "best" / "knee" / "metrics.json").read_text())["epochs"] == 8
    # Neither the token nor a job is left.
    assert not list((tmp_path / "home" / ".batchcam").iterdir())
    assert slurm.run("squeue", "--noheader") == ""


def test_a_job_that_is_not_there_cannot_be_joined(slurm: Slurm, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = _submit(slurm, "join.sh", log, 1, "4711")
    assert slurm.ended(job, log) == "FAILED"
    assert "job 4711 is not one of your running studies" in log.read_text()
