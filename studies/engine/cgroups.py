"""What the Linux kernel tells a process about its memory: the limit, and kills by the OOM killer.

A container, a Slurm job and a systemd service are control groups (cgroups). Version 2 is one tree
below `/sys/fs/cgroup`; version 1 has a tree for memory below `/sys/fs/cgroup/memory`. Where a
container sees only its own part of a tree, the top of the tree is the container.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
_LIMITS = ("memory.max", "memory.limit_in_bytes")
_EVENTS = ("memory.events", "memory.oom_control")


def total_memory(root: Path = _ROOT) -> int:
    """Return the bytes of memory that this process may use: of the machine or of its cgroups.

    A cgroup cannot have more than the groups around it, so the smallest limit holds.

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (text for folder in _cgroups(root) for text in _read(folder, _LIMITS))
    return min([machine, *(int(text) for text in limits if text.strip().isdecimal())])


def oom_kills(root: Path = _ROOT) -> int | None:
    """Return how many processes the kernel's OOM killer has ended since the cgroup was made.

    Counts the processes of this process's cgroup, or those of the machine where the process is in
    no cgroup that counts.

    Args:
        root: the folder that holds `proc` and `sys`.

    Returns:
        None if the kernel does not count.
    """
    texts = [text for folder in _cgroups(root) for text in _read(folder, _EVENTS)]
    for text in [*texts, *_read(root / "proc", ("vmstat",))]:
        if found := re.search(r"^oom_kill (\d+)$", text, re.MULTILINE):
            return int(found[1])
    return None


def _cgroups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of those around it, innermost first."""
    for text in _read(root / "proc" / "self", ("cgroup",)):
        for line in text.splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                top = root / "sys/fs/cgroup"
            elif "memory" in controllers.split(","):
                top = root / "sys/fs/cgroup/memory"
            else:
                continue
            names = [name for name in path.split("/") if name not in ("", "..")]
            for length in range(len(names), -1, -1):
                yield top.joinpath(*names[:length])


def _read(folder: Path, names: tuple[str, ...]) -> Iterator[str]:
    """Yield the text of those files of a folder that exist and can be read."""
    for name in names:
        try:
            yield (folder / name).read_text(encoding="utf-8")
        except OSError:
            continue
