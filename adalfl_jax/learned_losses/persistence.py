"""A learned loss as a file: parameters in safetensors, settings as JSON in its header, nothing that can run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from adalfl_jax.atomic import replace_file
from adalfl_jax.learned_losses.families import FAMILIES
from adalfl_jax.learned_losses.keywords import at_progress
from adalfl_jax.learned_losses.rescaled import RescaledLoss
from adalfl_jax.registry import lookup
from adalfl_jax.types import LearnedLoss, PyTree

FORMAT = "adalfl_jax.learned_loss"
FORMAT_VERSION = 1
KEPT = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)))  # types of parameters


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class FrozenLoss:
    """A learned loss that no longer learns: a plain callable `(targets, outputs) -> scalar`.

    It is a pytree of its parameters, so it may be an argument of `jax.jit`, and several, stacked by `jax.tree.map`, one
    of `jax.vmap`; these have the metadata of the first.

    Attributes:
      loss: the family with its settings.
      params: phi.
      metadata: what was saved with it, JSON types only.
    """

    loss: LearnedLoss
    params: PyTree
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return f"FrozenLoss({self.loss!r}, params of {jax.tree.map(jnp.shape, self.params)})"

    def __call__(
        self, targets: jax.Array, outputs: jax.Array, *, progress: jax.Array | float | None = None
    ) -> jax.Array:
        """M_phi of targets `[B]` or `[B, C]`, outputs `[B, C]` and, for a loss that reads it, progress `[]`."""
        return at_progress(self.loss.apply, progress)(self.params, targets, outputs)

    def tree_flatten(self) -> tuple[tuple[PyTree], tuple[LearnedLoss, _Metadata]]:
        """Parameters, and what is static."""
        return (self.params,), (self.loss, _Metadata(self.metadata))

    @classmethod
    def tree_unflatten(cls, static: tuple[LearnedLoss, _Metadata], children: tuple[PyTree]) -> FrozenLoss:
        """What `tree_flatten` took apart."""
        loss, metadata = static
        return cls(loss, *children, metadata.values)


@dataclasses.dataclass(frozen=True)
class _Metadata:
    """What JAX need not compare: losses may be stacked and are compiled once, whatever was saved with them."""

    values: Mapping[str, Any] = dataclasses.field(compare=False)


def save_learned_loss(
    path: str | os.PathLike[str], loss: LearnedLoss, phi_params: PyTree, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes a learned loss to `path`, by convention `*.safetensors`, replacing a file of that name in one move.

    Args:
      path: the file; its folder must exist.
      loss: a `LossNetwork`, `ScaledTaskLoss` or `WeightNetwork`, one that `register_learned_loss` knows, or a
        `RescaledLoss` of one of these.
      phi_params: its parameters, as from `loss.init`.
      metadata: a dictionary of what JSON can hold: the run, the data, the score.

    Raises:
      FileNotFoundError: no such folder.
      IsADirectoryError: `path` is a folder.
      OSError: the file cannot be written.
      ValueError: a loss of another family, parameters that do not fit it or are not finite, settings or metadata that
        JSON cannot hold.
    """
    described = require_savable(loss)
    # safetensors writes memory as it lies, whatever the strides
    arrays = {name: np.asarray(value, order="C") for name, value in _flatten(phi_params).items()}
    _check_params(loss, arrays, f"cannot save {described['family']}")
    try:
        header = {"version": FORMAT_VERSION, **described, "metadata": dict(metadata or {})}
        text = json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be JSON, a dict of text, finite numbers, lists and dicts: {error}") from error
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to save {path.name} in; make it first")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it, {path / 'learned_loss.safetensors'} say")
    try:
        replace_file(path, safetensors.numpy.save(arrays, metadata={FORMAT: text}))
    except OSError as error:  # which names a file that is moved into place later
        raise OSError(error.errno, f"a learned loss cannot be saved ({error.strerror})", str(path)) from error


def load_learned_loss(path: str | os.PathLike[str]) -> FrozenLoss:
    """Reads a learned loss. No code in the file is executed: it holds arrays and JSON.

    Args:
      path: a file `save_learned_loss` wrote.

    Returns:
      A callable `(targets, outputs) -> scalar` for any place a loss goes to: `jax.grad`, `make_task_step`.

    Raises:
      FileNotFoundError: no such file.
      IsADirectoryError: a folder.
      PermissionError: it may not be read.
      ValueError: a damaged file, one that is no learned loss, one of a later version or of a family that is not
        registered; the text says which.

    Example:
      >>> import adalfl_jax, jax, tempfile, pathlib
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "learned_loss.safetensors"
      >>> loss = adalfl_jax.LossNetwork(hidden_sizes=(8,))
      >>> save_learned_loss(path, loss, loss.init(jax.random.key(0)), {"dataset": "digits"})
      >>> frozen = load_learned_loss(path)
      >>> jax.grad(frozen, argnums=1)(jax.numpy.array([1]), jax.numpy.zeros((1, 3))).shape
      (1, 3)
    """
    path = Path(path)
    if not path.is_file():
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a file in it")
        raise FileNotFoundError(f"no learned loss at {path}")
    path.open("rb").close()  # safetensors calls one that may not be read missing
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(FORMAT)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except (safetensors.SafetensorError, AttributeError) as error:  # the latter of a type that NumPy does not have
        raise ValueError(f"{path} is damaged or is not a safetensors file: {error}") from error
    if text is None:
        raise ValueError(f"{path} is a safetensors file but holds no learned loss (no {FORMAT!r} in its header)")
    loss, metadata = _parse_header(path, text)
    _check_params(loss, arrays, f"{path} is damaged")
    return FrozenLoss(loss, _unflatten(arrays), metadata)


def require_savable(loss: LearnedLoss) -> dict[str, Any]:
    """Family and settings of a loss, as a file holds them.

    Raises:
      ValueError: a loss of an unknown family, or settings or parameters that a file would not give back as they are.
    """
    described = _describe(loss)
    try:
        is_kept = _make_loss(**json.loads(json.dumps(described, allow_nan=False))) == loss
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{loss} cannot be saved: its settings must be JSON, and make it anew: {error}") from error
    if not is_kept:
        raise ValueError(
            f"{loss} cannot be saved: made of its settings as JSON it is another loss; let them be text, finite "
            "numbers and tuples of such"
        )
    params = jax.eval_shape(loss.init, jax.random.key(0))
    if jax.tree.structure(_unflatten(_flatten(params))) != jax.tree.structure(params):
        raise ValueError(
            f"{loss} cannot be saved: its parameters must be dictionaries, nested or not, with names that have no dot; "
            f"got {jax.tree.map(jnp.shape, params)}"
        )
    return described


def _describe(loss: LearnedLoss) -> dict[str, Any]:
    family = type(loss).__name__
    if FAMILIES.get(family) is not type(loss):
        remedy = "register yours first (register_learned_loss)"
        if isinstance(loss, FrozenLoss):
            remedy = "give its `loss` and its `params`"
        elif family in FAMILIES:
            remedy = "its class was registered again since; make the loss anew"
        raise ValueError(f"only {', '.join(FAMILIES)} can be saved; got {type(loss).__qualname__}; {remedy}")
    if callable(getattr(loss, "task_loss", None)):
        raise ValueError(
            f"a {family} can be saved with a task loss that has a name, a key of TASK_LOSSES; got a function"
        )
    made_of = {field.name for field in dataclasses.fields(loss) if field.init}  # pyright: ignore[reportArgumentType]
    settings = dataclasses.asdict(loss)  # pyright: ignore[reportArgumentType]
    settings = {name: value for name, value in settings.items() if name in made_of}
    settings = {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()}
    return {
        "family": family,
        "settings": settings | ({"loss": _describe(loss.loss)} if isinstance(loss, RescaledLoss) else {}),
    }


def _make_loss(family: str, settings: Mapping[str, Any]) -> LearnedLoss:
    """The loss `_describe` described."""
    settings = {name: _with_tuples(value) for name, value in settings.items()}
    if isinstance(inner := settings.get("loss"), Mapping):
        settings["loss"] = _make_loss(inner["family"], inner["settings"])
    try:
        made_by = lookup("family of learned losses", FAMILIES, family)
    except ValueError as error:
        raise ValueError(f"{error}. Register one of your own first (register_learned_loss)") from None
    return made_by(**settings)


def _with_tuples(value: Any) -> Any:
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _parse_header(path: Path, text: str) -> tuple[LearnedLoss, Mapping[str, Any]]:
    try:
        header = json.loads(text)
        version, family = header["version"], header["family"]
        settings, metadata = dict(header["settings"]), dict(header["metadata"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read ({error!r})") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, and this release reads version {FORMAT_VERSION}")
    try:
        return _make_loss(family, settings), metadata
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a loss that is known here: {error}") from error


def _check_params(loss: LearnedLoss, arrays: Mapping[str, np.ndarray], what: str) -> None:
    expected = {name: leaf.shape for name, leaf in _flatten(jax.eval_shape(loss.init, jax.random.key(0))).items()}
    found = {name: array.shape for name, array in arrays.items()}
    if found != expected:
        raise ValueError(f"{what}: {loss} has parameters {expected}; got {found}")
    wrong = [f"{name} of {array.dtype}" for name, array in arrays.items() if array.dtype not in KEPT]
    if wrong:
        raise ValueError(f"{what}: parameters must be of {', '.join(map(str, KEPT))}; got {', '.join(wrong)}")
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(f"{what}: not finite: {', '.join(broken)}")


def _flatten(params: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _unflatten(arrays: Mapping[str, np.ndarray]) -> PyTree:
    params: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, leaf = name.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array  # of NumPy: a step that donates its arguments cannot delete it
    return params
