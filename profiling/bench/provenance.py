"""Where and with what numbers were taken: hardware, versions, commit and date, for every JSON of results."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lobra_jax import __version__

COMMIT_TIMEOUT_S = 10.0


def provenance(libraries: Sequence[str]) -> dict[str, Any]:
    """Hardware and how busy it was, versions, commit (None outside a checkout, "+" with changes) and date."""
    return {
        "hardware": f"{len(os.sched_getaffinity(0))} cores, {_processor()}",
        "load_average": os.getloadavg()[0],
        "versions": {
            "lobra-jax": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in libraries},
        },
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "--short", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + "+" * bool(changed)


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ("git", *arguments), cwd=folder, capture_output=True, text=True, check=True, timeout=COMMIT_TIMEOUT_S
    )
    return done.stdout.strip()
