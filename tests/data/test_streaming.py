"""Streaming: the batches, and so the run, are those of data on the device."""

import copy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalfl_jax import data
from adalfl_jax.data import streaming
from adalfl_jax.data.streaming import stream
from adalfl_jax.training import train
from adalfl_jax.types import Batch
from tests.training.tiny import final_state, tiny_config

SPLITS = (
    Batch(np.arange(120, dtype=np.uint8).reshape(30, 2, 2, 1), np.arange(30, dtype=np.int32)),
    Batch(200 + np.arange(40, dtype=np.uint8).reshape(10, 2, 2, 1), 100 + np.arange(10, dtype=np.int32)),
)
STEP_BYTES = (3 * 5 + 3 * 4) * (4 + 4)  # 3 seeds; 5 inner and 4 outer examples of 4 bytes, and their labels


def make_indices(num_steps, rng=0):
    rng = np.random.default_rng(rng)
    return rng.integers(0, 30, (num_steps, 3, 5)), rng.integers(0, 10, (num_steps, 3, 4))


@pytest.mark.parametrize(
    ("num_steps", "block_steps", "expected"),
    [(12, 5, [4, 4, 4]), (12, 100, [12]), (7, 3, [3, 3, 1]), (7, 5, [4, 3]), (3, 0, [1, 1, 1]), (1, 1, [1])],
)
def test_blocks_are_about_equally_long_and_hold_every_step_in_order(num_steps, block_steps, expected, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", block_steps * STEP_BYTES)
    indices, numbers = make_indices(num_steps), jnp.arange(num_steps)
    blocks = list(stream(SPLITS, indices, {"number": numbers}))
    assert [len(inner.inputs) for inner, _, _ in blocks] == expected
    assert [len(others["number"]) for _, _, others in blocks] == expected
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(blocks))
    inner, outer, others = jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)
    for batch, split, rows in zip((inner, outer), SPLITS, indices, strict=True):
        np.testing.assert_array_equal(batch.inputs, split.inputs[rows])
        np.testing.assert_array_equal(batch.targets, split.targets[rows])
        assert (batch.inputs.dtype, batch.targets.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(others["number"], numbers)


@pytest.mark.parametrize(("memory", "exceeds"), [(4000, False), (3999, True)])
def test_what_fills_more_than_a_quarter_of_the_device_stays_on_the_host(memory, exceeds, monkeypatch):
    monkeypatch.setattr(streaming, "_device_memory", lambda: memory)
    assert streaming.stays_on_host("auto", 1000) == exceeds


def test_the_memory_of_a_cpu_is_that_of_its_machine():
    assert 2**28 < streaming._device_memory() < 2**50


def test_the_memory_of_a_device_is_what_it_has_and_not_what_is_in_use(monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 2**20, "bytes_limit": 2**34})
    monkeypatch.setattr(streaming.jax, "local_devices", lambda: [device])
    assert streaming._device_memory() == 2**34


def test_auto_streams_what_would_fill_more_than_a_quarter(monkeypatch):
    num_bytes = 4 * 1797 * 64
    for memory, is_streamed in ((4 * num_bytes, False), (4 * num_bytes - 1, True)):
        monkeypatch.setattr(streaming, "_device_memory", lambda memory=memory: memory)
        for how, expected in (("auto", is_streamed), ("never", False), ("always", True)):
            assert data.load("digits", streaming=how).is_streamed == expected


def test_a_misspelt_way_of_streaming_is_refused():
    with pytest.raises(ValueError, match=r"unknown streaming 'alway'; did you mean 'always'"):
        data.load("digits", streaming="alway")


IMAGES = np.random.default_rng(0).integers(0, 256, (400, 6, 6, 3), np.uint8)


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.setattr(data.loading, "DATASETS", copy.copy(data.DATASETS))
    data.register_dataset("pictures", lambda: data.Examples(IMAGES, np.arange(400) % 3, num_classes=3))


@pytest.mark.slow
@pytest.mark.usefixtures("pictures", "without_figures")
def test_a_streamed_run_is_the_run_on_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 70_000)  # two blocks of five steps a chunk
    settings = {
        "dataset.name": "pictures",
        "augmentation.padding": 1,
        "augmentation.flip": True,
        "outer.split": "valid",
        "offline.num_inner_steps": 2,
        "batch_size": 20,
    }
    states, summaries = {}, {}
    for how in ("never", "always"):
        config = tiny_config(settings | {"dataset.streaming": how})
        summaries[how] = train(config, tmp_path / how)
        states[how] = final_state(config, tmp_path / how, "adalfl")
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6), *states.values())
    ours, theirs = (summary["methods"]["adalfl"] for summary in summaries.values())
    assert ours["test"] == theirs["test"]
    assert ours["valid"] == theirs["valid"]
    records = [(tmp_path / how / "metrics.jsonl").read_text().count("\n") for how in states]
    assert records[0] == records[1] > 0
