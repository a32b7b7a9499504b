"""Capacity from the bytes of compiled shapes, here told by a formula instead of a compiler."""

import pytest

from profiling.grid import full_shapes
from profiling.memory import DoesNotFitError, find_capacity, foretold_tokens

LENGTHS = (64, 512, 4096)


def quadratic(rows, length):
    return 1e6 + rows * (2e3 * length + 3.0 * length**2 + 4e4)


class Compiler:
    """Answers with `bytes_of(rows, length)` and counts what it was asked for."""

    def __init__(self, bytes_of):
        self.bytes_of, self.shapes = bytes_of, []

    def __call__(self, shapes):
        self.shapes += shapes
        return [int(self.bytes_of(*shape)) for shape in shapes]


def capacity(bytes_of, limit, *, max_tokens=4096, lengths=LENGTHS):
    compiler = Compiler(bytes_of)
    found = find_capacity(compiler, limit_bytes=limit, fixed_bytes=10**6, lengths=lengths, max_tokens=max_tokens)
    return found, compiler


def test_tokens_are_foretold_between_measured_lengths_and_rows():
    lines = {(1, length): 1000 + 5 * length for length in (16, 64, 256)}
    assert foretold_tokens(lines, 1000 + 5 * 100, 1000) == pytest.approx(100)
    assert foretold_tokens(lines, 1000 + 5 * 400, 1000) == pytest.approx(400)
    many_rows_cost_more = lines | {(4, 16): 1000 + 4 * 5 * 16 * 2}
    assert foretold_tokens(many_rows_cost_more, 1000 + 5 * 100, 1000) == pytest.approx(3.125 * 16)
    assert foretold_tokens(many_rows_cost_more, 1000 + 5 * 100, 1000, lengths=(16,)) == 4 * 16 - 1  # three rows fit


def kinked(rows, length):
    """Middle lengths need more than shorter and longer ones of as many tokens: long ones take another code path."""
    return 1e6 + rows * (2e3 * length + 20.0 * length * min(length, 512 if length <= 512 else 128))


def bumpy(rows, length):
    """Not of the fitted form: memory that jumps, as a compiler's choices make it."""
    return quadratic(rows, length) * (1.4 if length > 700 else 1.0) + 2e4 * length**1.2


@pytest.mark.parametrize("bytes_of", [quadratic, bumpy, kinked, lambda b, s: 1e6 + 9e5 * b + 10 * b * s])
@pytest.mark.parametrize("limit", [5 * 10**6, 10**7, 10**8, 10**9])
def test_capacity_was_compiled_fits_and_is_near_the_best(bytes_of, limit):
    found, compiler = capacity(bytes_of, limit)

    def worst(tokens):
        return max(bytes_of(*shape) for shape in full_shapes(LENGTHS, tokens))

    assert worst(found.tokens) <= limit
    assert set(full_shapes(LENGTHS, found.tokens)) <= set(compiler.shapes)
    assert len(compiler.shapes) == len(set(compiler.shapes)) <= 15
    too_large = next((tokens for tokens in range(64, 4097, 16) if worst(tokens) > limit), 4112)
    assert found.tokens >= 0.7 * (too_large - 16)


def test_capacity_grows_with_the_limit_up_to_the_largest_of_interest():
    tokens = [capacity(quadratic, limit)[0].tokens for limit in (2 * 10**6, 10**7, 5 * 10**7, 10**12)]
    assert tokens == sorted(tokens) and tokens[0] < tokens[1] < tokens[2]
    assert tokens[-1] == 4096
    assert capacity(quadratic, 10**12, max_tokens=8192)[0].tokens == 8192
    assert capacity(quadratic, 10**12, max_tokens=4640)[0].tokens == 4640  # as asked, whatever the alignment


def test_nothing_fits_says_why():
    with pytest.raises(DoesNotFitError, match="weights and adapters alone"):
        capacity(quadratic, 10**6 - 1)
    with pytest.raises(DoesNotFitError, match="1 x 64 tokens need"):
        capacity(quadratic, 10**6 + 1000)
    with pytest.raises(DoesNotFitError, match="largest micro-batch of 32"):
        capacity(quadratic, 10**9, max_tokens=32)


def test_a_single_length_will_do():
    found, _ = capacity(quadratic, 10**7, lengths=(64,))
    assert found.tokens >= 64 and quadratic(1, found.tokens) <= 10**7


@pytest.mark.parametrize("bytes_of", [quadratic, bumpy, kinked])
@pytest.mark.parametrize("limit", [5 * 10**6, 10**7, 10**8])
def test_an_expected_capacity_that_is_right_spares_all_but_one_round_of_compiling(bytes_of, limit):
    found, _ = capacity(bytes_of, limit)
    rounds = []

    def compile_round(shapes):
        rounds.append(shapes)
        return [int(bytes_of(*shape)) for shape in shapes]

    fixed = dict(limit_bytes=limit, fixed_bytes=10**6, lengths=LENGTHS, max_tokens=4096)
    again = find_capacity(compile_round, expected=found.tokens, **fixed)
    assert again.tokens == found.tokens and len(rounds) == 1
    assert set(again.bytes) >= set(full_shapes(LENGTHS, found.tokens))
    too_much = min(2 * found.tokens, 4096)
    if max(bytes_of(*shape) for shape in full_shapes(LENGTHS, too_much)) > limit:
        other = find_capacity(compile_round, expected=too_much, **fixed)
        assert max(bytes_of(*shape) for shape in full_shapes(LENGTHS, other.tokens)) <= limit
        assert other.tokens >= 0.7 * found.tokens
