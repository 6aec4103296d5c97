"""Check that a study survives the loss of a node, and uses a node that joins later."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import batchcam
from cluster.local import LocalClusterSettings, local_cluster
from studies.engine.ledger import LEDGER, Ledger

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.faults,
]

SCRIPT = Path(__file__).parents[2] / "studies" / "bcpl_sweep.py"


def test_study_outlives_a_node_and_uses_one_that_comes_later(
    environment: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "results" / "faults"
    command = [sys.executable, str(SCRIPT), "--study", "faults", "--num-trials", "4"]
    command += ["--max-epochs", "4", "--min-epochs", "4", "--resolutions", "14"]
    command += ["--cpus-per-trial", "1"]
    log = tmp_path / "log"
    with local_cluster(LocalClusterSettings(workers=2)) as cluster, log.open("w") as file:
        variables = environment | {"RAY_ADDRESS": cluster.address}
        driver = subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=file, stderr=file)
        ledger = folder / LEDGER
        while not ledger.exists() or '"epoch":2' not in ledger.read_text():
            assert driver.poll() is None, log.read_text()
            time.sleep(0.05)
        cluster.remove_worker(cluster.workers[0])  # Kills the trial that runs there.
        time.sleep(2)
        cluster.add_worker()
        assert driver.wait(timeout=600) == 0, log.read_text()

    trials = Ledger(ledger).trials
    assert [trial.state for trial in trials] == ["completed"] * 4
    for trial in trials:
        assert [report["epoch"] for report in trial.reports] == [1, 2, 3, 4]
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    counted = Counter(line["number"] for line in lines if line["event"] == "ended")
    assert counted == dict.fromkeys(range(4), 1)
    assert batchcam.load(folder / "best" / "knee").metrics["epochs"] == 4
