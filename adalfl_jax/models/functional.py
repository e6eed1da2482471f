"""The one place that knows how `flax.nnx` keeps state: modules become pure functions over plain dictionaries."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from adalfl_jax.arguments import shorten, why_not_called
from adalfl_jax.registry import lookup
from adalfl_jax.types import ApplyFn, InitFn, PyTree


class Model(NamedTuple):
    """A base model as two pure functions."""

    init: InitFn  # rng_key -> (params, model_state)
    apply: ApplyFn  # (params, model_state, inputs, *, train, rng_key) -> (outputs [B, C], model_state)


def functionalize(
    make_module: Callable[[nnx.Rngs], nnx.Module], *, compute_dtype: str = "float32", axis_name: str | None = None
) -> Model:
    """Makes a `Model` of any `flax.nnx` module, dropout and batch norm included.

    `params` holds the module's `nnx.Param`s and `model_state` its other variables, batch statistics say, as nested
    dictionaries of arrays; what it sows (`nnx.Intermediate`) is dropped. `apply` sets train or eval mode by `train`,
    and every random stream of the module (dropout) is derived from `rng_key`, so equal keys give equal outputs. Without
    a key, as in eval mode, a module that draws nevertheless draws the same at every call.

    Args:
      make_module: builds the module from an `nnx.Rngs`, for example `lambda rngs: MLP((64,), 10, rngs=rngs)`. It is
        called as `module(inputs)`; several inputs are one pytree.
      compute_dtype: "float32" computes in the types of the parameters and inputs. "bfloat16" casts both on the way in
        and the outputs back on the way out: parameters, gradients and losses stay as they were, and so do the
        statistics of batch norm, which flax reduces in float32.
      axis_name: of the devices of `jax.pmap` or `jax.shard_map`, over which batch norm is to average its statistics;
        the one `make_bilevel_step` is given. Under `jax.jit` they are those of the whole batch anyway.

    Returns:
      The `Model`. Its `apply` raises ValueError for parameters or a state of other names or shapes, when a module that
      holds random streams gets no key in train mode, or makes other variables when it is called.

    Raises:
      ValueError: an unknown `compute_dtype`, a module in place of a function, what is no `flax.nnx` module, one that
        takes other arguments than inputs, or one with an array of JAX that is no `nnx.Variable`.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> model = functionalize(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
      >>> params, model_state = model.init(jax.random.key(0))
      >>> outputs, _ = model.apply(params, model_state, jax.numpy.ones((8, 4)), train=True, rng_key=None)
      >>> outputs.shape
      (8, 3)
    """
    cast_down, cast_up = lookup("compute_dtype", _CASTS, compute_dtype)
    _require_maker(make_module)

    structure = nnx.eval_shape(lambda: _require_module(make_module(nnx.Rngs(0))))
    for _, module in nnx.iter_modules(structure):
        if axis_name is not None and isinstance(module, nnx.BatchNorm):
            module.axis_name = axis_name
    # The structure is static and differs between the modes only in flags such as `deterministic`.
    graphdefs: dict[bool, Any] = {}
    for train in (True, False):
        structure.train() if train else structure.eval()
        graphdefs[train], *_ = nnx.split(structure, nnx.Param, nnx.RngState, ...)
    _refuse_raw_arrays(graphdefs[True])
    _, *abstract = nnx.split(structure, nnx.Param, nnx.RngState, ...)
    params_shapes, state_shapes = (jax.tree.map(jnp.shape, nnx.to_pure_dict(abstract[i])) for i in (0, 2))
    random_streams = nnx.to_pure_dict(nnx.state(structure, nnx.RngState))

    def init(rng_key: jax.Array, /) -> tuple[PyTree, PyTree]:
        _, params, _, model_state = nnx.split(make_module(nnx.Rngs(rng_key)), nnx.Param, nnx.RngState, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)

    def apply(
        params: PyTree, model_state: PyTree, inputs: jax.Array, /, *, train: bool, rng_key: jax.Array | None
    ) -> tuple[jax.Array, PyTree]:
        if train and random_streams and rng_key is None:
            raise ValueError(
                "this model holds random streams, as dropout and recurrent cells do: give it an rng_key in train mode"
            )
        _require_shapes("params", params, params_shapes)
        _require_shapes("model_state", model_state, state_shapes)
        streams = _seed_streams(random_streams, rng_key)
        model_state = jax.tree.map(jnp.asarray, model_state)  # flax writes into a numpy array, which is the caller's
        module: Any = nnx.merge(graphdefs[train], cast_down(params), streams, model_state)
        outputs = cast_up(module(cast_down(inputs)))
        nnx.pop(module, nnx.Intermediate)  # what it sowed on the way
        *_, new_state = nnx.split(module, nnx.Param, nnx.RngState, ...)
        new_state = nnx.to_pure_dict(new_state)  # pyright: ignore[reportArgumentType]
        if jax.tree.structure(new_state) != jax.tree.structure(model_state):
            raise ValueError(
                "a module makes its variables when it is made, so that model_state stays what it is; this one has "
                f"{jax.tree.map(jnp.shape, model_state)} before a call and {jax.tree.map(jnp.shape, new_state)} after"
            )
        return outputs, new_state

    return Model(init, apply)


def _require_maker(given: Any) -> None:
    """Raises ValueError unless given a function, or a class, that makes a module from one `nnx.Rngs`."""
    example = "`lambda rngs: MLP(..., rngs=rngs)`"
    if isinstance(given, nnx.Module):
        raise ValueError(
            f"functionalize takes a function that makes the module, {example}; got the module {type(given).__name__} "
            "itself"
        )
    _require_no_linen(given)
    if not callable(given):
        raise ValueError(f"functionalize takes a function that makes the module, {example}; got {reprlib.repr(given)}")
    if reason := _why_not_made(given):
        raise ValueError(
            f"functionalize calls what it is given with one nnx.Rngs, which {given!r} is not made for: {reason}. Give "
            f"it a function of the streams that makes the module, {example}"
        )


def _why_not_made(make_module: Callable[..., Any]) -> str:
    """Why a function, or a class, cannot be called with streams alone; "" if it can, or does not tell."""
    call = make_module if isinstance(make_module, functools.partial) else functools.partial(make_module)
    given = (*call.args, "rngs")
    if not isinstance(call.func, type):
        return why_not_called(call.func, given, call.keywords)
    is_made_as_usual = type(call.func).__call__ is type(nnx.Module).__call__
    return why_not_called(call.func.__init__, ("self", *given), call.keywords) if is_made_as_usual else ""


def _require_module(made: Any) -> nnx.Module:
    """What was made, if it is a module that is called with inputs alone."""
    _require_no_linen(made)
    if not isinstance(made, nnx.Module):
        raise ValueError(
            f"functionalize takes a function that makes a flax.nnx module; it made a {type(made).__name__}"
        )
    if reason := why_not_called(made, ["inputs"]):
        raise ValueError(
            f"a module is called as module(inputs), which {type(made).__name__} is not made for: {reason}. "
            "Several inputs are one pytree, and train or eval mode is what nnx.Module.train() and eval() set"
        )
    return made


def _refuse_raw_arrays(graphdef: Any) -> None:
    for name, attribute in graphdef.attributes:
        if isinstance(getattr(attribute, "value", None), jax.Array | jax.ShapeDtypeStruct):
            raise ValueError(
                f"attribute {name!r} of the module is an array of JAX, which flax takes for a setting where it "
                "traces modules; make it an nnx.Variable, which becomes part of model_state, or an array of NumPy"
            )


def _require_no_linen(given: Any) -> None:
    module = given if isinstance(given, type) else type(given)
    if issubclass(module, linen.Module):
        raise ValueError(
            f"functionalize takes flax.nnx modules, and {module.__name__} is one of flax.linen, whose `init` and "
            "`apply` are functions of parameters already: call them in an `apply_fn` of your own (docs/data.md)"
        )


def _require_shapes(name: str, given: PyTree, expected: PyTree) -> None:
    """Raises ValueError where names or shapes are not the module's: flax goes by the order of leaves alone."""
    found = jax.tree.map(jnp.shape, given)
    if found != expected:
        raise ValueError(
            f"{name} are not those of this model: expected arrays of the shapes {shorten(expected)}; got "
            f"{shorten(found)}"
        )


def _cast(dtype: jnp.dtype) -> Callable[[PyTree], PyTree]:
    def cast(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(leaf, dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return functools.partial(jax.tree.map, cast)


_CASTS = {
    "float32": (lambda tree: tree, lambda tree: tree),
    "bfloat16": (_cast(jnp.bfloat16), _cast(jnp.float32)),
}  # name -> (before the module, after it)
COMPUTE_DTYPES = tuple(_CASTS)


def _seed_streams(streams: PyTree, rng_key: jax.Array | None) -> PyTree:
    """Fills the abstract state of random streams: keys folded from `rng_key` one by one, counters at zero."""
    rng_key = jax.random.key(0) if rng_key is None else rng_key  # for eval mode, where mostly nothing is drawn
    leaves, treedef = jax.tree.flatten(streams)

    def fill(index: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(leaf.shape, leaf.dtype)
        key = jax.random.fold_in(rng_key, index)
        return jax.random.split(key, leaf.shape) if leaf.shape else key  # of layers that are stacked, each its own

    return jax.tree.unflatten(treedef, [fill(*each) for each in enumerate(leaves)])
