"""The fit of the cost model's coefficients."""

import numpy as np
import pytest

from planner.config_cost import CostPoint
from planner.fit import fit_coefficients, hold_out

TRUE = (2e-9, 0.0, 3e-6, 1e-7, 0.0, 2e-3)


def seconds(rows, length):
    c1, c2, c3, c4, c5, c6 = TRUE
    return (c1 * rows + c2) * length**2 + (c3 * rows + c4) * length + c5 * rows + c6


def points(noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return [
        CostPoint(rows=b, length=s, seconds=seconds(b, s) * (1 + noise * rng.standard_normal()), peak_bytes=0)
        for b in (1, 2, 4, 8, 16)
        for s in (64, 256, 1024, 4096)
    ]


def test_exact_data_is_recovered_where_it_was_not_measured():
    coefficients, error = fit_coefficients(hold_out(points()))

    c1, c2, c3, c4, c5, c6 = coefficients
    predicted = (c1 * 3 + c2) * 9000**2 + (c3 * 3 + c4) * 9000 + c5 * 3 + c6
    assert predicted == pytest.approx(seconds(3, 9000), rel=1e-6)
    assert error is not None and error.max < 1e-6


def test_held_out_points_do_not_move_the_fit_and_are_what_the_error_is_of():
    clean = hold_out(points())
    spoilt = [
        CostPoint(rows=p.rows, length=p.length, seconds=p.seconds * 2, peak_bytes=0, held_out=True) if p.held_out else p
        for p in clean
    ]

    coefficients, error = fit_coefficients(spoilt)
    assert coefficients == fit_coefficients(clean)[0]
    assert error is not None
    assert error.num_held_out == sum(p.held_out for p in clean) == 4
    assert error.mean == pytest.approx(0.5, rel=1e-5)


def test_noise_never_makes_a_negative_coefficient_or_a_falling_time():
    for seed in range(20):
        coefficients, _ = fit_coefficients(points(noise=0.2, seed=seed))
        assert min(coefficients) >= 0


def test_extremes_are_never_held_out_and_few_points_are_all_fitted():
    marked = hold_out(points())
    assert not marked[0].held_out and not marked[-1].held_out
    assert not any(point.held_out for point in hold_out(points()[:9]))
    assert fit_coefficients(hold_out(points()[:9]))[1] is None


def test_few_points_foretell_other_rows_at_the_same_work():
    def cost(rows, length):
        seconds = 1e-3 + rows * (2e-6 * length + 5e-9 * length**2)
        return CostPoint(rows=rows, length=length, seconds=seconds, peak_bytes=0)

    coefficients, _ = fit_coefficients([cost(1, 64), cost(1, 512), cost(1, 4096), cost(64, 64)])

    middle = cost(8, 512)
    c1, c2, c3, c4, c5, c6 = coefficients
    predicted = (c1 * 8 + c2) * 512**2 + (c3 * 8 + c4) * 512 + c5 * 8 + c6
    assert predicted == pytest.approx(middle.seconds, rel=1e-6)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_number_of_points_gives_a_fit_through_them(number):
    few = [CostPoint(rows=1, length=16 * 2**i, seconds=1e-3 * 2**i, peak_bytes=0) for i in range(number)]

    coefficients, _ = fit_coefficients(few)

    for p in few:
        c1, c2, c3, c4, c5, c6 = coefficients
        predicted = (c1 + c2) * p.length**2 + (c3 + c4) * p.length + c5 + c6
        assert predicted == pytest.approx(p.seconds, rel=1e-6)


def test_nothing_to_fit_is_refused():
    with pytest.raises(ValueError, match="no point"):
        fit_coefficients([])
    with pytest.raises(ValueError, match="positive seconds"):
        fit_coefficients([CostPoint(rows=1, length=1, seconds=0.0, peak_bytes=0)])
