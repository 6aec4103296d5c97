"""Check that the engine loads neither the trainer nor the modules that monitor or report."""

import json
import subprocess
import sys
from pathlib import Path

import studies.engine
from tests.studies.conftest import ROOT

_LIST = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""


def _loaded(environment: dict[str, str], *modules: str) -> set[str]:
    """Return all modules that a fresh process has loaded after it imports the given ones."""
    done = subprocess.run(
        [sys.executable, "-c", _LIST, *modules],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(json.loads(done.stdout))


def test_engine_loads_neither_pytorch_nor_w_and_b(environment: dict[str, str]) -> None:
    folder = Path(str(studies.engine.__file__)).parent
    modules = {f"studies.engine.{path.stem}" for path in folder.glob("[!_]*.py")}
    assert "studies.engine.run" in modules
    loaded = _loaded(environment, *modules)
    assert loaded & {"torch", "wandb", "matplotlib", "timm", "sklearn"} == set()
    ours = {name for name in loaded if name.partition(".")[0] in ("batchcam", "studies")}
    assert ours == {"batchcam", "batchcam.errors", "studies", "studies.engine", *modules}
