"""Records of benchmarks: JSON files that several partial runs fill, row by row."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from starfire_prune.utils.files import write_text

__all__ = ["keep_rows", "versions"]

Rows = dict[str, dict[str, Any]]


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of these packages, of those that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def keep_rows(path: Path, head: dict[str, Any], rows: Rows) -> Rows:
    """Write rows into a record, beside those that earlier runs have left there.

    Args:
        path: of the record; its folder is made.
        head: what holds for all rows: versions, machine, settings.
        rows: by name; what they hold replaces what earlier ones of that name held.

    Returns:
        All rows that the record now has, the new ones with the date and the load.

    Raises:
        SystemExit: if the earlier rows are of another head.
    """
    head = {"machine": f"{platform.machine()}, {os.cpu_count()} CPUs", **head}
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {**head, "rows": {}}
    differing = [key for key, value in head.items() if old.get(key) != value]
    if differing:
        raise SystemExit(
            f"{path} was measured with another {', '.join(differing)}: remove it, or name another "
            f"file by --json"
        )
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    load = round(os.getloadavg()[1], 1)  # of five minutes: what else the machine had to do
    kept: Rows = dict(old["rows"])
    for name, row in rows.items():
        kept[name] = {**kept.get(name, {}), **row, "date": date, "load_average": load}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**head, "rows": kept}, indent=1) + "\n")
    return kept
