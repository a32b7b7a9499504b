"""How programs are made ready: how many at a time, and Python's collector meanwhile."""

import gc

import pytest

from lobra_jax import compilation
from lobra_jax.compilation import collector_at_rest, compile_threads


@pytest.mark.parametrize(
    ("cores", "threads"), [(1, 1), (2, 2), (16, 16), (24, 16), (32, 16), (48, 24), (64, 32), (192, 32)]
)
def test_every_core_compiles_of_few_and_every_other_of_many(monkeypatch, cores, threads):
    monkeypatch.setattr(compilation, "host_cores", lambda: cores)
    assert compile_threads() == threads


def test_the_collector_rests_and_then_does_as_before():
    with collector_at_rest():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="failed"), collector_at_rest():
        raise ValueError("failed")
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_at_rest():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
