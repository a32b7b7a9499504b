"""Python's collector while programs are made ready."""

import gc

import pytest

from lobra_jax.compilation import collector_at_rest


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
