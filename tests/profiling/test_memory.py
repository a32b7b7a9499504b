"""Capacity from the bytes of compiled shapes, here told by a formula instead of a compiler."""

import pytest

from profiling.memory import DoesNotFitError, MemoryModel, find_capacity, fit_memory

LENGTHS = (64, 512, 4096)
TRUE = MemoryModel(fixed=1e6, per_token=2e3, per_pair=3.0, per_row=4e4)


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


def test_fit_recovers_the_terms():
    shapes = [(1, 64), (1, 512), (1, 4096), (8, 64)]
    model = fit_memory({s: round(TRUE.bytes(*s)) for s in shapes}, TRUE.fixed)
    assert model.bytes(16, 300) == pytest.approx(TRUE.bytes(16, 300), rel=1e-3)


def test_max_tokens_solves_the_model():
    found = TRUE.max_tokens(60e6, 64)
    assert max(TRUE.bytes(1, found), TRUE.bytes(found / 64, 64)) == pytest.approx(60e6, rel=1e-6)
    assert TRUE.max_tokens(1e3, 64) == 0
    assert MemoryModel(fixed=0, per_token=0, per_pair=0, per_row=0).max_tokens(1.0, 64) == float("inf")


def bumpy(rows, length):
    """Not of the fitted form: memory that jumps, as a compiler's choices make it."""
    return TRUE.bytes(rows, length) * (1.4 if length > 700 else 1.0) + 2e4 * length**1.2


@pytest.mark.parametrize("bytes_of", [TRUE.bytes, bumpy, lambda b, s: 1e6 + 9e5 * b + 10 * b * s])
@pytest.mark.parametrize("limit", [5 * 10**6, 10**7, 10**8, 10**9])
def test_capacity_was_compiled_fits_and_is_near_the_best(bytes_of, limit):
    found, compiler = capacity(bytes_of, limit)

    def worst(tokens):
        return max(bytes_of(1, tokens), bytes_of(tokens // 64, 64))

    assert worst(found.tokens) <= limit
    assert {(1, found.tokens), (found.tokens // 64, 64)} <= set(compiler.shapes)
    assert len(compiler.shapes) == len(set(compiler.shapes)) <= 15
    best = max(tokens for tokens in range(64, 4097, 16) if worst(tokens) <= limit)
    assert found.tokens >= 0.7 * best


def test_capacity_grows_with_the_limit_up_to_the_largest_of_interest():
    tokens = [capacity(TRUE.bytes, limit)[0].tokens for limit in (2 * 10**6, 10**7, 5 * 10**7, 10**12)]
    assert tokens == sorted(tokens) and tokens[0] < tokens[1] < tokens[2]
    assert tokens[-1] == 4096
    assert capacity(TRUE.bytes, 10**12, max_tokens=8192)[0].tokens == 8192


def test_nothing_fits_says_why():
    with pytest.raises(DoesNotFitError, match="weights and adapters alone"):
        capacity(TRUE.bytes, 10**6 - 1)
    with pytest.raises(DoesNotFitError, match="1 x 64 tokens need"):
        capacity(TRUE.bytes, 10**6 + 1000)
    with pytest.raises(DoesNotFitError, match="largest micro-batch of 32"):
        capacity(TRUE.bytes, 10**9, max_tokens=32)


def test_a_single_length_will_do():
    found, _ = capacity(TRUE.bytes, 10**7, lengths=(64,))
    assert found.tokens >= 64 and TRUE.bytes(1, found.tokens) <= 10**7
