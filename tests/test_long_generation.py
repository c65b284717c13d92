"""What long_generation.py makes of scores, and what it counts as new."""

import math
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import long_generation  # noqa: E402


def test_summary():
    likely, unlikely = (math.log(0.5), True), (math.log(0.25), False)
    row = long_generation.summary([[likely] * 4 + [unlikely] * 4, [likely] * 8])
    first, second = math.log(2), math.log(4)
    assert row["nats"] == pytest.approx((first + second) / 4 + first / 2)
    assert row["nats_by_quarter"] == pytest.approx([first, first, (first + second) / 2, (first + second) / 2])
    assert row["likeliest"] == 0.75 and row["likeliest_by_quarter"] == [1, 1, 0.5, 0.5]
    assert row["standard_error"] == pytest.approx((second - first) / 4)
    assert long_generation.summary([[likely] * 4])["standard_error"] is None


def test_what_is_new():
    assert long_generation.share_of_new(list(range(10))) == 1
    assert long_generation.share_of_new([1, 2, 3, 4] * 4) == pytest.approx(4 / 13)


def test_every_way_is_an_engine_of_one_cache():
    assert long_generation.WAYS["exact"] == {}
    assert {"quantspec", "quantspec_int4", "fp8", "quantspec, drafts"} <= long_generation.WAYS.keys()
