"""The origin of a number: the command, the commit and the versions that produced it."""

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def command_line() -> str:
    """Return the command that started this process, in a form that runs in a checkout."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:  # Started by python -m.
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]])
    program = Path(sys.argv[0])
    typed = program.name if program.is_absolute() else str(program)
    python = ["python"] if program.suffix == ".py" else []
    return shlex.join([*python, typed, *sys.argv[1:]])


def git_commit() -> str | None:
    """Return the commit of this project's checkout, with "+dirty" if it has changes.

    None outside of a checkout. An installed copy is none, even within a checkout of something else.

    Example:
        >>> commit = git_commit()
        >>> commit is None or len(commit.removesuffix("+dirty")) == 40
        True
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(tracked, capture_output=True, check=True)
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+dirty" if changed else commit


def package_versions(*more: str) -> dict[str, str]:
    """Return the versions of the packages that a result depends on, by name, and of Python.

    A package that runs from a checkout has no version; its commit says which it is.

    Args:
        more: further packages to include.

    Example:
        >>> list(package_versions("pillow"))
        ['python', 'batchcam', 'torch', 'torchvision', 'timm', 'numpy', 'scikit-learn', 'pillow']
    """
    packages = ("batchcam", "torch", "torchvision", "timm", "numpy", "scikit-learn")
    return {"python": platform.python_version()} | {
        name: _version(name) for name in (*packages, *more)
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
