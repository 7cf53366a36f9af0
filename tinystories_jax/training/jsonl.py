"""Files of JSON objects, one per line and each with its `update`: metrics.jsonl and samples.jsonl."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def append_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends JSON objects to `path`, one per line."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the rows and how many lines are damaged; a last line still being written is not counted."""
    rows, num_damaged = [], 0
    # Not splitlines: a story may hold other line separators of Unicode, which JSON leaves as they are.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("update"), int):
            rows.append(row)
        elif number < len(lines):
            num_damaged += 1
    return rows, num_damaged
