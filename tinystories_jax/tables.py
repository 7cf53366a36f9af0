"""Tables for a terminal and for a page of Markdown."""

import re
from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], *, flush_right: bool = False) -> list[str]:
    """Returns lines with the cells of `rows`, equally many in each, aligned: the first column flush left, the others
    too, or flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *rest = (
            cell.rjust(width) if flush_right and index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return lines


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, flush_right: bool = False) -> str:
    """Returns a table of Markdown that shows its cells as they are, aligned as by `columns`."""
    rule = ["---", *("---:" if flush_right else "---" for _ in head[1:])]
    escaped = [[markdown_text(cell) for cell in row] for row in (head, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (escaped[0], rule, *escaped[1:]))


def markdown_text(text: str) -> str:
    """Returns Markdown that shows one line of `text` as it is."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|&~])", r"\\\1", text)
    return re.sub(r"^(\s*)(\d*)([-+.)=])(?=[-=\s]|$)", r"\1\2\\\3", escaped)
