"""Check that ARCHITECTURE.md names every module, and no module that does not exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("batchcam", "studies", "cluster")


def _listed() -> set[str]:
    """Return the names of the Python files in the module tree of ARCHITECTURE.md."""
    tree = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("```")[1]
    return set(re.findall(r"\b\w+\.py\b", tree))


def test_every_module_is_in_the_tree_and_no_other() -> None:
    modules = {
        path.name
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert _listed() == modules
