"""Check that no module uses a private name of the libraries that it depends on.

A private name may change with any release. The check covers imports, attributes, overridden
methods, and W&B's experimental settings, which begin with `x_`.
"""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDERS = ("batchcam", "studies", "cluster", "tests")
LIBRARIES = ("torch", "optuna", "ray", "timm", "wandb", "wandb_workspaces")

_WORKSPACE = "wandb-workspaces has no public way to turn a workspace into JSON and back"
_HOOKS = "PyTorch has no public way to list the hooks of a module"
EXCEPTIONS = {
    ("studies/monitoring/wandb_workspace.py", "_to_model"): _WORKSPACE,
    ("tests/studies/monitoring/test_wandb_workspace.py", "_to_model"): _WORKSPACE,
    ("tests/studies/monitoring/test_wandb_workspace.py", "_from_model"): _WORKSPACE,
    ("tests/studies/baselines/test_library.py", "_forward_hooks"): _HOOKS,
    ("tests/studies/baselines/test_predecessor.py", "_forward_hooks"): _HOOKS,
    ("tests/cluster/test_launch_files.py", "_private"): (
        "Ray validates a cluster's configuration publicly only when it starts one"
    ),
}
"""File and private name of each use that has no public alternative, with the reason."""


def test_private_names_of_libraries_are_used_only_where_there_is_no_other_way() -> None:
    trees = {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    own = {name for tree in trees.values() for name in _defined(tree)}
    found = {(path, name) for path, tree in trees.items() for name in _foreign(tree, own)}
    assert found == set(EXCEPTIONS)


def test_check_finds_each_kind_of_use() -> None:
    source = """
import optuna, torch._dynamo, wandb
from ray.air._internal import x
from optuna.storages.journal import _file
from optuna import Study as Base
torch._C.f()
study._storage
wandb.Settings(x_disable_stats=True)
self._mine
class View(Base):
    def _get_trials(self): pass
    def _own(self): pass
class Other(optuna.Study):
    def _get_best_trial(self): pass
"""
    assert set(_foreign(ast.parse(source), {"_mine", "_own"})) == {
        "_dynamo",
        "_internal",
        "_file",
        "_C",
        "_storage",
        "x_disable_stats",
        "_get_trials",
        "_get_best_trial",
    }


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_library(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in LIBRARIES


def _defined(tree: ast.Module) -> Iterator[str]:
    """Yield the private names that a module defines: functions, classes, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def _foreign(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Yield the private names of libraries that a module uses.

    A private attribute counts as a library's if no module of the project defines its name, or if it
    is an attribute of an imported library module.
    """
    imported = _imported(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                paths = [alias.name for alias in node.names]
            case ast.ImportFrom(module=str(module), level=0):
                paths = [f"{module}.{alias.name}" for alias in node.names]
            case ast.Attribute():
                path = _dotted(node, imported)
                paths = [path] if path else []
                if _is_private(node.attr) and node.attr not in own:
                    yield node.attr
            case ast.Call() if (_dotted(node.func, imported) or "").startswith("wandb."):
                paths = []
                given = [each.arg for each in node.keywords if each.arg is not None]
                yield from (name for name in given if name.startswith("x_"))
            case ast.ClassDef():
                paths = []
                yield from _overridden(node, imported)
            case _:
                continue
        for path in filter(_is_library, paths):
            yield from filter(_is_private, path.split("."))


def _imported(tree: ast.Module) -> dict[str, str]:
    """Return the full dotted name of each imported name."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _dotted(node: ast.expr, imported: dict[str, str]) -> str | None:
    """Return the full name of an expression like `tune.Callback`; None if it is not imported."""
    if isinstance(node, ast.Name):
        return imported.get(node.id)
    if isinstance(node, ast.Attribute):
        parent = _dotted(node.value, imported)
        return None if parent is None else f"{parent}.{node.attr}"
    return None


def _overridden(node: ast.ClassDef, imported: dict[str, str]) -> Iterator[str]:
    """Yield the private methods of a class that override methods of a library's class."""
    paths = [_dotted(base, imported) for base in node.bases]
    bases = [_load(path) for path in paths if path is not None and _is_library(path)]
    for item in node.body:
        if not isinstance(item, ast.FunctionDef) or not _is_private(item.name):
            continue
        if any(hasattr(base, item.name) for base in bases):
            yield item.name


def _load(path: str) -> Any:
    """Import and return the object with a full dotted name."""
    names = path.split(".")
    for length in range(len(names), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(names[:length]))
        except ModuleNotFoundError:
            continue
        for name in names[length:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)
