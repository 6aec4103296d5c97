import os
from pathlib import Path

import pytest

from studies.engine.cgroups import oom_kills, total_memory

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MIB = 2**20


def write(root: Path, files: dict[str, str]) -> Path:
    """Write files below a folder that stands for the root of a machine."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        pytest.param({}, MACHINE, id="no-cgroups"),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{64 * MIB}\n"},
            64 * MIB,
            id="v2-container",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"},
            MACHINE,
            id="v2-without-a-limit",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/system.slice/job/step\n",
                "sys/fs/cgroup/system.slice/job/step/memory.max": "max\n",
                "sys/fs/cgroup/system.slice/job/memory.max": f"{32 * MIB}\n",
                "sys/fs/cgroup/system.slice/memory.max": f"{64 * MIB}\n",
                "sys/fs/cgroup/system.slice/other/memory.max": f"{MIB}\n",
            },
            32 * MIB,
            id="v2-nested-job",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.max": f"{16 * MIB}\n",
                "sys/fs/cgroup/job/memory.max": f"{32 * MIB}\n",
            },
            16 * MIB,
            id="v2-nested-step",
        ),
        pytest.param(
            # A container of version 1 sees the host's path, and its own group at the top.
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n0::/docker/a\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{48 * MIB}\n",
            },
            48 * MIB,
            id="v1-container",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:hugetlb,memory:/slurm/job_7\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": f"{24 * MIB}\n",
            },
            24 * MIB,
            id="v1-nested",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            MACHINE,
            id="v1-without-a-limit",
        ),
        pytest.param(
            # Another process of the machine is in the limited group.
            {"proc/self/cgroup": "0::/mine\n", "sys/fs/cgroup/other/memory.max": f"{MIB}\n"},
            MACHINE,
            id="limit-of-others",
        ),
    ],
)
def test_total_memory_is_the_smallest_limit(
    tmp_path: Path, files: dict[str, str], limit: int
) -> None:
    assert total_memory(write(tmp_path, files)) == limit


def test_total_memory_of_this_process_is_at_most_that_of_the_machine() -> None:
    assert 0 < total_memory() <= MACHINE


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        pytest.param({}, None, id="not-counted"),
        pytest.param({"proc/vmstat": "pgfault 9\noom_kill 3\n"}, 3, id="machine"),
        pytest.param(
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.events": "oom 7\noom_kill 2\noom_group_kill 1\n",
                "sys/fs/cgroup/job/memory.events": "oom 9\noom_kill 5\noom_group_kill 1\n",
                "proc/vmstat": "oom_kill 8\n",
            },
            2,
            id="v2",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:memory:/docker/ab\n",
                "sys/fs/cgroup/memory/memory.oom_control": "under_oom 0\noom_kill 4\n",
            },
            4,
            id="v1",
        ),
    ],
)
def test_kills_are_those_of_the_innermost_group_that_counts(
    tmp_path: Path, files: dict[str, str], kills: int | None
) -> None:
    assert oom_kills(write(tmp_path, files)) == kills
