"""Check how a driver joins a Ray cluster, and how it is refused."""

import socket
import subprocess
import sys
from pathlib import Path

from tests.studies.conftest import ROOT


def test_a_missing_token_is_an_error_with_the_remedy(
    environment: dict[str, str], tmp_path: Path
) -> None:
    variables = environment | {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = subprocess.run(
            [
                sys.executable,
                ROOT / "studies" / "bcpl_sweep.py",
                "--study",
                "s",
                "--address",
                address,
            ],
            cwd=tmp_path,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2
    assert f"error: cannot join the Ray cluster at '{address}'" in done.stderr
    assert "no authentication token was found. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results" / "s").exists()
