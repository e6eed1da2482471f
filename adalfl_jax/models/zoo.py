"""Base models by name: the zoo, and registered ones."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adalfl_jax.arguments import is_count, why_not_called
from adalfl_jax.models.all_cnn import AllCNNC
from adalfl_jax.models.classic import MLP, LeNet5, LogisticRegression
from adalfl_jax.models.functional import Model, functionalize
from adalfl_jax.models.initializers import redraw_as_pytorch
from adalfl_jax.models.resnet import ResNet
from adalfl_jax.models.squeezenet import SqueezeNet
from adalfl_jax.models.vgg import VGG16
from adalfl_jax.models.wide_resnet import WideResNet
from adalfl_jax.registry import Registry, lookup, require_known
from adalfl_jax.types import ApplyFn, InitFn, PyTree

MODELS: Registry[Callable[..., Any]] = Registry(
    "model",
    {
        "logistic": LogisticRegression,
        "mlp": MLP,
        "lenet5": LeNet5,
        "vgg16": VGG16,
        "allcnnc": AllCNNC,
        "squeezenet": SqueezeNet,
        "resnet": ResNet,
        "wide_resnet": WideResNet,
    },
)  # name -> a module made by (input_shape, num_outputs, *, rngs, **options)

INITIALIZATIONS = ("he_glorot", "pytorch")


def make_model(
    name: str,
    input_shape: Sequence[int],
    num_outputs: int,
    *,
    compute_dtype: str = "float32",
    axis_name: str | None = None,
    initialization: str = "he_glorot",
    **options: Any,
) -> Model:
    """Makes a base model of the zoo, or a registered one.

    Args:
      name: a key of `MODELS`.
      input_shape: of one example, for example `(28, 28, 1)`.
      num_outputs: C.
      compute_dtype: as in `functionalize`.
      axis_name: as in `functionalize`.
      initialization: "he_glorot", the literature's, or "pytorch", the default of the authors' stack
        (`redraw_as_pytorch`).
      **options: those of the model's class, as `model_options` lists them: `hidden_sizes` of "mlp", `depth` of
        "resnet", `remat` of every model that has blocks.

    Raises:
      ValueError: an unknown model, initialization or option, or inputs the model cannot take; by its `apply`, inputs
        of another shape, or that are no floats, as the bytes of images before `Dataset.normalize`.
    """
    module = lookup("model", MODELS, name)
    if not isinstance(input_shape, Iterable):
        raise ValueError(f"input_shape must be the shape of one example, (4,) or (28, 28, 1) say; got {input_shape!r}")
    if not all(map(is_count, (*input_shape, num_outputs))):
        raise ValueError(f"a model takes inputs and has outputs; got {tuple(input_shape)} and {num_outputs}")
    input_shape = tuple(map(int, input_shape))
    require_known("initialization", INITIALIZATIONS, initialization)
    known = model_options(name)
    for option in options:
        if option not in known:
            raise ValueError(f"model {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}")
    model = functionalize(
        lambda rngs: module(input_shape, num_outputs, rngs=rngs, **options),
        compute_dtype=compute_dtype,
        axis_name=axis_name,
    )
    init = model.init if initialization == "he_glorot" else _drawn_as_pytorch(model.init)
    return Model(init, _checking_inputs(name, input_shape, model.apply))


def _drawn_as_pytorch(init: InitFn) -> InitFn:
    def init_as_pytorch(rng_key: jax.Array, /) -> tuple[PyTree, PyTree]:
        own_key, params_key = jax.random.split(rng_key)
        params, model_state = init(own_key)
        return redraw_as_pytorch(params_key, params), model_state

    return init_as_pytorch


def _checking_inputs(name: str, input_shape: tuple[int, ...], apply: ApplyFn) -> ApplyFn:
    def checking_apply(
        params: PyTree, model_state: PyTree, inputs: jax.Array, /, *, train: bool, rng_key: jax.Array | None
    ) -> tuple[jax.Array, PyTree]:
        if inputs.shape[1:] != input_shape:
            raise ValueError(
                f"model {name!r} was made for inputs [B, {', '.join(map(str, input_shape))}]; got {inputs.shape}. "
                "Reshape them, or make the model with their `input_shape`"
            )
        if not jnp.issubdtype(inputs.dtype, jnp.floating):
            raise ValueError(
                f"model {name!r} takes floats of mean 0 and deviation 1; got inputs {inputs.shape} of {inputs.dtype}. "
                "Give it `dataset.normalize(inputs)`"
            )
        return apply(params, model_state, inputs, train=train, rng_key=rng_key)

    return checking_apply


def register_model(name: str, module: Callable[..., Any]) -> None:
    """Makes a model known to `make_model` and to configurations, whose files are a good place to call this.

    Args:
      name: any but those of the zoo; one registered before is replaced.
      module: a class of `flax.nnx` modules, or a function that makes one, called as `module(input_shape, num_outputs,
        rngs=rngs)` and with the options it names, by keyword. The module takes a batch of inputs `[B, *input_shape]`
        and returns outputs `[B, C]`. In a configuration the options `hidden_sizes`, `depth`, `width` and `remat` are
        fields of `config.model`, and its file sets others as `config.model.options.NAME`.

    Raises:
      ValueError: the name of a model of the zoo, what cannot be called so, with `**options` for instance, or an option
        of the name of an argument of `make_model`.

    Example:
      >>> from flax import nnx
      >>> def linear(input_shape, num_outputs, *, rngs):
      ...     return nnx.Linear(*input_shape, num_outputs, use_bias=False, rngs=rngs)
      >>> register_model("linear", linear)
      >>> count_params(make_model("linear", (4,), 3).init(jax.random.key(0))[0])
      12
    """
    MODELS.require_free(name)
    if not callable(module):
        raise ValueError(f"model {name!r} must be a function or a class; got a {type(module).__name__}")
    parameters = _parameters(module)
    if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters.values()):
        raise ValueError(
            f"model {name!r} must name each of its options; it takes {', '.join(map(str, parameters.values()))}"
        )
    options = [option for option in parameters if option not in _ALWAYS]
    ours = inspect.signature(make_model).parameters.keys() - {"options"}
    if taken := [option for option in options if option in ours]:
        raise ValueError(f"model {name!r} cannot have the option {taken[0]}, which `make_model` sees to for all models")
    target = module.__init__ if isinstance(module, type) else module
    given = ["self"] * isinstance(module, type) + ["input_shape", "num_outputs"]
    if reason := why_not_called(target, given, ["rngs", *options]):
        raise ValueError(f"model {name!r} is called as {name}(input_shape, num_outputs, rngs=rngs): {reason}")
    MODELS[name] = module


def model_options(name: str) -> list[str]:
    """Names of the options that a model takes."""
    return [option for option in _parameters(MODELS[name]) if option not in _ALWAYS]


def required_options(name: str) -> list[str]:
    """Names of those options of a model that have no default."""
    parameters = _parameters(MODELS[name])
    return [option for option in model_options(name) if parameters[option].default is inspect.Parameter.empty]


def _parameters(module: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters that a caller gives: for a class all of `__init__` but `self`."""
    parameters = inspect.signature(module.__init__ if isinstance(module, type) else module).parameters
    return dict(list(parameters.items())[isinstance(module, type) :])


_ALWAYS = ("input_shape", "num_outputs", "rngs")


def count_params(params: PyTree) -> int:
    """Number of scalars in a pytree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
