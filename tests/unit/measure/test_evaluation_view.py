"""Numbers as people read them."""

import pytest

from d2qconv.measure.statistics import Estimate
from d2qconv.views.evaluation import plus_minus


@pytest.mark.parametrize(
    ("value", "error", "unit", "text"),
    [
        (0.22432, 0.00534, 1, "0.2243 ± 0.0053"),
        (12.3456, 1.06, 1, "12.35 ± 1.06"),
        (0.91274, 0.0088, 100, "91.27 ± 0.88"),
        (-0.0070123, 0.0017, 100, "-0.7012 ± 0.1700"),
        (1234.5, 20.0, 1, "1234 ± 20"),
        (0.0, 0.0, 1, "0"),
        (0.0, 0.5, 1, "0.00 ± 0.50"),
        (float("inf"), float("inf"), 1, "inf"),
    ],
)
def test_digits(value, error, unit, text):
    assert plus_minus(Estimate(value, error), unit) == text
