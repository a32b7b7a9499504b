"""The relaxation's cuts hold for everything that fits one replica."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.relaxation import DUAL_FEASIBLE_KS, dual_feasible


@given(st.lists(st.integers(0, 840), min_size=1, max_size=12), st.sampled_from(DUAL_FEASIBLE_KS))
def test_slots_that_fit_one_replica_fit_it_after_the_dual_feasible_function(parts, k):
    # 840 is divisible by every k + 1: the breakpoints, where rounding could go wrong, are hit.
    total = max(sum(parts), 840)
    assert dual_feasible(np.array(parts) / total, k).sum() <= 1 + 1e-6


@pytest.mark.parametrize(("share", "k", "expected"), [(0.4, 1, 0.0), (0.6, 1, 1.0), (0.4, 2, 0.5), (0.3, 3, 1 / 3)])
def test_dual_feasible_function_of_known_shares(share, k, expected):
    assert dual_feasible(np.array([share]), k).tolist() == pytest.approx([expected])
