"""The packages of the core that a machine lacks, for machines without a network.

Uses the standard library only, because it runs where other packages are missing.
"""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parents[3]
"""The checkout: the folder of pyproject.toml and constraints.txt."""

REQUIRED_BY: dict[str, tuple[str, ...]] = {"tyro": ("docstring-parser", "typeguard")}
"""What packages require that machines with PyTorch often lack. The metadata of a package that is
not installed cannot be read."""


def core_packages(pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    """Return the names of the packages that `batchcam` requires without any extra."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return [_name(requirement) for requirement in project["dependencies"]]


def missing(packages: list[str]) -> list[str]:
    """Return which of these packages, and of those they require, are not installed."""
    wanted = [each for name in packages for each in (name, *REQUIRED_BY.get(name, ()))]
    return [name for name in wanted if not _installed(name)]


def advice(lacking: list[str], constraints: Path = ROOT / "constraints.txt") -> str:
    """Return the commands that fetch the packages elsewhere and install them here."""
    pinned = dict.fromkeys(lacking, "")
    if constraints.is_file():
        for line in constraints.read_text(encoding="utf-8").splitlines():
            name, separator, version = line.partition("==")
            if separator and _normal(name) in pinned:
                pinned[_normal(name)] = f"=={version}"
    wheels = " ".join(name + version for name, version in pinned.items())
    return (
        f"{len(lacking)} packages are missing: {', '.join(lacking)}. On a machine with a network:\n"
        f"  pip download --no-deps --dest wheels {wheels}\n"
        "and on this one:\n"
        "  pip install --no-index --no-deps --target site wheels/*.whl\n"
        "  export PYTHONPATH=$PWD/site"
    )


def _name(requirement: str) -> str:
    return _normal(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
