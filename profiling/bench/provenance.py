"""What a benchmark's numbers were measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from lobra_jax import __version__


def provenance(libraries: Sequence[str]) -> dict[str, Any]:
    """Date, commit, hardware and versions, as the head of a benchmark's JSON."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or None,
        "hardware": {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "versions": {
            "lobra": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in libraries},
        },
    }
