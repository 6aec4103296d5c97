"""The results of the suite as a page in Markdown: a table of checks, and one per measurement."""

from collections.abc import Mapping
from typing import Any

from studies.benchmarks.batches import CROSS_ENTROPY
from studies.markdown import markdown_table

Record = Mapping[str, Any]


def page(record: Record) -> str:
    """Return the page of a record that the suite wrote.

    Args:
        record: the content of `<card>.json`.
    """
    machine, parts = record["machine"], record["parts"]
    commit = record["git_commit"] or "unknown"
    origin = [
        f"# {machine['card']}",
        "",
        f"By `{record['command']}` at commit {commit}, seed {record['seed']}. "
        + ", ".join(f"{name} {value}" for name, value in machine.items() if name != "card")
        + ".",
    ]
    if record["quick"]:
        origin += ["", "**A quick run: its numbers mean nothing.**"]
    states = [
        [name, part["state"], f"{part['seconds']:.0f}", _last_line(part["message"])]
        for name, part in parts.items()
    ]
    sections = [
        "\n".join(origin) + "\n",
        "## Parts\n\n" + markdown_table(["part", "state", "seconds", "message"], states),
    ]
    checks = [
        [name, _check_name(row), "yes" if row["passed"] else "**no**", *_found(row)]
        for name, part in parts.items()
        for row in part["rows"]
        if "passed" in row
    ]
    if checks:
        header = ["part", "check", "passed", "found", "tolerance"]
        sections.append("## Checks\n\n" + markdown_table(header, checks))
    timed = [row for part in parts.values() for row in part["rows"] if "milliseconds" in row]
    losses = [row for row in timed if CROSS_ENTROPY in row["milliseconds"]["wall"]]
    if losses:
        sections.append(_steps(losses))
    for name, part in parts.items():
        rows = [row for row in part["rows"] if "passed" not in row and row not in losses]
        if rows:
            sections.append(f"## {name[0].upper()}{name[1:]}\n\n" + _generic(rows))
    return "\n".join(sections)


def _last_line(message: str) -> str:
    lines = message.strip().splitlines()
    return _cell(lines[-1]) if lines else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _check_name(row: Record) -> str:
    return ", ".join(str(row[name]) for name in ("backbone", "check", "precision") if name in row)


def _found(row: Record) -> list[str]:
    return [_shown(row["found"]), _shown(row.get("tolerance", ""))]


def _shown(value: Any) -> str:
    """Return a value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    if isinstance(value, list) and len(value) == 3 and all(isinstance(v, float) for v in value):
        return _interval(value)
    return _cell(str(value))


def _interval(ratio: list[float]) -> str:
    median, low, high = ratio
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def _steps(rows: list[Record]) -> str:
    """Return the table of a step's time and memory by loss, over cross-entropy's."""
    lines = []
    for row in rows:
        memory = row["memory_bytes"]
        for name in row["milliseconds"]["wall"]:
            ratio = row["ratios"]["wall"].get(name)
            lines.append(
                [
                    row["backbone"],
                    row["mode"],
                    name,
                    f"{row['milliseconds']['wall'][name] / row['steps_together']:.2f}",
                    _interval(ratio) if ratio else "1",
                    f"{memory[name] / max(1, memory[CROSS_ENTROPY]):.2f}" if memory else "",
                ]
            )
    header = ["model", "mode", "loss", "milliseconds", "time over cross-entropy", "memory over it"]
    kind = f"{rows[0]['precision']}, batches of {rows[0]['batch_size']}"
    return f"## Steps ({kind})\n\n" + markdown_table(header, lines)


_UNSHOWN = {"cpu", "config", "versions", "command", "git_commit", "load", "epochs", "memory_bytes"}


def _generic(rows: list[Record]) -> str:
    """Return a table with a column for each number of the rows."""
    flat = [_flattened(row) for row in rows]
    header = list(dict.fromkeys(name for row in flat for name in row))
    return markdown_table(header, [[row.get(name, "") for name in header] for row in flat])


def _flattened(row: Record, prefix: str = "") -> dict[str, str]:
    """Return the numbers of a row by their names, those of nested records included."""
    flat: dict[str, str] = {}
    for name, value in row.items():
        if name in _UNSHOWN:
            continue
        if isinstance(value, Mapping):
            inner = value.get("wall", value)
            flat |= _flattened(inner, f"{prefix}{name.replace('_', ' ')}: ")
        else:
            flat[prefix + name.replace("_", " ")] = _shown(value)
    return flat
