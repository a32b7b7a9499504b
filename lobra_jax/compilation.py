"""Counts XLA compilations, so that a run can show that none happens after warm-up."""

from __future__ import annotations

import threading
from typing import Any

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompilationCount:
    """Programs compiled (or read from the persistent cache) in this process since the counter was made."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, name: str, _seconds: float, **_: Any) -> None:
        if name == _EVENT:
            with self._lock:
                self.total += 1
