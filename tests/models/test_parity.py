"""The zoo against definitions of the same models in PyTorch, written from the papers; needs the extra `[parity]`."""

import functools
import re

import chex
import jax
import numpy as np
import pytest

from adalfl_jax.models import MODELS, make_model
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.models.zoo import assert_close, random_images, random_variables

torch = pytest.importorskip("torch", reason="PyTorch comes with the extra [parity]")
from experiments import torch_models as twins  # noqa: E402, it imports PyTorch

nn = torch.nn

pytestmark = pytest.mark.slow

# What ends a residual branch, or the model, is reduced. As drawn, it makes outputs of up to 10,000 in eval mode, and in
# train mode a ResNet-50 so sensitive that the rounding of PyTorch alone moves its outputs by more than 1e-4.
REDUCED = re.compile(r"(vgg16|squeezenet).*output\.kernel|resnet.*body\.blocks\.\d\.scale|wide_resnet.*conv_1\.kernel")

assert_near = functools.partial(chex.assert_trees_all_close, rtol=0, atol=1e-4)


def draw(name, definition, shape, options):
    """A model, its variables, and PyTorch's module with the same ones."""
    model, module = make_model(name, shape, 10, **options), definition(**options)
    params, model_state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf / 4 if REDUCED.match(f"{name} {twins.dotted(path)}") else leaf, random_variables(model)
    )
    twins.load_variables(name, module, params, model_state)
    return model, params, model_state, module


def apply_in_torch(module, images):
    """The outputs, and by layer the number of values of which each batch norm took the variance."""
    counts = {}

    def count(name, _, inputs, __):
        counts[name] = inputs[0].numel() // inputs[0].shape[1]

    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(functools.partial(count, name))
    return module(twins.images_in_torch(images)), counts


def apply_in_both(name, definition, shape, options, *, train, batch_size):
    """Outputs and statistics of ours and of PyTorch, our statistics before, and the counts of `apply_in_torch`."""
    model, params, before, module = draw(name, definition, shape, options)
    images = random_images(shape, batch_size)
    apply = jax.jit(functools.partial(model.apply, train=train, rng_key=jax.random.key(1)))
    outputs, after = apply(params, before, images)
    with torch.no_grad():
        expected, counts = apply_in_torch(module.train(train), images)
    before, after = twins.as_in_torch(name, before), twins.as_in_torch(name, after)
    statistics = {key: module.state_dict()[key].numpy() for key in after}
    return (outputs, after), (expected.numpy(), statistics), before, counts


def with_unbiased_variances(before, after, counts):
    """Statistics as PyTorch would have moved them: by n / (n - 1) times the variance of n values."""
    moved = {f"{layer}.running_var": n / (n - 1) for layer, n in counts.items()}
    return after | {key: 0.9 * before[key] + factor * (after[key] - 0.9 * before[key]) for key, factor in moved.items()}


# The comparison

MNIST, CIFAR, ODD = (28, 28, 1), (32, 32, 3), (35, 42, 3)
SMALL = {"depth": 10, "width": 1}
CASES = [
    ("logistic", twins.logistic, MNIST, {}),
    ("mlp", twins.mlp, MNIST, {}),
    ("lenet5", twins.lenet5, MNIST, {}),
    ("vgg16", twins.vgg16, CIFAR, {}),
    *(("allcnnc", twins.all_cnn_c, shape, {"dropout_rate": 0.0}) for shape in (CIFAR, ODD)),
    *(("squeezenet", twins.SqueezeNet, shape, {}) for shape in (CIFAR, ODD)),
    *(("resnet", twins.resnet, CIFAR, {"depth": depth}) for depth in (18, 34, 50)),
    *(("resnet", twins.resnet, ODD, {"depth": depth}) for depth in (18, 50)),
    *(("wide_resnet", twins.wide_resnet, shape, SMALL) for shape in (CIFAR, ODD)),
    *(
        ("wide_resnet", twins.wide_resnet, CIFAR, {"depth": depth, "width": width})
        for depth, width in ((16, 8), (28, 10))
    ),
]


def test_every_model_is_compared():
    assert {name for name, *_ in CASES} == set(MODELS)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("name", "definition", "shape", "options"), CASES)
def test_outputs_and_statistics_are_those_of_pytorch(name, definition, shape, options, train):
    ours, expected, before, counts = apply_in_both(name, definition, shape, options, train=train, batch_size=8)
    outputs, after = ours
    assert_near((outputs, with_unbiased_variances(before, after, counts) if train else after), expected)


def test_variances_of_few_values_are_those_of_pytorch_only_when_converted():
    (_, after), (_, expected), before, counts = apply_in_both(
        "wide_resnet", twins.wide_resnet, (4, 4, 3), SMALL, train=True, batch_size=4
    )
    assert counts["norm"] == 4
    assert_near(with_unbiased_variances(before, after, counts), expected)
    assert np.abs(after["norm.running_var"] - expected["norm.running_var"]).max() > 1e-2


def test_gradients_are_those_of_pytorch():
    model, params, model_state, module = draw("wide_resnet", twins.wide_resnet, CIFAR, SMALL)
    images, targets = random_images(CIFAR, batch_size=8), np.arange(8)

    def objective(params):
        outputs, _ = model.apply(params, model_state, images, train=True, rng_key=None)
        return softmax_cross_entropy(targets, outputs)

    gradient = twins.as_in_torch("wide_resnet", jax.jit(jax.grad(objective))(params))
    outputs, _ = apply_in_torch(module.train(), images)
    nn.functional.cross_entropy(outputs, torch.tensor(targets)).backward()
    assert_close(gradient, {key: weight.grad.numpy() for key, weight in module.named_parameters()}, 1e-4)


@pytest.mark.parametrize(
    ("name", "definition", "options"), [("lenet5", twins.lenet5, {}), ("wide_resnet", twins.wide_resnet, SMALL)]
)
def test_the_initialization_called_pytorch_is_that_of_pytorch(name, definition, options):
    model = make_model(name, MNIST if name == "lenet5" else CIFAR, 10, initialization="pytorch", **options)
    ours = twins.as_in_torch(name, jax.jit(model.init)(jax.random.key(0))[0])
    torch.manual_seed(0)
    for key, weight in definition(**options).named_parameters():
        theirs = weight.detach().numpy()
        tolerance = 5 / np.sqrt(theirs.size)  # of the spread of a sample
        np.testing.assert_allclose(np.std(ours[key]), np.std(theirs), rtol=tolerance, err_msg=key)
        np.testing.assert_allclose(np.mean(ours[key]), np.mean(theirs), atol=tolerance * np.std(theirs), err_msg=key)
