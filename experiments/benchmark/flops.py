"""Counts the arithmetic of a program that loops.

XLA's count takes the body of a loop once, however often it runs. Here the body of a `scan` counts as often as it runs;
that of a `while_loop`, whose length is not known, once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from adalfl_jax.training import ConfigError


def on_a_cpu() -> contextlib.AbstractContextManager:
    """Programs are lowered for a CPU inside: XLA counts the operations of those, and none of a GPU's.

    Raises:
      ConfigError: JAX is not to use the CPU.
    """
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        raise ConfigError(
            f"operations are counted for a CPU, and JAX has none ({error}); leave JAX_PLATFORMS unset, or name cpu "
            "in it, as in JAX_PLATFORMS=cuda,cpu"
        ) from error


def count_flops(function: Callable, *arguments: Any) -> float:
    """Floating-point operations of a call, as XLA counts them before it optimises, loops in full."""
    return _count(jax.make_jaxpr(function)(*arguments))


def _count(jaxpr: core.ClosedJaxpr) -> float:
    repeated = 0.0
    for scan in _scans(jaxpr.jaxpr):
        body = scan.params["jaxpr"]
        repeated += scan.params["length"] * _count(body) - _count_once(body)
    return _count_once(jaxpr) + repeated


def _count_once(jaxpr: core.ClosedJaxpr) -> float:
    shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in jaxpr.jaxpr.invars]
    with on_a_cpu():
        costs = jax.jit(core.jaxpr_as_fun(jaxpr)).lower(*shapes).cost_analysis()
    return costs.get("flops", 0.0) if costs else 0.0


def _scans(jaxpr: core.Jaxpr) -> Iterator[Any]:
    """The scans of a program, but not those inside another scan."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            if equation.params["length"]:
                yield equation
        else:
            for inner in core.jaxprs_in_params(equation.params):
                yield from _scans(inner)
