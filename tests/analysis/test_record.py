import numpy as np

from adalfl_jax.analysis.record import RunRecord


def test_series_is_ordered_by_seed_and_step():
    rows = [
        {"method": "adalfl", "seed": seed, "step": step, "test/error_rate": 100 * seed + step}
        for seed, step in [(7, 10), (2, 20), (7, 0), (2, 10), (2, 0), (7, 20)]
    ]
    rows += [{"method": "ml3", "seed": 2, "step": 0, "test/error_rate": -1}, {"method": "adalfl", "seed": 2, "step": 5}]
    series = RunRecord({}, {}, rows, {}).series("adalfl", "test/error_rate")
    assert series is not None
    np.testing.assert_array_equal(series.steps, [0, 10, 20])
    np.testing.assert_array_equal(series.values, [[200, 210, 220], [700, 710, 720]])


def test_series_that_was_not_measured_is_none():
    record = RunRecord({}, {}, [{"method": "adalfl", "seed": 0, "step": 0, "loss": 1.0}], {})
    assert record.series("adalfl", "error") is None
    assert record.series("ml3", "loss") is None
