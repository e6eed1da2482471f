"""Runs in several processes that meet over the network of one machine."""

import functools
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalfl_jax.training import BusyError, ConfigError, WorkdirError, hosts, train
from adalfl_jax.training.hosts import connect
from adalfl_jax.training.sections import HostsConfig
from tests.training.same_run import assert_same_run
from tests.training.tiny import ROOT, final_state, tiny_config

SETTINGS = {
    "batch_size": 40,
    "num_steps": 4,
    "eval_every": 2,
    "offline.num_steps": 2,
    "num_seeds": 2,
    "model.name": "logistic",
    "learned_loss.hidden_sizes": (8,),
    "inner.learning_rate": 0.1,
    "mesh.seed": 2,
    "mesh.data": 2,
}


@functools.cache  # a run's learned loss says where its processes met
def address():
    """A port that is free when the first run begins."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(workdir, overrides, num_processes=2, of_last=(), **environment):
    """The processes of a run, of two devices each; the last of them may have flags of its own."""
    hosts = {"connect": address(), "num_processes": num_processes, "timeout_seconds": 10}
    settings = SETTINGS | {f"hosts.{name}": value for name, value in hosts.items()} | overrides
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    program = [sys.executable, "-m", "experiments.train", "--config=configs/digits_mlp.py", f"--workdir={workdir}"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "COLUMNS": "120",
        **environment,
    }
    return [
        subprocess.Popen(  # noqa: S603, the command is ours
            [*program, *flags, f"--config.hosts.process_id={process}", *own],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process, own in enumerate([()] * (num_processes - 1) + [of_last])
    ]


def wait_for(process, line):
    """Reads what a process says until a line is in it."""
    for printed in process.stderr:
        if line in printed:
            return
    raise AssertionError(f"the process ended without saying {line!r}")


def end(processes):
    """How processes ended, and what they said."""
    said = [process.communicate()[1] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.usefixtures("without_figures")
def test_two_processes_of_two_devices_make_the_run_of_one_process_of_four(tmp_path):
    overrides = {"method": "task_loss", "dataset.streaming": "always", "hosts.timeout_seconds": 100}
    codes, said = end(start(tmp_path / "two", overrides))
    assert codes == [0, 0], said
    assert "process 1 of 2: where one is silent for 100 seconds the others end" in said[1]
    assert "4/4" in said[0]
    assert "4/4" not in said[1]  # only one of them speaks
    config = tiny_config(SETTINGS | overrides)
    train(config, tmp_path / "one")
    states = [jax.tree.leaves(final_state(config, tmp_path / run, config.method)) for run in ("two", "one")]
    for left, right in zip(*states, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("two", "one")]
    for left, right in zip(*(map(json.loads, each) for each in lines), strict=True):
        assert left.pop("method") == right.pop("method")
        assert left.pop("phase") == right.pop("phase")
        assert left == pytest.approx(right, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The inplace keyword")  # tbparse's, of pandas
def test_a_run_goes_on_after_a_signal_to_one_process_and_after_the_loss_of_one(tmp_path):
    overrides = {"method": "adalfl", "num_steps": 100, "offline.num_steps": 100, "checkpoint.every_steps": 4}
    processes = start(tmp_path / "two", overrides)
    wait_for(processes[0], "offline phase (ML3)  8/100")
    processes[1].send_signal(signal.SIGTERM)
    codes, said = end(processes)
    assert codes == [128 + signal.SIGTERM] * 2, said
    assert all(", offline phase (ML3), saved; the same command" in each for each in said)
    for lost, left in ((1, 0), (0, 1)):
        processes = start(tmp_path / "two", overrides)
        wait_for(processes[0], "AdaLFL  8/100" if lost == 1 else "AdaLFL goes on from step")
        processes[lost].kill()
        killed = time.monotonic()
        codes, said = end(processes)
        assert time.monotonic() - killed < 60
        assert codes[lost] == -signal.SIGKILL
        assert codes[left] not in (0, -signal.SIGKILL)
        assert "This most likely indicates that another task died" in said[left]
    codes, said = end(start(tmp_path / "two", overrides))
    assert codes == [0, 0], said
    assert re.search(r"AdaLFL goes on from step \d+ of 100", said[0])
    codes, said = end(start(tmp_path / "unbroken", overrides))
    assert codes == [0, 0], said
    assert_same_run(tmp_path / "two", tmp_path / "unbroken")


@pytest.mark.slow
def test_a_folder_that_cannot_be_used_ends_all_processes_with_the_same_line(tmp_path):
    (tmp_path / "other").write_text("not a run")
    codes, said = end(start(tmp_path, {}))
    assert codes == [1, 1], said
    assert all("WorkdirError" in each and "is not empty and holds no config.json" in each for each in said), said


@pytest.mark.slow
def test_processes_of_different_configs_end_with_what_differs(tmp_path):
    codes, said = end(start(tmp_path / "run", {}, of_last=["--config.num_steps=6"]))
    assert codes == [1, 1], said
    assert "ConfigError: process 1 was started with another config" in said[0]
    assert "num_steps: 4 -> 6" in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"connect": "somewhere"}, r"hosts\.connect must be \"\", \"auto\" or \"ADDRESS:PORT\"; got 'somewhere'"),
        (
            {"num_processes": 2, "process_id": 2},
            r"hosts\.process_id must be a number from 0, below hosts\.num_processes",
        ),
        ({"num_processes": 2}, r"hosts\.connect must be \"ADDRESS:PORT\" with hosts\.num_processes or .*; got ''"),
        ({"connect": "auto", "process_id": 1}, r"hosts\.connect must be \"ADDRESS:PORT\" with .*; got 'auto'"),
        ({"timeout_seconds": 0}, r"hosts\.timeout_seconds must be a whole number of at least 1; got 0"),
    ],
)
def test_hosts_that_cannot_be_are_refused_by_name(overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config({f"hosts.{name}": value for name, value in overrides.items()})


def test_a_process_that_has_computed_already_cannot_be_connected():
    jax.devices()
    with pytest.raises(ConfigError, match=r"config\.hosts: the processes cannot be connected"):
        connect(HostsConfig("127.0.0.1:1", 2, 0, 10))


@pytest.mark.slow
def test_a_signal_before_a_run_listens_ends_the_process():
    program = (
        "import signal; from adalfl_jax.training.hosts import connect, HostsConfig; "
        f"connect(HostsConfig('{address()}', 1, 0, 10)); signal.raise_signal(signal.SIGTERM)"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=False)  # noqa: S603, it is ours
    assert done.returncode == -signal.SIGTERM


def test_no_cluster_makes_a_process_of_its_own_and_half_a_cluster_is_refused(monkeypatch):
    def initialize(**options):
        raise ValueError(said)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    said = "coordinator_address should be defined."
    connect(HostsConfig("auto", 0, -1, 10))
    said = "Number of processes must be defined."
    with pytest.raises(ConfigError, match="cannot be connected: Number of processes must be defined"):
        connect(HostsConfig("auto", 0, -1, 10))
    with pytest.raises(ConfigError, match=r"must be defined\. Set hosts\.num_processes and hosts\.process_id"):
        connect(HostsConfig("127.0.0.1:8499", 0, -1, 10))


def test_the_timeout_is_that_of_silence_and_not_of_processes_that_are_yet_to_come(monkeypatch, capsys):
    given, bind = {}, inspect.signature(jax.distributed.initialize).bind
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: given.update(bind(**options).arguments))
    connect(HostsConfig("127.0.0.1:8499", 2, 1, 10))
    assert given["heartbeat_timeout_seconds"] == given["shutdown_timeout_seconds"] == 10
    assert given["initialization_timeout"] >= 60
    assert (given["coordinator_address"], given["num_processes"], given["process_id"]) == ("127.0.0.1:8499", 2, 1)
    assert "where one is silent for 10 seconds the others end" in capsys.readouterr().err


def test_arrays_go_to_the_other_processes_in_pieces(monkeypatch):
    pieces = []
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "_broadcast", lambda content: pieces.append(content) or content)
    monkeypatch.setattr(hosts, "PIECE_BYTES", 8)
    arrays = [np.arange(5, dtype="float32"), np.zeros((2, 0), "int32"), np.asarray(jnp.ones((), jnp.bfloat16))]
    specs = [{"shape": list(array.shape), "dtype": str(array.dtype)} for array in arrays]
    found = hosts.arrays_of_first(arrays, specs)
    assert [len(piece) for piece in pieces] == [8, 8, 4, 2]
    for left, right in zip(found, arrays, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("kind", [BusyError, WorkdirError])
def test_an_error_of_the_first_process_is_one_of_its_kind_in_all(kind, monkeypatch):
    def fail():
        raise kind("no place")

    told = []
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "_broadcast", lambda content: told.append(content) or content)
    with pytest.raises(WorkdirError, match="no place") as caught:
        hosts.on_first(fail)
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    monkeypatch.setattr(hosts, "_broadcast", lambda content: told[0])
    with pytest.raises(WorkdirError, match="no place") as told_to_others:
        hosts.on_first(fail)
    assert caught.type is told_to_others.type is kind


def test_of_several_processes_the_first_alone_warns(monkeypatch, recwarn):
    for is_first in (False, True):
        monkeypatch.setattr(hosts, "is_first", lambda is_first=is_first: is_first)
        hosts.warn(f"first: {is_first}")
    assert [str(warning.message) for warning in recwarn.list] == ["first: True"]


def test_what_differs_between_processes_is_refused_by_name(monkeypatch):
    def gather(value):  # from this process and one that was started with `theirs`
        content = np.frombuffer(json.dumps(theirs).encode(), np.uint8)
        other = np.pad(content, (0, value.size - len(content))) if value.ndim else np.int32(len(content))
        return np.stack([value, other])

    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
    ours = theirs = {"num_steps": 4, "mesh": {"seed": 2}, "data": "a1"}
    hosts.require_same(ours)
    theirs = {"num_steps": 4, "mesh": {"seed": 1}, "data": "a10"}
    with pytest.raises(ConfigError, match=r"process 1 was started .*\n  data: 'a1' -> 'a10'\n  mesh\.seed: 2 -> 1$"):
        hosts.require_same(ours)
