"""Check the project on a GPU, and measure it, within eight minutes.

python -m studies.benchmarks.gpu --out results/gpu

Needs the packages of the core only, and no network. Checks run several at a time, measurements one
after the other. Each part has a process and a time limit of its own, and its rows are written to
`<out>/<card>.json` as soon as they are there; `<out>/<card>.md` shows them.
"""

import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from batchcam.errors import ConfigError
from batchcam.provenance import command_line, git_commit, package_versions
from studies.benchmarks.gpu.card import describe
from studies.benchmarks.gpu.checks import CHECKS
from studies.benchmarks.gpu.measurements import MEASUREMENTS
from studies.benchmarks.gpu.page import page
from studies.benchmarks.gpu.parts import Outcome, Part, Setup, run_parts


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Check the project on a GPU, and measure it."""

    out: Path
    """Output folder for <card>.json and <card>.md."""
    device: str = "cuda"
    """cuda, or cpu to try the suite itself."""
    quick: bool = False
    """Run each part on as little as shows that it runs. The numbers mean nothing then."""
    parts: tuple[str, ...] = ()
    """Names of parts to run; all by default."""
    minutes: float = 8.0
    """Time of the suite. Parts that run then are killed, and no other starts."""
    together: int = 4
    """Checks that run at a time."""
    commit: str | None = None
    """Commit of the code, for a copy without git."""
    seed: int = 0
    """Seed of weights, batches and orders."""


def run(settings: Gpu) -> None:
    """Run the parts and write what they give; exit with status 1 if a check did not pass.

    Raises:
        ConfigError: a part is unknown, or the device is not available.
    """
    deadline = time.monotonic() + settings.minutes * 60
    known = [part.name for part in (*CHECKS, *MEASUREMENTS)]
    unknown = [name for name in settings.parts if name not in known]
    if unknown:
        raise ConfigError(f"--parts {unknown[0]} is unknown; choose from {', '.join(known)}.")
    if settings.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {settings.device} is not supported; use cuda or cpu.")
    setup = Setup(torch.device(settings.device), settings.quick, settings.seed)
    machine = _machine(setup)
    settings.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", machine["card"].lower()).strip("-")
    path = settings.out / f"{name}.json"
    record: dict[str, Any] = {
        "machine": machine,
        "quick": settings.quick,
        "seed": settings.seed,
        "git_commit": settings.commit or git_commit(),
        "versions": package_versions(),
        "command": command_line(),
        "parts": {},
    }

    def on_change(part: str, outcome: Outcome) -> None:
        record["parts"][part] = asdict(outcome)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
        if outcome.state != "running":
            print(_line(part, outcome), flush=True)

    for group, together in ((CHECKS, settings.together), (MEASUREMENTS, 1)):
        chosen = [part for part in group if not settings.parts or part.name in settings.parts]
        run_parts(chosen, setup, together=together, deadline=deadline, on_change=on_change)
    path.with_suffix(".md").write_text(page(record), encoding="utf-8")
    print(f"Results: {path}")
    if not all(Outcome(**each).passed for each in record["parts"].values()):
        sys.exit(1)


def _line(part: str, outcome: Outcome) -> str:
    checks = [row for row in outcome.rows if "passed" in row]
    passed = sum(row["passed"] for row in checks)
    counted = f", {passed} of {len(checks)} checks passed" if checks else ""
    message = outcome.message.strip().splitlines()
    why = f": {message[-1]}" if message else ""
    return f"{part}: {outcome.state} in {outcome.seconds:.0f} s{counted}{why}"


def _machine(setup: Setup) -> dict[str, Any]:
    """Return card, driver and CUDA version, read by a process of its own.

    Raises:
        ConfigError: the device is not available.
    """
    found: dict[str, Outcome] = {}
    run_parts(
        [Part("machine", describe, 120.0)],
        setup,
        together=1,
        deadline=time.monotonic() + 120,
        on_change=found.__setitem__,
    )
    outcome = found["machine"]
    if outcome.state != "finished":
        raise ConfigError(f"--device {setup.device} cannot be used: {outcome.message.strip()}")
    return outcome.rows[0]
