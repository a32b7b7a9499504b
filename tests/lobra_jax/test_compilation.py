"""How programs are made ready: how many at a time, and what Python leaves for later meanwhile."""

import gc
import sys

import pytest

from lobra_jax import compilation
from lobra_jax.compilation import at_start, compile_threads


@pytest.mark.parametrize(
    ("cores", "threads"), [(1, 1), (2, 2), (16, 16), (24, 16), (32, 16), (48, 24), (64, 32), (192, 32)]
)
def test_every_core_compiles_of_few_and_every_other_of_many(monkeypatch, cores, threads):
    monkeypatch.setattr(compilation, "host_cores", lambda: cores)
    assert compile_threads() == threads


def test_python_makes_room_at_a_start_and_then_does_as_before():
    before_s = sys.getswitchinterval()
    with at_start():
        assert not gc.isenabled() and sys.getswitchinterval() < before_s / 2
    assert gc.isenabled() and sys.getswitchinterval() == before_s
    with pytest.raises(ValueError, match="failed"), at_start():
        raise ValueError("failed")
    assert gc.isenabled() and sys.getswitchinterval() == before_s
    gc.disable()
    try:
        with at_start():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
