import socket
import subprocess
import sys
from pathlib import Path


def test_missing_token_is_refused_with_the_remedy(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # Ray looks for a token first.
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = subprocess.run(
            # In a process of its own, because Ray reads the mode only once.
            [
                sys.executable,
                "-c",
                f"from studies.planning.ray_cluster import connect; connect({address!r})",
            ],
            env=environment | {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    error = done.stderr.splitlines()[-1]
    assert f"ConfigError: no Ray cluster accepts a connection at '{address}'" in error
    assert "no authentication token was found. If the cluster requires a token" in error
    assert "set RAY_AUTH_TOKEN to its token or copy its head node's ~/.ray/auth_token" in error
