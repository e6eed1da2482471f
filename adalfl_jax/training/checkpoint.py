"""What Orbax keeps of a run: its trained states and, while it goes on, how far each of its stages is."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from adalfl_jax.training.divergence import DivergenceError
from adalfl_jax.training.files import WorkdirError
from adalfl_jax.training.hosts import arrays_of_first, is_first, on_first
from adalfl_jax.training.preemption import PreemptionError
from adalfl_jax.training.results import History
from adalfl_jax.training.sections import CheckpointConfig
from adalfl_jax.training.sharding import place, to_host
from adalfl_jax.training.state import RunState
from adalfl_jax.training.workdir import require_same_data
from adalfl_jax.types import PyTree

# The process that writes needs no other for it.
_ALONE = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


def save_state(path: Path, state: RunState) -> None:
    """Writes the state of all seeds to the folder `path`, which must not exist; all processes must call it.

    Raises:
      WorkdirError: it could not be written.
    """
    state = to_host(state)

    def write() -> None:
        try:
            with ocp.StandardCheckpointer(multiprocessing_options=_ALONE) as checkpointer:
                checkpointer.save(path, state._asdict())
        except Exception as error:  # whatever Orbax and its libraries raise
            raise WorkdirError(
                f"a trained state could not be written to {path} ({_reason(error)}). Make room or mend the folder, and "
                "the same command goes on from the last checkpoint"
            ) from error

    on_first(write)


def load_state(path: str | os.PathLike[str], structure: PyTree) -> PyTree:
    """Reads what `save_state` wrote, or parts of it.

    Args:
      path: the folder.
      structure: a `RunState` of arrays, or of their shapes and types. A dictionary by the names of its fields may leave
        parts out, which are then not read: `{"phi": {"params": shapes}}` is without the optimiser of phi.

    Returns:
      The same structure, of NumPy's arrays.

    Raises:
      WorkdirError: the folder does not exist, is damaged, or holds other arrays than are expected.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), structure)
    try:
        options = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        args = ocp.args.PyTreeRestore(item=shapes, restore_args=options, partial_restore=True)  # pyright: ignore[reportCallIssue]
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_ALONE)
        with ocp.Checkpointer(handler, multiprocessing_options=_ALONE) as checkpointer:
            restored = checkpointer.restore(Path(path).resolve(), args)  # Orbax reads no relative path
        jax.tree_util.tree_map_with_path(_require_same_shape, shapes, restored)
    except Exception as error:  # whatever Orbax and its libraries raise
        raise WorkdirError(f"{path} cannot be read as a trained state ({_reason(error)})") from error
    return restored


def _require_same_shape(path: Any, expected: jax.ShapeDtypeStruct, found: Any) -> None:
    """Raises ValueError for an array of another shape, or that is missing, which Orbax passes over."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if not isinstance(found, np.ndarray):
        raise ValueError(f"it has no {name}")
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise ValueError(f"{name} is {found.shape} {found.dtype}, not {expected.shape} {expected.dtype}")


class StageCheckpoints:
    """The checkpoints of one stage of a run, a folder each, written while the stage goes on; a context manager.

    Orbax writes in threads of its own and moves a checkpoint to its place when it is whole, so a process may end at any
    moment. A checksum over everything tells what a disk or a power cut made of it later.
    """

    def __init__(self, folder: Path, settings: CheckpointConfig, data: str = ""):
        self._folder, self._settings, self._data = folder, settings, data  # `Dataset.content`
        self._manager: ocp.CheckpointManager | None = None
        if is_first() and (settings.keep or folder.exists()):
            folder.mkdir(parents=True, exist_ok=True)
            # Here and now: Orbax removes them in a thread, which may still be at it when the folder is opened again.
            for unfinished in ocp.utils.tmp_checkpoints(folder):
                shutil.rmtree(unfinished.get(), ignore_errors=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=settings.keep or None,
                create=False,
                lightweight_initialize=True,
                multiprocessing_options=_ALONE,
            )
            self._manager = ocp.CheckpointManager(folder, options=options)
        self._saved_step, self._saved_at = -1, time.monotonic()

    def restore(self, start: RunState) -> History | None:
        """How far the stage was, from the newest checkpoint that is whole, or None without one.

        Those that are not are set aside with a warning.

        Args:
          start: the state the stage starts from, for its structure.

        Raises:
          WorkdirError: one that cannot be read now, of another model or other data, or that cannot be set aside.
        """
        arrays: list[np.ndarray] = []

        def read() -> dict[str, Any] | None:
            record, found = self._newest()
            arrays.extend(found)
            return record

        if (record := on_first(read)) is None:
            return None
        require_same_data(self._folder, record["data"], self._data)
        self._saved_step = record["step"]
        return _unpack(record, arrays_of_first(arrays, record["arrays"]), start)

    def _newest(self) -> tuple[dict[str, Any] | None, list[np.ndarray]]:
        """The record and the arrays of the newest checkpoint that is whole."""
        if (manager := self._manager) is None:
            return None, []
        for step in sorted(manager.all_steps(), reverse=True):
            _require_readable(self._folder / str(step))
            try:
                return _read(manager, step)
            except Exception as error:  # whatever Orbax and its libraries raise on damaged files
                if _may_pass(error):
                    raise WorkdirError(
                        f"checkpoint {self._folder / str(step)} cannot be read now ({_reason(error)}); the same "
                        "command tries again. If it never can, remove that folder to go on from the one before"
                    ) from error
                self._set_aside(step, error)
        return None, []

    def save(self, history: History) -> None:
        """Begins to write how far the stage is, once the checkpoint before is written; all processes must call it.

        Raises:
          WorkdirError: this checkpoint or the one before could not be written; those before stay.
        """
        if not self._settings.keep or history.step == self._saved_step:
            return
        record, arrays = _pack(history)
        record["data"] = self._data
        self._saved_step, self._saved_at = history.step, time.monotonic()
        on_first(lambda: self._write(record, arrays))

    def _write(self, record: dict[str, Any], arrays: list[np.ndarray]) -> None:
        assert self._manager is not None
        items = {
            "record": ocp.args.JsonSave({"checksum": _checksum(record, arrays), "record": record}),  # pyright: ignore[reportCallIssue]
            "arrays": ocp.args.StandardSave([array for array in arrays if array.size]),  # pyright: ignore[reportCallIssue]
        }
        try:
            self._manager.save(record["step"], args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._failure(error) from error

    def save_when_due(self, history: History) -> None:
        """Saves where the interval of the config, in steps or in seconds, is over."""
        every_steps, every_seconds = self._settings.every_steps, self._settings.every_seconds
        steps, seconds = history.step - max(self._saved_step, 0), time.monotonic() - self._saved_at
        if on_first(lambda: (0 < every_steps <= steps) or (0 < every_seconds <= seconds)):
            self.save(history)

    def __enter__(self) -> StageCheckpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        """Waits for what is being written: all processes do, but where an error ends one of them alone.

        JAX ends all of them, the one that writes too, `hosts.timeout_seconds` after the first has gone.
        """
        if kind is None or issubclass(kind, DivergenceError | PreemptionError):
            on_first(self._close)
        else:
            self._close()

    def _close(self) -> None:
        if self._manager is not None:
            try:
                self._manager.close()
            except Exception as error:
                raise self._failure(error) from error

    def _set_aside(self, step: int, error: Exception) -> None:
        assert self._manager is not None
        damaged = self._folder / str(step)
        aside = self._folder.with_name(f"{self._folder.name}_damaged_{step}")
        reason = _reason(error)
        try:
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)
        except OSError as failure:
            raise WorkdirError(f"checkpoint {damaged} cannot be read ({reason}), nor set aside: {failure}") from error
        self._manager.reload()
        warnings.warn(
            f"checkpoint {damaged} is damaged ({reason}) and is now {aside}; the run goes on "
            "from the one before, or else this stage starts over",
            stacklevel=3,
        )

    def _failure(self, error: Exception) -> WorkdirError:
        return WorkdirError(
            f"a checkpoint could not be written to {self._folder} ({_reason(error)}). Those before it "
            "are whole: make room or mend the folder, and the same command goes on from there"
        )


def read_loss_shapes(folder: Path) -> tuple[list[int], np.ndarray] | None:
    """Steps `[T]` and loss shapes `[S, T, 2, P]` of a stage, from its newest checkpoint that can be read.

    Nothing in the folder changes, and a run may be writing to it. None where there are none.
    """
    if not folder.is_dir():
        return None
    # Of those there it reads the names alone: a run beside removes them.
    options = ocp.CheckpointManagerOptions(read_only=True, lightweight_initialize=True)
    manager = ocp.CheckpointManager(folder.resolve(), options=options)  # Orbax reads no relative path
    try:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                record, arrays = _read(manager, step)
            except Exception:  # noqa: S112, a damaged one, or one the run has just replaced
                continue
            return (record["shape_steps"], arrays[-1].swapaxes(0, 1)) if record["shape_steps"] else None
    finally:
        manager.close()
    return None


def _read(manager: ocp.CheckpointManager, step: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What `_pack` made, checked."""

    def item(**args: ocp.args.CheckpointArgs) -> Any:
        (name,) = args
        return manager.restore(step, args=ocp.args.Composite(**args))[name]

    contents = item(record=ocp.args.JsonRestore())  # pyright: ignore[reportCallIssue]
    record = contents["record"]
    arrays = [np.empty(spec["shape"], spec["dtype"]) for spec in record["arrays"]]
    like = [array for array in arrays if array.size]  # Orbax keeps no others
    stored = iter(item(arrays=ocp.args.StandardRestore(like)))  # pyright: ignore[reportCallIssue]
    arrays = [next(stored) if array.size else array for array in arrays]
    if _checksum(record, arrays) != contents["checksum"]:
        raise ValueError("its checksum is another")
    return record, arrays


def _require_readable(checkpoint: Path) -> None:
    """Raises WorkdirError for a file that is not damaged, but that this user may not read."""
    for path in (checkpoint, *checkpoint.rglob("*")):
        if not os.access(path, os.R_OK):
            raise WorkdirError(
                f"{path} may not be read by this user, so the run cannot go on from there; change its permissions, or "
                "choose a new folder"
            )


def _may_pass(error: Exception) -> bool:
    """Whether memory ran out or a disk does not answer, which only the text of TensorStore's ValueError says."""
    is_of_system = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    return is_of_system or isinstance(error, MemoryError) or "[os_error_code=" in str(error)


def _reason(error: Exception) -> str:
    """An error in a line; those of Orbax's libraries fill pages."""
    text = str(error).partition("[tensorstore_spec=")[0]
    return f"{type(error).__name__}: {' '.join(text.split())[:500]}"


def _pack(history: History) -> tuple[dict[str, Any], list[np.ndarray]]:
    """A history as what JSON takes, and its arrays. It is written while the history goes on, so no list is shared."""
    arrays = [to_host(_key_data(leaf)) for leaf in jax.tree.leaves(history.state)]
    if history.shapes:
        arrays.append(np.stack(history.shapes))  # [T, S, 2, P]
    record = {
        "step": history.step,
        "seconds": history.seconds,
        "num_back_offs": history.num_back_offs,
        "observed": [
            [step, {name: np.asarray(value).tolist() for name, value in scalars.items()}]
            for step, scalars in history.observed
        ],
        "shape_steps": list(history.shape_steps),
        "arrays": [{"shape": list(array.shape), "dtype": str(array.dtype)} for array in arrays],
    }
    return record, arrays


def _unpack(record: dict[str, Any], arrays: Sequence[np.ndarray], start: RunState) -> History:
    leaves, structure = jax.tree.flatten(start)
    shapes = [arrays[-1]] if record["shape_steps"] else []
    state_arrays = arrays[: len(arrays) - len(shapes)]
    found = [(array.shape, array.dtype) for array in state_arrays]
    if found != [(data.shape, data.dtype) for data in map(_key_data, leaves)]:
        raise WorkdirError(
            f"the checkpoint of step {record['step']} holds the state of another model; choose a new folder"
        )
    return History(
        state=jax.tree.unflatten(structure, map(_from_data, state_arrays, leaves)),
        step=record["step"],
        observed=[
            (step, {name: np.array(value) for name, value in scalars.items()}) for step, scalars in record["observed"]
        ],
        shape_steps=record["shape_steps"],
        shapes=[shape for stacked in shapes for shape in stacked],
        seconds=record["seconds"],
        num_back_offs=record["num_back_offs"],
    )


def _from_data(data: np.ndarray, like: jax.Array) -> jax.Array:
    """The inverse of `_key_data`, on the devices an array like it is on."""
    array = place(_key_data(like).sharding, data) if like.committed else jax.device_put(data)
    return array if _key_data(like) is like else jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))


def _key_data(leaf: jax.Array) -> jax.Array:
    """The numbers in a random key, which is how one is stored; any other array as it is."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _checksum(record: dict[str, Any], arrays: Sequence[np.ndarray]) -> int:
    value = zlib.crc32(json.dumps(record).encode())
    for array in arrays:
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        value = zlib.crc32(content, value)  # pyright: ignore[reportArgumentType]
    return value
