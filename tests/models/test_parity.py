"""The zoo against definitions of the same models in PyTorch, written from the papers; needs the extra `[parity]`."""

import functools
import re
from collections import OrderedDict

import chex
import jax
import numpy as np
import pytest

from adalfl_jax.models import MODELS, make_model
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.models.test_models import assert_close, compiled, random_images, random_variables

torch = pytest.importorskip("torch", reason="PyTorch comes with the extra [parity]")
nn = torch.nn

pytestmark = pytest.mark.slow

# The models in PyTorch, for 10 classes


def named(**layers):
    return nn.Sequential(OrderedDict(layers))


def conv_norm(num_in, num_out, size, **options):
    conv = nn.Conv2d(num_in, num_out, size, **{"padding": size // 2, **options})
    return named(conv=conv, norm=nn.BatchNorm2d(num_out), relu=nn.ReLU())


def average():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def logistic():
    return named(flatten=nn.Flatten(), output=nn.Linear(784, 10))


def mlp():
    hidden = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU())
    return named(flatten=nn.Flatten(), hidden=hidden, output=nn.Linear(1000, 10))


def lenet5():
    """With the paper's names. C5 is a convolution, as there, with a kernel of the size of its input."""
    return named(
        C1=nn.Sequential(nn.Conv2d(1, 6, 5), nn.Tanh()),
        S2=nn.AvgPool2d(2),
        C3=nn.Sequential(nn.Conv2d(6, 16, 5), nn.Tanh()),
        S4=nn.AvgPool2d(2),
        C5=nn.Sequential(nn.Conv2d(16, 120, 4), nn.Tanh(), nn.Flatten()),
        F6=nn.Sequential(nn.Linear(120, 84), nn.Tanh()),
        output=nn.Linear(84, 10),
    )


def all_cnn_c(dropout_rate):
    return nn.Sequential(
        conv_norm(3, 96, 3),
        conv_norm(96, 96, 3),
        conv_norm(96, 96, 3, stride=2),
        nn.Dropout(dropout_rate),
        conv_norm(96, 192, 3),
        conv_norm(192, 192, 3),
        conv_norm(192, 192, 3, stride=2),
        nn.Dropout(dropout_rate),
        conv_norm(192, 192, 3, padding=0),
        conv_norm(192, 192, 1),
        conv_norm(192, 10, 1),
        average(),
    )


def vgg16():
    stages, num_in = [], 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        convs = [conv_norm(fan_in, width, 3) for fan_in in (num_in, *[width] * (depth - 1))]
        stages.append(nn.Sequential(*convs, nn.MaxPool2d(2)))
        num_in = width
    return named(features=nn.Sequential(*stages), average=average(), output=nn.Linear(512, 10))


class Fire(nn.Module):
    def __init__(self, num_in, num_squeezed, num_out):
        super().__init__()
        self.squeeze = conv_norm(num_in, num_squeezed, 1)
        self.expand_1 = conv_norm(num_squeezed, num_out // 2, 1)
        self.expand_3 = conv_norm(num_squeezed, num_out // 2, 3)

    def forward(self, inputs):
        squeezed = self.squeeze(inputs)
        return torch.cat([self.expand_1(squeezed), self.expand_3(squeezed)], dim=1)


class SqueezeNet(nn.Module):
    """With the paper's names."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv10 = conv_norm(3, 96, 3), nn.Conv2d(512, 10, 1)
        self.fire2, self.fire3, self.fire4 = Fire(96, 16, 128), Fire(128, 16, 128), Fire(128, 32, 256)
        self.fire5, self.fire6 = Fire(256, 32, 256), Fire(256, 48, 384)
        self.fire7, self.fire8 = Fire(384, 48, 384), Fire(384, 64, 512)
        self.fire9 = Fire(512, 64, 512)
        self.pool, self.average = nn.MaxPool2d(2), average()

    def forward(self, images):
        hidden = self.fire2(self.pool(self.conv1(images)))
        hidden = self.pool(self.fire4(hidden + self.fire3(hidden)))
        hidden = self.fire6(hidden + self.fire5(hidden))
        hidden = self.pool(self.fire8(hidden + self.fire7(hidden)))
        return self.average(self.conv10(self.fire9(hidden)))


class Residual(nn.Module):
    def __init__(self, num_in, num_out, stride, *body):
        super().__init__()
        self.body, self.shortcut = nn.Sequential(*body, nn.BatchNorm2d(num_out)), nn.Identity()
        if num_in != num_out or stride > 1:
            projection = nn.Conv2d(num_in, num_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(num_out))

    def forward(self, inputs):
        return torch.relu(self.body(inputs) + self.shortcut(inputs))


def basic(num_in, width, stride):
    first = conv_norm(num_in, width, 3, stride=stride, bias=False)
    return Residual(num_in, width, stride, first, nn.Conv2d(width, width, 3, padding=1, bias=False))


def bottleneck(num_in, width, stride):
    """With its stride in the 3x3 convolution."""
    down, middle = conv_norm(num_in, width, 1, bias=False), conv_norm(width, width, 3, stride=stride, bias=False)
    return Residual(num_in, 4 * width, stride, down, middle, nn.Conv2d(width, 4 * width, 1, bias=False))


def places(counts):
    """The stage and stride of every block."""
    return [(stage, 2 if stage and not index else 1) for stage, count in enumerate(counts) for index in range(count)]


def resnet(depth):
    block, expansion = (bottleneck, 4) if depth == 50 else (basic, 1)
    blocks, num_in = [], 64
    for stage, stride in places((2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)):
        blocks.append(block(num_in, 64 * 2**stage, stride))
        num_in = expansion * 64 * 2**stage
    stem = conv_norm(3, 64, 3, bias=False)
    return named(stem=stem, blocks=nn.Sequential(*blocks), average=average(), output=nn.Linear(num_in, 10))


class PreActivation(nn.Module):
    def __init__(self, num_in, num_out, stride):
        super().__init__()
        self.before = named(norm=nn.BatchNorm2d(num_in), relu=nn.ReLU())
        self.first = conv_norm(num_in, num_out, 3, stride=stride, bias=False)
        self.last = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        fits = num_in == num_out and stride == 1
        self.shortcut = None if fits else nn.Conv2d(num_in, num_out, 1, stride, bias=False)

    def forward(self, inputs):
        activated = self.before(inputs)
        shortcut = inputs if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.last(self.first(activated))


def wide_resnet(depth, width):
    blocks, num_in = [], 16
    for stage, stride in places([(depth - 4) // 6] * 3):
        blocks.append(PreActivation(num_in, 16 * width * 2**stage, stride))
        num_in = 16 * width * 2**stage
    stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    last = {"norm": nn.BatchNorm2d(num_in), "relu": nn.ReLU(), "average": average(), "output": nn.Linear(num_in, 10)}
    return named(stem=stem, blocks=nn.Sequential(*blocks), **last)


# The same variables in both

LAYERS = {
    "mlp": {"hidden.1": "hidden.2"},
    "lenet5": {"conv_0": "C1.0", "conv_1": "C3.0", "hidden_0": "C5.0", "hidden_1": "F6.0"},
    "allcnnc": {f"features.{stage}.{index}": f"{4 * stage + index}" for stage in range(3) for index in range(3)},
    "squeezenet": {
        "features.0.0": "conv1",
        **{f"features.{index}.": f"fire{fire}." for fire, index in enumerate((1, 2, 3, 5, 6, 7, 8, 10), start=2)},
        "output": "conv10",
    },
    "wide_resnet": {"norm_0": "before.norm", "conv_0": "first.conv", "norm_1": "first.norm", "conv_1": "last"},
}  # model -> parts of paths in flax, without the "blocks" of a stack -> the name in PyTorch where it is another
PARTS = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # HWIO to OIHW, and a matrix to its transpose

# What ends a residual branch, or the model, is reduced. As drawn, it makes outputs of up to 10,000 in eval mode, and in
# train mode a ResNet-50 so sensitive that the rounding of PyTorch alone moves its outputs by more than 1e-4.
REDUCED = re.compile(r"(vgg16|squeezenet).*output\.kernel|resnet.*body\.blocks\.\d\.scale|wide_resnet.*conv_1\.kernel")

dotted = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
assert_near = functools.partial(chex.assert_trees_all_close, rtol=0, atol=1e-4)


def as_in_torch(name, *trees):
    """Arrays of flax by their names in PyTorch and in its layouts."""
    leaves = [leaf for tree in trees for leaf in jax.tree.leaves_with_path(tree)]
    arrays = {}
    for path, leaf in leaves:
        values = np.asarray(leaf)
        layer, _, part = dotted(path).replace(".blocks.", ".").rpartition(".")
        for in_flax, in_torch in LAYERS.get(name, {}).items():
            layer = layer.replace(in_flax, in_torch)
        if (layer, part) == ("C5.0", "kernel"):
            values = values.reshape(4, 4, 16, 120)  # flax flattens in the order H, W, C
        arrays[f"{layer}.{PARTS[part]}"] = values.transpose(AXES[values.ndim])
    assert len(arrays) == len(leaves)
    return arrays


def draw(name, definition, shape, options):
    """A model, its variables, and PyTorch's module with the same ones."""
    model, module = make_model(name, shape, 10, **options), definition(**options)
    params, model_state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf / 4 if REDUCED.match(f"{name} {dotted(path)}") else leaf, random_variables(model)
    )
    arrays = as_in_torch(name, params, model_state)
    module.load_state_dict({key: torch.tensor(values) for key, values in arrays.items()})  # all of them, and no others
    return model, params, model_state, module


def apply_in_torch(module, images):
    """The outputs, and by layer the number of values of which each batch norm took the variance."""
    counts = {}

    def count(name, _, inputs, __):
        counts[name] = inputs[0].numel() // inputs[0].shape[1]

    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(functools.partial(count, name))
    return module(torch.tensor(images.transpose(0, 3, 1, 2))), counts


def apply_in_both(name, definition, shape, options, *, train, batch_size):
    """Outputs and statistics of ours and of PyTorch, our statistics before, and the counts of `apply_in_torch`."""
    model, params, before, module = draw(name, definition, shape, options)
    images = random_images(shape, batch_size)
    apply = compiled(functools.partial(model.apply, train=train, rng_key=jax.random.key(1)))
    outputs, after = apply(params, before, images)
    with torch.no_grad():
        expected, counts = apply_in_torch(module.train(train), images)
    before, after = as_in_torch(name, before), as_in_torch(name, after)
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
    ("logistic", logistic, MNIST, {}),
    ("mlp", mlp, MNIST, {}),
    ("lenet5", lenet5, MNIST, {}),
    ("vgg16", vgg16, CIFAR, {}),
    *(("allcnnc", all_cnn_c, shape, {"dropout_rate": 0.0}) for shape in (CIFAR, ODD)),
    *(("squeezenet", SqueezeNet, shape, {}) for shape in (CIFAR, ODD)),
    *(("resnet", resnet, CIFAR, {"depth": depth}) for depth in (18, 34, 50)),
    *(("resnet", resnet, ODD, {"depth": depth}) for depth in (18, 50)),
    *(("wide_resnet", wide_resnet, shape, SMALL) for shape in (CIFAR, ODD)),
    *(("wide_resnet", wide_resnet, CIFAR, {"depth": depth, "width": width}) for depth, width in ((16, 8), (28, 10))),
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
        "wide_resnet", wide_resnet, (4, 4, 3), SMALL, train=True, batch_size=4
    )
    assert counts["norm"] == 4
    assert_near(with_unbiased_variances(before, after, counts), expected)
    assert np.abs(after["norm.running_var"] - expected["norm.running_var"]).max() > 1e-2


def test_gradients_are_those_of_pytorch():
    model, params, model_state, module = draw("wide_resnet", wide_resnet, CIFAR, SMALL)
    images, targets = random_images(CIFAR, batch_size=8), np.arange(8)

    def objective(params):
        outputs, _ = model.apply(params, model_state, images, train=True, rng_key=None)
        return softmax_cross_entropy(targets, outputs)

    gradient = as_in_torch("wide_resnet", compiled(jax.grad(objective))(params))
    outputs, _ = apply_in_torch(module.train(), images)
    nn.functional.cross_entropy(outputs, torch.tensor(targets)).backward()
    assert_close(gradient, {key: weight.grad.numpy() for key, weight in module.named_parameters()}, 1e-4)


@pytest.mark.parametrize(
    ("name", "definition", "options"), [("lenet5", lenet5, {}), ("wide_resnet", wide_resnet, SMALL)]
)
def test_the_initialization_called_pytorch_is_that_of_pytorch(name, definition, options):
    model = make_model(name, MNIST if name == "lenet5" else CIFAR, 10, initialization="pytorch", **options)
    ours = as_in_torch(name, compiled(model.init)(jax.random.key(0))[0])
    torch.manual_seed(0)
    for key, weight in definition(**options).named_parameters():
        theirs = weight.detach().numpy()
        tolerance = 5 / np.sqrt(theirs.size)  # of the spread of a sample
        np.testing.assert_allclose(np.std(ours[key]), np.std(theirs), rtol=tolerance, err_msg=key)
        np.testing.assert_allclose(np.mean(ours[key]), np.mean(theirs), atol=tolerance * np.std(theirs), err_msg=key)
