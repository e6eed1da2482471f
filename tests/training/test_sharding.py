"""Runs divided over a mesh of eight devices: the same results, no more messages than needed, checkpoints that move."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalfl_jax.hypergradient import ESTIMATORS
from adalfl_jax.learned_losses import LossNetwork
from adalfl_jax.models import count_params
from adalfl_jax.training import ConfigError, run, sharding, train
from adalfl_jax.training.batches import splits_of
from adalfl_jax.training.initial import init_training, make_seed_keys
from adalfl_jax.training.phases import make_training_program
from adalfl_jax.training.preemption import PreemptionError
from adalfl_jax.training.setup import make_setup
from adalfl_jax.training.sharding import replicate
from adalfl_jax.training.state import without_carry
from tests.training.same_run import read_json
from tests.training.test_resume import SignalAfter
from tests.training.tiny import final_state, tiny_config

SETTINGS = {"batch_size": 40, "offline.num_steps": 2}
MESHES = {"1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2), "2x4x1": (2, 4, 1)}
SMALL = {
    "estimator.window": 3,
    "estimator.num_pairs": 2,
    "estimator.num_iterations": 3,
    # Differences over a small sigma and solutions with an indefinite Hessian magnify rounding.
    "estimator.sigma": 1.0,
    "estimator.damping": 3.0,
}


def on_mesh(overrides, mesh="1x1x1"):
    sizes = map(int, mesh.split("x"))
    return tiny_config(SETTINGS | overrides, **dict(zip(("mesh.seed", "mesh.data", "mesh.model"), sizes, strict=True)))


def start(config):
    """The program of the online phase and what it is called with."""
    setup = make_setup(config)
    keys = make_seed_keys(config.seeds, setup.mesh)
    state = init_training(setup, "adalfl", keys)
    if state.rate_factor is not None:
        state = state._replace(rate_factor=replicate(setup.mesh, np.array([0.5, 2.0], np.float32)))
    return make_training_program(setup, "adalfl"), (state, keys, splits_of(setup), config.inner.learning_rate, 0)


def advance(config, num_steps=3):
    phase, arguments = start(config)
    state, metrics = phase.advance(*arguments, num_steps=num_steps)
    return without_carry(state), metrics


def assert_close(found, expected, relative=1e-5):
    """Compares trees, each leaf to the scale of its largest number."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=relative * max(np.abs(wanted).max(), 1e-3))


THEN_JOINT = {"outer.split": "valid", "outer.joint_share": 0.3, "num_steps": 3}  # in the last step the clean set joins
CASES = [
    ({"hypergradient": "forward", "on_nonfinite": "skip", "inner.first_step_rate": 0.3} | THEN_JOINT, "2x2x2"),
    *(pytest.param({"hypergradient": name} | SMALL, "1x8x1", marks=pytest.mark.slow) for name in ESTIMATORS),
    *(
        pytest.param(overrides, mesh, marks=pytest.mark.slow)
        for overrides in (
            {"hypergradient": "truncated"} | SMALL,
            {"hypergradient": "truncated", "dataset.streaming": "always"} | SMALL | THEN_JOINT,
            {"outer.pipelined": True},
            {"outer.pipelined": True, "hypergradient": "finite_difference"},
            {"outer.every": 2, "dataset.streaming": "always"},
            {"outer.inner_fraction": 0.5, "outer.outer_fraction": 0.25},
            {"learned_loss.family": "weight_network"},
            {"model.name": "wide_resnet", "model.depth": 16, "augmentation.padding": 1, "batch_size": 16},
        )
        for mesh in ("1x8x1", "2x2x2")
    ),
]


@pytest.mark.parametrize(
    ("overrides", "mesh"), CASES, ids=lambda case: "-".join(map(str, case.values())) if isinstance(case, dict) else case
)
def test_a_run_on_eight_devices_is_that_on_one(overrides, mesh, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_DIVIDED", 64)
    found = advance(on_mesh(overrides, mesh))
    assert_close(found, advance(on_mesh(overrides)), 1e-3 if "difference" in str(overrides) else 1e-5)
    kernel = found[0].theta.params["output"]["kernel"] if "model.name" not in overrides else None
    if kernel is not None and mesh == "2x2x2":
        assert kernel.sharding.shard_shape(kernel.shape) == (1, 8, 5)  # [S, 8, 10], seeds and outputs divided


def reduced_bytes(text):
    """Bytes of the results of all collectives of a compiled program, by kind; what is in a loop counts once."""
    sizes = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}
    found = {}
    for result, kind in re.findall(
        r"= (\S+|\(.*?\)) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text
    ):
        arrays = re.findall(r"([a-z]\w+)\[([\d,]*)\]", result)
        count = sum(sizes[kind_] * math.prod(map(int, filter(None, shape.split(",")))) for kind_, shape in arrays)
        found[kind] = found.get(kind, 0) + count
    return found


@pytest.mark.parametrize(
    "name", ["forward", *(pytest.param(n, marks=pytest.mark.slow) for n in ("unrolled", "recompute"))]
)
def test_a_step_adds_up_two_gradients_of_theta_and_one_of_phi_over_devices_and_no_more(name):
    config = on_mesh({"num_seeds": 1, "hypergradient": name}, "1x8x1")
    phase, arguments = start(config)
    found = reduced_bytes(phase.advance.lower(*arguments, num_steps=3).compile().as_text())
    state = arguments[0]
    expected = 4 * (2 * count_params(state.theta.params) + count_params(state.phi.params))
    assert set(found) == {"all-reduce"}
    assert expected <= found["all-reduce"] <= expected + 4 * 4  # and the losses


WINDOW = {"method": "adalfl", "hypergradient": "truncated", "estimator.window": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "meshes"),
    [
        ({"method": "task_loss", "inner.momentum": 0.9}, ("2x2x2", "1x8x1")),
        pytest.param(WINDOW | {"num_steps": 12}, ("1x1x1", "2x4x1", "2x2x2", "1x1x1"), marks=pytest.mark.slow),
    ],
    ids=["task_loss", "adalfl"],
)
def test_a_run_goes_on_under_another_mesh(overrides, meshes, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_DIVIDED", 64)
    overrides = {"num_steps": 8, "eval_every": 2} | overrides
    alone, (*first, last) = on_mesh(overrides), [on_mesh(overrides, mesh) for mesh in meshes]
    train(alone, tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        for config in first:
            patch.setattr(run, "Preemption", SignalAfter(2))
            with pytest.raises(PreemptionError):
                train(config, tmp_path / "moved")
    train(last, tmp_path / "moved")
    states = [
        final_state(config, tmp_path / run, alone.method) for config, run in ((last, "moved"), (alone, "unbroken"))
    ]
    assert_close(*states)
    assert read_json(tmp_path / "moved" / "config.json")["mesh"] == last.to_dict()["mesh"]


class SumNetwork(LossNetwork):
    """No mean over examples, as a subclass need not be."""

    def apply(self, phi_params, targets, outputs):
        return len(targets) * super().apply(phi_params, targets, outputs)


@pytest.mark.parametrize("family", [LossNetwork, SumNetwork])
def test_a_learned_loss_is_the_same_on_parts_whether_it_is_a_mean_or_not(family):
    loss, mesh = family(hidden_sizes=(4,)), sharding.make_mesh(tiny_config({"mesh.data": 2}))
    phi_params = loss.init(jax.random.key(0))
    targets, outputs = jnp.arange(8) % 3, jax.random.normal(jax.random.key(1), (8, 3))
    whole = loss.apply(phi_params, targets, outputs)
    on_parts = jax.jit(sharding.on_parts(mesh, loss))(phi_params, targets, outputs)
    np.testing.assert_allclose(on_parts, whole, rtol=1e-5)


def test_one_device_is_no_mesh():
    assert make_setup(on_mesh({})).mesh is None


def test_an_axis_of_size_0_takes_the_devices_that_are_left():
    mesh = make_setup(on_mesh({}, "2x0x1")).mesh
    assert dict(mesh.shape) == {"seed": 2, "data": 4, "model": 1}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("3x1x1", r"config\.mesh\.seed must divide config\.num_seeds = 2; got 3"),
        ("1x3x1", r"config\.mesh\.data must divide config\.batch_size = 40; got 3"),
        ("2x4x2", r"config\.mesh \(seed 2 x data 4 x model 2\) takes 16 devices, and JAX has 8 \(processes: 1\)"),
        ("0x3x1", r"config\.mesh has axes of 3 devices beside the one that takes what is left.* the 8 there are"),
        ("0x0x1", r"config\.mesh must be sizes of which at most one is 0.*; got \(0, 0, 1\)"),
        ("-1x1x1", r"config\.mesh\.seed must be a whole number of at least 0; got -1"),
    ],
)
def test_meshes_that_do_not_fit_are_refused_by_name(mesh, message):
    with pytest.raises(ConfigError, match=message):
        make_setup(on_mesh({}, mesh))
