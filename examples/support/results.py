"""Rows of results: what a run was, and what it gave."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import factordisc
from support import processes


def environment() -> dict[str, Any]:
    """Describes what a result depends on besides its settings."""
    return {
        "factordisc": factordisc.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all; of several processes the first does."""
    _write(path, lambda partial: partial.write_text(json.dumps(content, indent=1) + "\n"))


def write_tensors(path: Path, content: Any) -> None:
    """Writes tensors, numbers and strings, whole or not at all; the first process does."""
    _write(path, lambda partial: torch.save(content, partial))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    if not processes.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # named after the process, since several may write one file
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Reads one row from every file."""
    return [json.loads(path.read_text()) for path in paths]


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Lays rows out as text: `columns` maps keys to format specifications."""
    cells = [list(columns), *([format(row[k], f) for k, f in columns.items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in cells)
