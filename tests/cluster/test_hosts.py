"""Check a Ray cluster of several hosts that requires a token; a host is a network namespace."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from studies.engine.ledger import LEDGER, Ledger

ROOT = Path(__file__).parents[2]
HEAD = "10.77.0.1"
ADDRESS = f"{HEAD}:6379"


def _may_make_hosts() -> bool:
    """Return whether this process may create network namespaces.

    Root in a container may lack the permission, so the function tries it.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"bc{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made.returncode == 0


pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.faults,
    pytest.mark.skipif(
        not _may_make_hosts(),
        reason="needs root, the permission to create network namespaces, and Debian's iproute2",
    ),
]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """Three hosts on one switch; the first one is the head node."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
            # Ray declares a silent node dead after some seconds instead of half a minute.
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "4",
        }
        self.names = [f"bc{os.getpid()}h{number}" for number in (1, 2, 3)]
        self.switch = f"bc{os.getpid()}s"

    def build(self) -> None:
        """Create the switch, the hosts, and the links between them."""
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")
        for number, name in enumerate(self.names, start=1):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            port = f"port{number}"
            _ip(
                "-n",
                name,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                port,
                "netns",
                self.switch,
            )
            _ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "route", "add", "default", "dev", "eth0")

    def unplug(self, number: int) -> None:
        """Disconnect a host from the switch."""
        _ip("-n", self.switch, "link", "set", f"port{number}", "down")

    def run(self, number: int, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, and return the finished process."""
        return subprocess.run(
            ["ip", "netns", "exec", self.names[number - 1], *words],
            env=self.environment | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def remove(self) -> None:
        """Kill all processes on the hosts, and remove hosts and switch."""
        for name in (*self.names, self.switch):
            pids = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            ).stdout.split()
            if pids:
                subprocess.run(["kill", "-9", *pids], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def hosts(environment: dict[str, str]) -> Iterator[Hosts]:
    built = Hosts(environment)
    try:
        built.build()
        start = ("ray", "start", "--disable-usage-stats")
        head = built.run(
            1, *start, "--head", f"--node-ip-address={HEAD}", "--port=6379", "--num-cpus=0"
        )
        assert head.returncode == 0, head.stderr + head.stdout
        for number in (2, 3):
            own = f"--node-ip-address=10.77.0.{number}"
            worker = built.run(number, *start, f"--address={ADDRESS}", "--num-cpus=1", own)
            assert worker.returncode == 0, worker.stderr + worker.stdout
        yield built
    finally:
        built.remove()


JOIN = f"import ray; ray.init(address='{ADDRESS}'); print('joined', len(ray.nodes()))"


def test_a_cluster_of_hosts_keeps_strangers_out_and_survives_a_cut_cable(
    hosts: Hosts, tmp_path: Path
) -> None:
    waited = hosts.run(
        1, sys.executable, "-m", "cluster.wait", "--nodes", "3", "--address", ADDRESS
    )
    assert "3 nodes" in waited.stdout, waited.stderr

    for mode, token in (("disabled", ""), ("token", "f" * 64)):
        client = hosts.run(3, sys.executable, "-c", JOIN, RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN=token)
        assert client.returncode != 0
        assert "joined" not in client.stdout
        assert "auth" in client.stderr.lower()
    # The dashboard and the job API listen only on the head's loopback address.
    jobs = "import urllib.request as r; print(r.urlopen('http://{}:8265/api/jobs/').status)"
    assert hosts.run(3, sys.executable, "-c", jobs.format(HEAD)).returncode != 0
    own = hosts.run(1, sys.executable, "-c", jobs.format("127.0.0.1"))
    assert "401" in own.stderr or "403" in own.stderr

    words = ["--study", "hosts", "--num-trials", "3", "--max-epochs", "8", "--min-epochs", "8"]
    words += ["--resolutions", "14", "--cpus-per-trial", "1", "--out", str(tmp_path)]
    words += ["--address", ADDRESS]
    log = tmp_path / "log"
    with log.open("w") as file:
        driver = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                hosts.names[0],
                sys.executable,
                "studies/bcpl_sweep.py",
                *words,
            ],
            env=hosts.environment,
            cwd=ROOT,
            stdout=file,
            stderr=file,
        )
    ledger = tmp_path / "hosts" / LEDGER
    while not ledger.exists() or '"epoch":2' not in ledger.read_text():
        assert driver.poll() is None, log.read_text()
        time.sleep(0.05)
    hosts.unplug(2)
    assert driver.wait(timeout=400) == 0, log.read_text()
    trials = Ledger(ledger).trials
    assert [trial.state for trial in trials] == ["completed"] * 3
    for trial in trials:
        assert [report["epoch"] for report in trial.reports] == list(range(1, 9))
