"""What results are known by, and the offline phases that runs share by it."""

import dataclasses
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

import adalfl_jax
from adalfl_jax import save_learned_loss
from adalfl_jax.training import ConfigError, PreemptionError, run, train
from adalfl_jax.training.batches import splits_of
from adalfl_jax.training.digest import digest_of, digest_of_offline_phase
from adalfl_jax.training.files import BusyError, lock_folder
from adalfl_jax.training.initial import init_phi, make_seed_keys
from adalfl_jax.training.phases import Program, make_offline_program
from adalfl_jax.training.setup import make_setup
from adalfl_jax.training.state import RunState
from tests.training.same_run import assert_same_run
from tests.training.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("without_figures", "shared_programs")

BRIEF = {"model.name": "logistic", "num_steps": 4, "eval_every": 2, "offline.num_steps": 4}
OF_THE_REST = {
    "method": "ml3",
    "methods": ("ml3",),
    "metric": "top_5_error_rate",
    "num_steps": 40,
    "outer.learning_rate": 1e-2,
    "outer.schedule": "linear",
    "inner.first_step_rate": 0.3,
    "outer.every": 2,
    "outer.inner_fraction": 0.5,
    "outer.outer_fraction": 0.5,
    "outer.joint_share": 0.5,
    "baseline.loss": "symmetric_cross_entropy",
    "baseline.fine_tuning": 0.5,
    "tuning.learning_rates": (0.1,),
    "checkpoint.every_steps": 5,
}  # what the offline phase knows nothing of


def test_a_changed_setting_has_another_digest():
    config = tiny_config()
    others = (config, dataclasses.replace(config, seed=1), dataclasses.replace(config, batch_size=49))
    assert len({digest_of(other) for other in others}) == 3
    assert len({digest_of_offline_phase(other) for other in others}) == 3
    assert digest_of(tiny_config()) == digest_of(config)


def test_another_release_has_other_digests(monkeypatch):
    digests = [(digest_of(tiny_config()), digest_of_offline_phase(tiny_config()))]
    monkeypatch.setattr(adalfl_jax, "__version__", "0")
    digests.append((digest_of(tiny_config()), digest_of_offline_phase(tiny_config())))
    assert all(before != after for before, after in zip(*digests, strict=True))


def test_how_often_a_run_is_kept_is_in_no_digest():
    assert digest_of(tiny_config({"checkpoint.keep": 5})) == digest_of(tiny_config())


def test_a_digest_knows_what_phi_starts_from_and_not_where_it_lies(tmp_path):
    loss = tiny_config().learned_loss.network()
    for name, seed in (("here", 0), ("there", 0), ("other", 1)):
        save_learned_loss(tmp_path / name, loss, loss.init(jax.random.key(seed)))
    here, there, other = (
        tiny_config({"learned_loss.start": str(tmp_path / name)}) for name in ("here", "there", "other")
    )
    for digest in (digest_of, digest_of_offline_phase):
        assert digest(here) == digest(there)
        assert len({digest(here), digest(other), digest(tiny_config())}) == 3


def test_what_the_offline_phase_knows_nothing_of_leaves_it_as_it_is():
    def phi_after(config):
        setup, keys = make_setup(config), make_seed_keys(config.seeds)
        start, rate = RunState(None, init_phi(setup, keys)), config.inner.learning_rate
        return make_offline_program(setup).advance(start, keys, splits_of(setup), rate, 0, num_steps=2)[0].phi

    one, other = (tiny_config(BRIEF | {"outer.split": "valid", **rest}) for rest in ({}, OF_THE_REST))
    assert digest_of_offline_phase(one) == digest_of_offline_phase(other)
    jax.tree.map(np.testing.assert_array_equal, phi_after(one), phi_after(other))


@pytest.mark.parametrize(
    "change",
    [
        {"offline.num_inner_steps": 2},
        {"eval_every": 5},
        {"outer.split": "valid"},
        {"task_loss": "generalized_cross_entropy"},
        {"hypergradient": "unrolled"},
        {"inner.learning_rate": 0.2},
        {"offline.learning_rate": 1e-2},
        {"learned_loss.gamma": 0.1},
        {"model.hidden_sizes": (7,)},
        {"dataset.seed": 1},
    ],
)
def test_what_the_offline_phase_depends_on_is_in_its_digest(change):
    assert digest_of_offline_phase(tiny_config(change)) != digest_of_offline_phase(tiny_config())


def test_a_decaying_rate_depends_on_the_number_of_steps():
    linear = {"inner.schedule": "linear"}
    one, other = (digest_of_offline_phase(tiny_config(linear, num_steps=number)) for number in (20, 30))
    assert one != other


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # tbparse's, of pandas
def test_a_shared_offline_phase_is_trained_once_and_gives_the_same_runs(tmp_path, monkeypatch):
    shared, agreed = tmp_path / "offline", []
    monkeypatch.setattr(run, "require_same", agreed.append)
    adalfl = tiny_config(BRIEF, method="adalfl")
    train(adalfl, tmp_path / "alone")
    ml3 = train(tiny_config(BRIEF, method="ml3"), tmp_path / "ml3", offline_dir=shared)

    def never(*args, **kwargs):
        raise AssertionError("the offline phase is trained again")

    monkeypatch.setattr(run, "make_offline_program", lambda setup: Program(never, never))
    waits = threading.Event()
    monkeypatch.setattr(run, "tell", lambda text: waits.set() if "another process works on" in text else None)
    with ThreadPoolExecutor() as pool:
        with lock_folder(shared / digest_of_offline_phase(adalfl)):
            training = pool.submit(train, adalfl, tmp_path / "adalfl", offline_dir=shared)
            assert waits.wait(timeout=60)
            assert not training.done()
        summary = training.result()
    assert [path.name for path in shared.iterdir()] == [digest_of_offline_phase(adalfl)]
    assert [settings["offline_dir"] for settings in agreed] == [False, True, True]  # which processes must agree on
    assert_same_run(tmp_path / "adalfl", tmp_path / "alone")
    assert summary["methods"]["adalfl"]["seconds"]["offline"] == ml3["methods"]["ml3"]["seconds"]["offline"]


def test_a_signal_ends_the_wait_for_an_offline_phase(tmp_path, monkeypatch):
    config = tiny_config(BRIEF, method="ml3")
    shared = tmp_path / "offline" / digest_of_offline_phase(config)
    with lock_folder(shared), monkeypatch.context() as waiting:
        waiting.setattr(run, "tell", lambda text: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(PreemptionError, match=r"SIGTERM: the run was waiting for .*to go on"):
            train(config, tmp_path / "run", offline_dir=tmp_path / "offline")
    assert train(config, tmp_path / "run", offline_dir=tmp_path / "offline")["methods"].keys() == {"ml3"}


def test_a_signal_to_another_process_of_the_run_ends_the_wait_too(tmp_path, monkeypatch):
    config = tiny_config(BRIEF, method="ml3")
    monkeypatch.setattr(run, "agreed_signal", lambda own: signal.SIGTERM if own is None else own)
    with (
        lock_folder(tmp_path / "offline" / digest_of_offline_phase(config)),
        pytest.raises(PreemptionError, match=r"SIGTERM: the run was waiting for .*to go on"),
    ):
        train(config, tmp_path / "run", offline_dir=tmp_path / "offline")


def test_an_offline_phase_that_another_run_trains_need_not_be_waited_for(tmp_path):
    config = tiny_config(BRIEF, method="ml3")
    shared = tmp_path / "offline" / digest_of_offline_phase(config)
    with lock_folder(shared), pytest.raises(BusyError, match=r"another run trains the offline phase .*; this one can"):
        train(config, tmp_path / "run", offline_dir=tmp_path / "offline", wait=False)
    assert not any((tmp_path / "run").iterdir())  # nothing was begun
    summary = train(config, tmp_path / "run", offline_dir=tmp_path / "offline", wait=False)
    assert summary["methods"].keys() == {"ml3"}


def test_nor_is_one_that_another_run_begins_to_train_a_moment_later(tmp_path, monkeypatch):
    config = tiny_config(BRIEF, method="ml3")
    shared = tmp_path / "offline" / digest_of_offline_phase(config)
    monkeypatch.setattr(run, "is_locked", lambda folder: False)  # when this run looked
    with lock_folder(shared), pytest.raises(BusyError, match=r"another process works on .*; let it end"):
        train(config, tmp_path / "run", offline_dir=tmp_path / "offline", wait=False)
    assert train(config, tmp_path / "run", offline_dir=tmp_path / "offline")["methods"].keys() == {"ml3"}


def test_an_offline_phase_that_is_not_kept_cannot_be_shared(tmp_path):
    config = tiny_config({"checkpoint.keep": 0}, method="ml3")
    with pytest.raises(ConfigError, match=r"checkpoint\.keep must be at least 1 to share an offline phase; got 0"):
        train(config, tmp_path / "run", offline_dir=tmp_path / "offline")
    assert not list(tmp_path.iterdir())
