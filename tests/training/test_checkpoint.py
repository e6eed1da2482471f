import contextlib
import copy
import multiprocessing
import resource
import shutil
import signal
import types
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalfl_jax.training import WorkdirError, checkpoint
from adalfl_jax.training.checkpoint import StageCheckpoints, load_state, read_loss_shapes
from adalfl_jax.training.preemption import PreemptionError
from adalfl_jax.training.results import History
from adalfl_jax.training.sections import CheckpointConfig
from adalfl_jax.training.state import RunState
from adalfl_jax.types import Phi, Theta
from tests.training.tiny import snapshot

ALWAYS = CheckpointConfig(every_seconds=0.0, every_steps=1, keep=2)


@pytest.fixture(scope="module")
def elsewhere():
    """Runs a function in another process: threads of Orbax that gave up complain later, whatever test is then on."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def make_history(step, seed=0):
    """A history with arrays of all sorts: random keys, bytes, flags, a bfloat16, nothing at all."""
    keys = jax.random.split(jax.random.key(seed), 6)
    params = {"kernel": jax.random.normal(keys[0], (2, 30, 4)), "half": jnp.ones((2, 3), jnp.bfloat16) / 3}
    theta = Theta(params, {"count": jnp.arange(2)}, (jax.random.normal(keys[1], (2, 30)), ()))
    carry = (
        jax.random.split(keys[2], (2, 3)),
        jnp.array([True, False]),
        jnp.zeros((2, 0)),
        jnp.arange(4, dtype="uint8"),
    )
    phi = Phi((jax.random.normal(keys[3], (2, 5)),), (jnp.int32(7),), carry)
    observed = [
        (0, {"a": np.float32([0.1, 1 / 3])}),
        (step, {"b": np.float32([1e-30, 2]), "a": np.float32([3e30, -0.0])}),
    ]
    shapes = [np.asarray(jax.random.normal(key, (2, 2, 3))) for key in keys[4:]]
    return History(RunState(theta, phi), step, observed, [0, step], shapes, seconds=12.5, num_back_offs=2)


def assert_same_history(left, right):
    assert jax.tree.structure(left.state) == jax.tree.structure(right.state)
    for ours, theirs in zip(jax.tree.leaves(left.state), jax.tree.leaves(right.state), strict=True):
        assert ours.dtype == theirs.dtype
        assert bool((ours == theirs).all())
    for field in ("step", "seconds", "shape_steps", "num_back_offs"):
        assert getattr(left, field) == getattr(right, field)
    np.testing.assert_array_equal(left.shapes, right.shapes)
    assert [(step, list(scalars)) for step, scalars in left.observed] == [
        (step, list(scalars)) for step, scalars in right.observed
    ]
    jax.tree.map(np.testing.assert_array_equal, left.observed, right.observed)


def save_all(folder, *histories, settings=ALWAYS):
    with StageCheckpoints(folder, settings) as kept:
        for history in histories:
            kept.save(history)


def restored(folder, settings=ALWAYS):
    with StageCheckpoints(folder, settings) as kept:
        return kept.restore(make_history(0, seed=9).state)


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def test_a_history_comes_back_as_it_was(tmp_path):
    save_all(tmp_path / "stage", make_history(5))
    assert_same_history(restored(tmp_path / "stage"), make_history(5))


def test_a_history_that_goes_on_while_it_is_written_comes_back_as_it_was(tmp_path):
    history = make_history(5)
    record, arrays = checkpoint._pack(history)
    before = copy.deepcopy((record, arrays))
    history.shape_steps.append(6)
    history.shapes.append(history.shapes[0])
    history.observed.append((6, history.scalars))
    assert record == before[0]
    jax.tree.map(np.testing.assert_array_equal, arrays, before[1])


@pytest.mark.parametrize("field", ["step", "num_back_offs", "observed", "shape_steps"])
def test_a_checksum_is_of_the_record_too(field):
    record, arrays = checkpoint._pack(make_history(5))
    changed = {**record, field: record[field] + ([7] if isinstance(record[field], list) else 1)}
    assert checkpoint._checksum(changed, arrays) != checkpoint._checksum(record, arrays)


def test_a_history_without_phi_and_shapes_comes_back_as_it_was(tmp_path):
    history = History(RunState(make_history(5).state.theta, None), 5)
    save_all(tmp_path / "stage", history)
    with StageCheckpoints(tmp_path / "stage", ALWAYS) as kept:
        assert_same_history(kept.restore(history.state), history)


def test_where_nothing_was_kept_nothing_comes_back(tmp_path):
    assert restored(tmp_path / "stage") is None


def test_the_newest_ones_stay(tmp_path):
    save_all(tmp_path / "stage", *(make_history(step) for step in (1, 2, 3, 4)))
    assert steps_in(tmp_path / "stage") == [3, 4]
    assert restored(tmp_path / "stage").step == 4


def test_with_none_to_keep_none_is_written_and_those_there_are_read(tmp_path):
    none = CheckpointConfig(every_seconds=0.0, every_steps=0, keep=0)
    save_all(tmp_path / "stage", make_history(1), settings=none)
    assert not (tmp_path / "stage").exists()
    save_all(tmp_path / "stage", make_history(1))
    save_all(tmp_path / "stage", make_history(2), settings=none)
    assert restored(tmp_path / "stage", none).step == 1


@pytest.mark.parametrize(
    ("every_steps", "every_seconds", "expected"),
    [
        (0, 0.0, []),
        (4, 0.0, [4, 8, 12]),
        (3, 0.0, [4, 8, 12]),
        (0, 30.0, [6, 12]),
        (4, 30.0, [4, 8, 12]),
        (10, 20.0, [4, 8, 12]),
    ],
)
def test_checkpoints_come_at_intervals_in_steps_and_in_seconds(
    every_steps, every_seconds, expected, tmp_path, monkeypatch
):
    now = [100.0]
    monkeypatch.setattr(checkpoint, "time", types.SimpleNamespace(monotonic=lambda: now[0]))  # Orbax has the real one
    with StageCheckpoints(tmp_path / "stage", CheckpointConfig(every_seconds, every_steps, keep=9)) as kept:
        for step in range(2, 14, 2):  # a chunk of two steps takes ten seconds
            now[0] += 10
            kept.save_when_due(make_history(step))
    assert steps_in(tmp_path / "stage") == expected


def files_of(checkpoint_folder):
    return sorted(str(path.relative_to(checkpoint_folder)) for path in checkpoint_folder.rglob("*") if path.is_file())


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "stage"
    save_all(folder, make_history(5, seed=5), make_history(10, seed=10))
    return folder


@contextlib.contextmanager
def told_of_checkpoints():
    """Records warnings of checkpoints alone: threads that gave up on one before may complain meanwhile."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message="checkpoint ")
        yield told


def damage_each_file(damage, two_checkpoints, tmp_path):
    times_told = 0
    for index, name in enumerate(files_of(two_checkpoints / "10")):
        folder = tmp_path / str(index) / "stage"
        shutil.copytree(two_checkpoints, folder)
        damage(folder / "10" / name)
        with told_of_checkpoints() as told:
            history = restored(folder)
        times_told += len(told)
        assert all(f"checkpoint {folder / '10'} is damaged" in str(warning.message) for warning in told)
        step = 5 if told else 10
        assert_same_history(history, make_history(step, seed=step))
    assert times_told > 1


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "flipped", "gone"])
def test_damage_to_any_file_is_harmless_or_told_and_the_checkpoint_before_is_used(
    damage, two_checkpoints, tmp_path, elsewhere
):
    elsewhere(damage_each_file, damage, two_checkpoints, tmp_path)


def damage_all(folder):
    for step in (5, 10):
        for name in files_of(folder / str(step)):
            truncate(folder / str(step) / name)
    with told_of_checkpoints() as told:
        assert restored(folder) is None
    for warning, step in zip(told, ("10", "5"), strict=True):
        assert f"checkpoint {folder / step} is damaged" in str(warning.message)


def test_damaged_checkpoints_are_set_aside_and_the_stage_starts_over(two_checkpoints, tmp_path, elsewhere):
    folder = tmp_path / "stage"
    shutil.copytree(two_checkpoints, folder)
    elsewhere(damage_all, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage", "stage_damaged_10", "stage_damaged_5"]
    save_all(folder, make_history(10))
    assert restored(folder).step == 10


def test_a_state_that_is_not_there_or_of_another_config_is_told(tmp_path):
    state = make_history(5).state._replace(phi=None)
    with pytest.raises(WorkdirError, match=r"nosuch cannot be read as a trained state"):
        load_state(tmp_path / "nosuch", state)
    plain = RunState(Theta({"kernel": jnp.ones((2, 3))}, {}, ()), None)
    checkpoint.save_state(tmp_path / "state", plain)
    jax.tree.map(np.testing.assert_array_equal, load_state(tmp_path / "state", plain), plain)
    with pytest.raises(WorkdirError, match=r"state cannot be read as a trained state"):
        load_state(tmp_path / "state", RunState(Theta({"other": jnp.ones((2, 3))}, {}, ()), None))


def test_parts_of_a_state_are_read_alone_and_checked(tmp_path):
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    state = RunState(Theta({"kernel": jnp.asarray(kernel), "bias": jnp.zeros(2)}, {"mean": jnp.ones(3)}, ()), None)
    checkpoint.save_state(tmp_path / "state", state)
    part = load_state(tmp_path / "state", {"theta": {"params": {"kernel": kernel}}})
    assert jax.tree.map(np.shape, part) == {"theta": {"params": {"kernel": (2, 3)}}}
    np.testing.assert_array_equal(part["theta"]["params"]["kernel"], kernel)
    for params, message in (
        ({"other": kernel}, r"it has no theta\.params\.other"),
        ({"kernel": kernel.T}, r"theta\.params\.kernel is \(2, 3\) float32, not \(3, 2\) float32"),
        ({"kernel": kernel.astype(int)}, r"theta\.params\.kernel is \(2, 3\) float32, not \(2, 3\) int64"),
    ):
        with pytest.raises(WorkdirError, match=message):
            load_state(tmp_path / "state", {"theta": {"params": params}})


def test_the_state_of_another_model_is_refused_and_left_alone(two_checkpoints):
    other = RunState(make_history(0).state.theta, None)
    with StageCheckpoints(two_checkpoints, ALWAYS) as kept, pytest.raises(WorkdirError, match="state of another model"):
        kept.restore(other)
    assert steps_in(two_checkpoints) == [5, 10]


def test_checkpoints_made_on_other_data_are_refused_and_left_alone(tmp_path):
    def restore_with(data):
        with StageCheckpoints(tmp_path / "stage", ALWAYS, data) as kept:
            return kept.restore(make_history(0).state)

    with StageCheckpoints(tmp_path / "stage", ALWAYS, "a1") as kept:
        kept.save(make_history(5))
    before = snapshot(tmp_path)
    with pytest.raises(WorkdirError, match=r"on other data than config\.dataset names now \(a1 -> b2\); bring"):
        restore_with("b2")
    assert snapshot(tmp_path) == before
    assert restore_with("a1").step == 5


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_damaged(two_checkpoints, monkeypatch):
    before = snapshot(two_checkpoints)
    access = checkpoint.os.access
    monkeypatch.setattr(  # as root finds no file that it may not read
        checkpoint.os, "access", lambda path, mode: "10" not in path.parts and access(path, mode)
    )
    with pytest.raises(WorkdirError, match=r"stage.10 may not be read by this user.* change its permissions"):
        restored(two_checkpoints)
    assert snapshot(two_checkpoints) == before


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(5, "Input/output error"), ValueError("UNKNOWN: Error reading d/1 [os_error_code='5']")],
    ids=["memory", "disk", "disk_of_tensorstore"],
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(error, two_checkpoints, monkeypatch):
    def read(manager, step):
        raise error

    before = snapshot(two_checkpoints)
    monkeypatch.setattr(checkpoint, "_read", read)
    with pytest.raises(WorkdirError, match=r"stage.10 cannot be read now \(.*\); the same command tries again"):
        restored(two_checkpoints)
    assert snapshot(two_checkpoints) == before


def test_loss_shapes_are_read_beside_the_run_that_writes_them(tmp_path, monkeypatch):
    folder = tmp_path / "stage"
    assert read_loss_shapes(folder) is None
    save_all(folder, History(make_history(4).state, 4))
    assert read_loss_shapes(folder) is None
    with StageCheckpoints(folder, ALWAYS) as kept:
        for step in (5, 10):  # the second one waits for the first, and is being written
            kept.save(make_history(step, seed=step))
        assert read_loss_shapes(folder)[0] in ([0, 5], [0, 10])
    steps, values = read_loss_shapes(folder)
    assert steps == [0, 10]
    np.testing.assert_array_equal(values.swapaxes(0, 1), make_history(10, seed=10).shapes)
    monkeypatch.chdir(tmp_path)
    assert read_loss_shapes(Path("stage"))[0] == [0, 10]
    flip(next(path for path in (folder / "10" / "record").rglob("*") if path.is_file() and path.stat().st_size > 100))
    before = snapshot(folder)
    assert read_loss_shapes(folder)[0] == [0, 5]
    assert snapshot(folder) == before


@contextlib.contextmanager
def small_files():
    """Lets no file grow beyond 100 bytes, which a writer meets as it does a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # Python ignores the signal that comes with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill_the_disk(folder):
    save_all(folder, make_history(5))
    with small_files(), pytest.raises(WorkdirError, match=r"could not be written .* make room"):
        save_all(folder, make_history(10))
    assert not (folder / "10").exists()
    assert_same_history(restored(folder), make_history(5))
    save_all(folder, make_history(15))  # once there is room again; threads may still be at 10
    assert_same_history(restored(folder), make_history(15))


def test_a_full_disk_leaves_the_checkpoint_before_and_a_clear_error(tmp_path, elsewhere):
    elsewhere(fill_the_disk, tmp_path / "stage")


def test_what_a_killed_save_left_is_removed_at_once(tmp_path):
    save_all(tmp_path / "stage", make_history(5))
    shutil.copytree(tmp_path / "stage" / "5", tmp_path / "stage" / "10.orbax-checkpoint-tmp")
    with StageCheckpoints(tmp_path / "stage", ALWAYS):
        assert steps_in(tmp_path / "stage") == [5]
    save_all(tmp_path / "stage", make_history(10))
    assert steps_in(tmp_path / "stage") == [5, 10]


def save_a_state_that_does_not_fit(folder):
    state = make_history(5).state._replace(phi=None)
    with small_files(), pytest.raises(WorkdirError, match=r"state could not be written to .*state \(.*\)\. Make room"):
        checkpoint.save_state(folder, state)
    assert not folder.exists()


def test_a_state_that_cannot_be_written_is_told(tmp_path, elsewhere):
    elsewhere(save_a_state_that_does_not_fit, tmp_path / "state")


@pytest.mark.parametrize(
    ("error", "is_waited_for"),
    [(None, True), (PreemptionError(signal.SIGTERM, "told to end"), True), (OSError("of its own"), False)],
    ids=["end", "signal", "own_error"],
)
def test_processes_wait_for_the_one_that_writes_but_where_one_ends_alone(error, is_waited_for, tmp_path, monkeypatch):
    met = []
    monkeypatch.setattr(checkpoint, "on_first", lambda function: met.append(function()))
    with contextlib.suppress(OSError, PreemptionError), StageCheckpoints(tmp_path / "stage", ALWAYS) as kept:
        kept.save(make_history(5))
        if error is not None:
            raise error
    assert len(met) == 1 + is_waited_for
    assert steps_in(tmp_path / "stage") == [5]
