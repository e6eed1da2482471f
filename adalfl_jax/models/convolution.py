r"""Convolution of images that is fast where XLA's is not: inside a loop on a CPU.

Training is a loop, and XLA for CPUs brings convolutions into the layout of its fast code outside of loops only. Inside
of one, JAX's gradients to the inputs and to the kernel are several times as slow. So a convolution
here is three operations, each the transpose of the others in the trilinear form

.. math:: \langle y, x * k \rangle = \langle x, y *^{\mathsf T} k \rangle = \langle k, x \star y \rangle ,

and each is lowered for a CPU in the layout of its fast code, or as a product of matrices where that is faster. For
other platforms they are lowered to what JAX makes of a convolution. The platform is the one a program is lowered for,
not the one it is traced on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from adalfl_jax.axes import vary_alike

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
BAND_COLUMNS = 256  # a row of outputs of at most as many numbers is one product with a band matrix
PATCH_OUTPUTS = 256  # of an image of more outputs, the gradient to the kernel is a product with patches

Operation = Callable[..., jax.Array]  # (left, right, geometry) -> result


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of a convolution that its arguments do not tell alone."""

    image_size: tuple[int, int]  # H, W of the inputs
    kernel_size: tuple[int, int]  # h, w
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    precision: str | None = None  # of products: that of `jax.default_matmul_precision` where the model is traced

    @property
    def output_size(self) -> tuple[int, int]:
        """H', W'."""
        height, width = (
            (size + sum(pads) - window) // stride + 1
            for size, pads, window, stride in zip(
                self.image_size, self.padding, self.kernel_size, self.strides, strict=True
            )
        )
        return height, width


def convolve(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """Convolution of images, for `nnx.Conv(conv_general_dilated=...)`.

    Args:
      inputs: `[B, H, W, channels]`.
      kernel: `[h, w, channels, num_out]`.
      strides: down and across.
      padding: before and after, down and across; or "VALID" or "SAME".
      **options: others of `jax.lax.conv_general_dilated`, at the defaults of `nnx.Conv`.

    Returns:
      `[B, H', W', num_out]`.

    Raises:
      ValueError: options that this convolution does not have, or a kernel larger than the padded images.
    """
    others = {name: value for name, value in options.items() if value not in _DEFAULTS.get(name, (None,))}
    if others:
        raise ValueError(
            "this convolution has no groups, dilation, other layout, precision or type of results; got "
            f"{others}. Take nnx.Conv's own, which is jax.lax.conv_general_dilated"
        )
    size, window = inputs.shape[1:3], kernel.shape[:2]
    if isinstance(padding, str):
        if padding not in ("VALID", "SAME"):
            raise ValueError(f'padding must be "VALID", "SAME" or pairs of numbers; got {padding!r}')
        padding = jax.lax.padtype_to_pads(size, window, strides, padding)
    down, across = padding
    precision = jax.config.values["jax_default_matmul_precision"]
    geometry = Geometry(size, window, (strides[0], strides[1]), (tuple(down), tuple(across)), precision)  # pyright: ignore[reportArgumentType]
    if min(geometry.output_size) < 1:
        raise ValueError(
            f"a kernel of {window} is larger than images of {size} with the padding {geometry.padding}: no output is "
            "left"
        )
    if any(any(jax.typeof(array).sharding.spec) for array in (inputs, kernel)):
        # Axes of an explicit mesh are part of an array's type, which the forms below would have to divide among rows.
        return jax.lax.conv_general_dilated(inputs, kernel, tuple(strides), padding, dimension_numbers=DIMENSIONS)
    return convolution_p.bind(*vary_alike(inputs, kernel), geometry=geometry)  # pyright: ignore[reportReturnType]


_DEFAULTS = {
    "lhs_dilation": (None, (1, 1)),
    "rhs_dilation": (None, (1, 1)),
    "dimension_numbers": (None, DIMENSIONS, jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))),
    "feature_group_count": (1,),
}


def _native(inputs: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    return jax.lax.conv_general_dilated(
        inputs, kernel, geometry.strides, geometry.padding, dimension_numbers=DIMENSIONS
    )


def _product(inputs: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Patches times a matrix; or, where that matrix is narrow, whole rows times the kernel along a band's diagonals."""
    inputs = jnp.pad(inputs, ((0, 0), *geometry.padding, (0, 0)))
    (h, w), (down, across) = geometry.kernel_size, geometry.strides
    num_rows, num_columns = geometry.output_size
    width, num_in, num_out = *inputs.shape[2:], kernel.shape[-1]
    rows = [slice(i, i + (num_rows - 1) * down + 1, down) for i in range(h)]
    if num_columns * num_out <= BAND_COLUMNS:
        offsets = jnp.arange(width)[:, None] - across * jnp.arange(num_columns)[None, :]
        diagonals = (offsets[None] == jnp.arange(w)[:, None, None]).astype(kernel.dtype)  # [w, width, num_columns]
        matrix = jnp.einsum("hwio,wxy->hxiyo", kernel, diagonals).reshape(h * width * num_in, num_columns * num_out)
        whole = inputs.reshape(*inputs.shape[:2], width * num_in)
        patches = [whole[:, i] for i in rows]
    else:
        columns = [slice(j, j + (num_columns - 1) * across + 1, across) for j in range(w)]
        matrix = kernel.reshape(h * w * num_in, num_out)
        patches = [inputs[:, i, j] for i in rows for j in columns]
    outputs = jnp.concatenate(patches, axis=-1).reshape(-1, len(matrix)) @ matrix
    return outputs.reshape(-1, num_rows, num_columns, num_out)


def _to_inputs(forward: Operation) -> Operation:
    """The gradient to the inputs as JAX transposes a form of the convolution."""

    def operation(outputs: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
        shape = (len(outputs), *geometry.image_size, kernel.shape[2])
        inputs, outputs = vary_alike(jnp.zeros(shape, outputs.dtype), outputs)
        return jax.linear_transpose(lambda x: forward(x, kernel, geometry), inputs)(outputs)[0]

    return operation


def _to_kernel(forward: Operation) -> Operation:
    """The gradient to the kernel as JAX transposes a form of the convolution."""

    def operation(inputs: jax.Array, outputs: jax.Array, geometry: Geometry) -> jax.Array:
        shape = (*geometry.kernel_size, inputs.shape[-1], outputs.shape[-1])
        kernel, outputs = vary_alike(jnp.zeros(shape, outputs.dtype), outputs)
        return jax.linear_transpose(lambda k: forward(inputs, k, geometry), kernel)(outputs)[0]

    return operation


def _canonical_to_inputs(outputs: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    padding = []
    for size, taken, window, stride, (before, _) in zip(
        geometry.image_size, geometry.output_size, geometry.kernel_size, geometry.strides, geometry.padding, strict=True
    ):
        before = window - 1 - before
        padding.append((before, size - ((taken - 1) * stride + 1) - before + window - 1))
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    return jax.lax.conv_general_dilated(
        outputs, turned, (1, 1), padding, lhs_dilation=geometry.strides, dimension_numbers=DIMENSIONS
    )


def _canonical_to_kernel(inputs: jax.Array, outputs: jax.Array, geometry: Geometry) -> jax.Array:
    result = jax.lax.conv_general_dilated(
        inputs.transpose(3, 1, 2, 0),
        outputs.transpose(1, 2, 0, 3),
        (1, 1),
        geometry.padding,
        rhs_dilation=geometry.strides,
        dimension_numbers=DIMENSIONS,
    ).transpose(1, 2, 0, 3)
    h, w = geometry.kernel_size
    return result[:h, :w]  # rows and columns that strides leave over


def _is_narrow(geometry: Geometry, num_out: int) -> bool:
    return geometry.output_size[1] * num_out <= BAND_COLUMNS or geometry.kernel_size == (1, 1)


def _fast(inputs: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    form = _product if _is_narrow(geometry, kernel.shape[-1]) else _native
    return form(inputs, kernel, geometry)


def _fast_to_inputs(outputs: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    form = _to_inputs(_product) if _is_narrow(geometry, kernel.shape[-1]) else _canonical_to_inputs
    return form(outputs, kernel, geometry)


def _fast_to_kernel(inputs: jax.Array, outputs: jax.Array, geometry: Geometry) -> jax.Array:
    num_rows, num_columns = geometry.output_size
    by_product = _is_narrow(geometry, outputs.shape[-1]) or num_rows * num_columns >= PATCH_OUTPUTS
    if by_product:
        # Else patches, which need nothing of the backward pass, are made before it begins, of all layers at once.
        inputs = inputs + 0 * outputs[:1, :1, :1, :1]
    form = _to_kernel(_product) if by_product else _canonical_to_kernel
    return form(inputs, outputs, geometry)


def _in_its_precision(form: Operation) -> Operation:
    """The form in the geometry's precision: it is lowered once the context of the trace is gone."""

    def operation(left: jax.Array, right: jax.Array, geometry: Geometry) -> jax.Array:
        with jax.default_matmul_precision(geometry.precision):  # pyright: ignore[reportArgumentType]
            return form(left, right, geometry)

    return operation


def _define(name: str, native: Operation, product: Operation, fast: Operation) -> Primitive:
    """A primitive of two arrays: `fast` on a CPU, `native` elsewhere.

    Of several at once, under `jax.vmap`, narrow ones are one `product` on a CPU and others come one after the other:
    their patches are 9 times their inputs for a 3x3 kernel, and XLA's grouped convolution is slower still.
    """
    primitive = Primitive(name)
    native, product, fast = map(_in_its_precision, (native, product, fast))

    @functools.partial(jax.jit, static_argnames="geometry")
    def run(left: jax.Array, right: jax.Array, geometry: Geometry) -> Any:
        return primitive.bind(left, right, geometry=geometry)

    def evaluate(left: jax.Array, right: jax.Array, *, geometry: Geometry) -> Any:
        with jax.disable_jit(False):  # where it is disabled, `run` would bind the primitive for ever
            return run(left, right, geometry)

    def abstract(left: Any, right: Any, *, geometry: Geometry) -> Any:  # as JAX's own, the axes it varies over included
        return jax.make_jaxpr(functools.partial(native, geometry=geometry))(left, right).out_avals[0]

    def batch(arrays: Sequence[jax.Array], axes: Sequence[int | None], *, geometry: Geometry) -> tuple[jax.Array, int]:
        def side_by_side(form: Operation, *arrays: jax.Array) -> jax.Array:
            return jax.vmap(functools.partial(form, geometry=geometry), in_axes=tuple(axes))(*arrays)

        def one_by_one(*arrays: jax.Array) -> jax.Array:
            def one(index: jax.Array) -> Any:
                pair = (
                    array if axis is None else jax.lax.dynamic_index_in_dim(array, index, axis, keepdims=False)
                    for array, axis in zip(arrays, axes, strict=True)
                )
                return primitive.bind(*pair, geometry=geometry)

            size = next(array.shape[axis] for array, axis in zip(arrays, axes, strict=True) if axis is not None)
            return jax.lax.map(one, jnp.arange(size))

        num_out = [size for axis, size in enumerate(arrays[1].shape) if axis != axes[1]][-1]
        on_cpu = functools.partial(side_by_side, product) if _is_narrow(geometry, num_out) else one_by_one
        elsewhere = functools.partial(side_by_side, native)
        return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere), 0

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(native, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(fast, multiple_results=False), platform="cpu")
    return primitive


convolution_p = _define("convolution", _native, _product, _fast)
to_inputs_p = _define("convolution_to_inputs", _to_inputs(_native), _to_inputs(_product), _fast_to_inputs)
to_kernel_p = _define("convolution_to_kernel", _to_kernel(_native), _to_kernel(_product), _fast_to_kernel)

ad.defbilinear(
    convolution_p,
    lambda y, _, kernel, *, geometry: to_inputs_p.bind(y, kernel, geometry=geometry),
    lambda y, inputs, _, *, geometry: to_kernel_p.bind(inputs, y, geometry=geometry),
)
ad.defbilinear(
    to_inputs_p,
    lambda x, _, kernel, *, geometry: convolution_p.bind(x, kernel, geometry=geometry),
    lambda x, outputs, _, *, geometry: to_kernel_p.bind(x, outputs, geometry=geometry),
)
ad.defbilinear(
    to_kernel_p,
    lambda k, _, outputs, *, geometry: to_inputs_p.bind(outputs, k, geometry=geometry),
    lambda k, inputs, _, *, geometry: convolution_p.bind(inputs, k, geometry=geometry),
)
