"""Tables in Markdown."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the columns after the first three are right-aligned."""
    rule = [" --- " if column < 3 else " --: " for column in range(len(header))]
    lines = [header, *rows]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join(rule) + "|", *text[1:]]) + "\n"
