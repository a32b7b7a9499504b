"""How programs are made ready: how many at a time, and what Python leaves for later meanwhile."""

import gc
import sys
import weakref

import pytest

from lobra_jax import compilation
from lobra_jax.compilation import after_start, at_start, compile_threads


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


@pytest.fixture
def no_collector():
    """Garbage is what a test says, and is looked for when it says so: as in a start."""
    gc.disable()
    yield
    gc.enable()


def test_python_looks_for_no_garbage_among_what_a_start_left(no_collector):
    class Cycle:
        def __init__(self):
            self.itself = self

    left, garbage = [[] for _ in range(100_000)], weakref.ref(Cycle())
    frozen = gc.get_freeze_count()
    with pytest.raises(ValueError, match="failed"), after_start():
        assert garbage() is None
        assert gc.get_freeze_count() >= frozen + len(left)
        later = weakref.ref(Cycle())
        gc.collect()
        assert later() is None
        with after_start():
            pass
        assert gc.get_freeze_count() >= frozen + len(left), "the inner one ended the outer"
        raise ValueError("failed")
    assert gc.get_freeze_count() == 0
