"""Which linears get 8 bits: by loss per byte, within a number of bits or as a cost model wants it."""

import pytest

from vllm_quantspec import precision
from vllm_quantspec.precision import Linear, fastest, within

LINEARS = [
    Linear("a", 1000, 4.25, 8.25, 0.004, 0.00004),
    Linear("b", 4000, 4.25, 8.25, 0.010, 0.0001),
    Linear("c", 2000, 4.5, 8.5, 0.009, 0.00009),
    Linear("d", 1000, 4.25, 8.25, 0.0, 0.0),
]


def test_those_that_lose_most_per_byte_come_first():
    wide = [within(LINEARS, bits).wide for bits in (4.3125, 4.9, 5.4, 5.9, 7.9, 8.5)]
    assert wide == [frozenset(), {"a"}, {"c"}, {"a", "c"}, {"a", "b", "c"}, {"a", "b", "c", "d"}]


@pytest.mark.parametrize("bits", [4.3, 5, 5.55, 6, 6.2, 7, 8, 8.25])
def test_the_average_stays_within_the_budget(bits):
    choice = within(LINEARS, bits)
    assert choice.bits <= max(bits, 4.3125)
    assert choice.bits == pytest.approx(precision.average_bits(LINEARS, choice.wide))
    left = [x for x in LINEARS if x.name not in choice.wide]
    assert all(precision.average_bits(LINEARS, choice.wide | {x.name}) > bits for x in left)
    assert choice.share == sum(x.weights for x in LINEARS if x.name in choice.wide) / 8000


def test_more_bits_are_expected_to_be_accepted_more_often():
    acceptances = [within(LINEARS, bits).acceptance for bits in (4.3, 5, 6, 8.5)]
    assert acceptances == sorted(acceptances) and len(set(acceptances)) == 4
    assert 0.9 < acceptances[0] < 0.94 and 0.98 < acceptances[-1] < 0.99


def test_a_part_of_the_cache_hides_what_weights_lose():
    few, many = within(LINEARS, 4.3), within(LINEARS, 8.5)
    assert few.sparse_acceptance < few.acceptance and many.sparse_acceptance < many.acceptance
    assert many.sparse_acceptance - few.sparse_acceptance < 0.8 * (many.acceptance - few.acceptance)
    assert precision.acceptance(5.0) == 0


def test_equal_losses_are_told_apart_by_name():
    same = [Linear(name, 10, 4.25, 8.25, 0.1, 0.001) for name in "cab"]
    assert within(same, 5.6).wide == within(same[::-1], 5.6).wide == {"a"}


def test_the_fastest_choice():
    assert fastest(LINEARS, lambda choice: choice.bits).wide == frozenset()
    assert fastest(LINEARS, lambda choice: choice.bits, some=True).wide == {"c"}
    assert fastest(LINEARS, lambda choice: 1000 - choice.bits).wide == frozenset()  # less to gain than the model knows
    assert fastest(LINEARS, lambda choice: 1000 - choice.bits, some=True).share == 1
    assert fastest(LINEARS, lambda choice: 10 - choice.bits, most_bytes=2000).wide == {"a", "c"}  # 500 and 1000 bytes
    assert fastest(LINEARS, lambda choice: 10 - choice.bits, most_bytes=100).wide == frozenset()
    assert fastest(LINEARS, lambda choice: 10 - choice.bits).share == 1
    assert fastest(LINEARS, lambda choice: abs(choice.bits - 5.8)).wide == {"a", "c"}
