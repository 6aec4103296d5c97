import subprocess
import sys
from collections.abc import Callable


def test_timeout_names_the_missing_nodes_and_the_last_error(
    environment: dict[str, str], free_port: Callable[[], int]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "cluster.wait"),
            *("--nodes", "2", "--address", address, "--seconds", "0.1"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "error: 0 of 2 nodes joined within 0.1 seconds" in done.stderr
    assert f"The last error: no Ray cluster answers at '{address}'" in done.stderr
