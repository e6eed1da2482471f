"""The steps of `problems` as they are written in PyTorch; needs the extra `[bench]`.

Each maker takes a model and a loss network, which are its own, and returns `step(inner, outer)`. After a bilevel step
`grad` of the loss network's parameters is the gradient of phi.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import higher  # pyright: ignore[reportMissingImports]
import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.func import functional_call  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]  # noqa: N812, the custom of PyTorch

from adalfl_jax.types import BilevelBatch, PyTree
from experiments import torch_models
from experiments.benchmark.problems import INNER_RATE, LOSS, OUTER_RATE, Problem, Start
from experiments.benchmark.timing import Program

Step = Callable[[tuple, tuple], None]
StepMaker = Callable[[nn.Module, nn.Module], Step]


class LossNetwork(nn.Module):
    """`adalfl_jax.LossNetwork` at its defaults."""

    def __init__(self):
        super().__init__()
        self.layer_0, self.layer_1 = nn.Linear(2, 40, bias=False), nn.Linear(40, 40, bias=False)
        self.layer_2 = nn.Linear(40, 1, bias=False)

    def forward(self, labels: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """M_phi."""
        targets = F.one_hot(labels, outputs.shape[1]).to(outputs.dtype)
        values = torch.stack([targets, outputs.softmax(dim=1)], dim=-1).view(-1, 2)
        for layer in (self.layer_0, self.layer_1):
            values = smooth_leaky_relu(layer(values))
        return self.layer_2(values).sum() / len(outputs)


def smooth_leaky_relu(x: torch.Tensor) -> torch.Tensor:
    """The hidden activation."""
    return torch.add((1 - LOSS.gamma) * F.softplus(x, beta=LOSS.beta), x, alpha=LOSS.gamma)


def task_loss(model: nn.Module, phi: nn.Module) -> Step:
    """SGD on the cross-entropy."""
    del phi
    sgd = torch.optim.SGD(model.parameters(), INNER_RATE, fused=True)

    def step(inner: tuple, outer: tuple) -> None:
        del outer
        inputs, labels = inner
        sgd.zero_grad(set_to_none=True)
        F.cross_entropy(model(inputs), labels).backward()
        sgd.step()

    return step


def with_higher(model: nn.Module, phi: nn.Module, *, to_phi_only: bool = False) -> Step:
    """As in the documentation of higher; theta, batch statistics too, moves on to what the inner loop left."""
    sgd = torch.optim.SGD(model.parameters(), INNER_RATE)
    adam = _adam(phi)
    phi_params = list(phi.parameters())

    def step(inner: tuple, outer: tuple) -> None:
        with higher.innerloop_ctx(model, sgd, copy_initial_weights=False) as (fast_model, fast_sgd):
            fast_sgd.step(phi(inner[1], fast_model(inner[0])))
            adam.zero_grad(set_to_none=True)
            sgd.zero_grad(set_to_none=True)
            F.cross_entropy(fast_model(outer[0]), outer[1]).backward(inputs=phi_params if to_phi_only else None)
            adam.step()
            with torch.no_grad():
                for slow, fast in zip(model.parameters(), fast_model.parameters(), strict=True):
                    slow.copy_(fast)
                for slow, fast in zip(model.buffers(), fast_model.buffers(), strict=True):
                    slow.copy_(fast)

    return step


def with_higher_to_phi(model: nn.Module, phi: nn.Module) -> Step:
    """The same, without the gradient of the initial theta, which is not used."""
    return with_higher(model, phi, to_phi_only=True)


def with_torchopt(model: nn.Module, phi: nn.Module) -> Step:
    """As in the documentation of TorchOpt, without the gradient of the initial theta."""
    import torchopt  # pyright: ignore[reportMissingImports]

    sgd, adam, phi_params = torchopt.MetaSGD(model, INNER_RATE), _adam(phi), list(phi.parameters())

    def step(inner: tuple, outer: tuple) -> None:
        sgd.step(phi(inner[1], model(inner[0])))
        adam.zero_grad(set_to_none=True)
        F.cross_entropy(model(outer[0]), outer[1]).backward(inputs=phi_params)
        adam.step()
        torchopt.stop_gradient(model)
        torchopt.stop_gradient(sgd)

    return step


def with_autograd(model: nn.Module, phi: nn.Module) -> Step:
    """PyTorch alone, with no copy of theta and no gradient but the two that are needed."""
    adam, phi_params = _adam(phi), list(phi.parameters())
    theta: dict[str, torch.Tensor] = dict(model.named_parameters())

    def step(inner: tuple, outer: tuple) -> None:
        nonlocal theta
        loss = phi(inner[1], functional_call(model, theta, (inner[0],)))
        gradient = torch.autograd.grad(loss, tuple(theta.values()), create_graph=True)
        fast = {
            name: torch.add(param, slope, alpha=-INNER_RATE)
            for (name, param), slope in zip(theta.items(), gradient, strict=True)
        }
        outer_loss = F.cross_entropy(functional_call(model, fast, (outer[0],)), outer[1])
        for param, slope in zip(phi_params, torch.autograd.grad(outer_loss, phi_params), strict=True):
            param.grad = slope
        adam.step()
        theta = {name: param.detach().requires_grad_() for name, param in fast.items()}

    return step


BILEVEL_STEPS: dict[str, StepMaker] = {
    "higher": with_higher,
    "higher, gradient of phi alone": with_higher_to_phi,
    "TorchOpt": with_torchopt,
    "autograd.grad": with_autograd,
}
if importlib.util.find_spec("torchopt") is None:
    del BILEVEL_STEPS["TorchOpt"]


def _adam(phi: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(phi.parameters(), OUTER_RATE, fused=True)


def device() -> torch.device:
    """The kind of device JAX computes on, where PyTorch can."""
    return torch.device("cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu")


MODELS: dict[str, Callable[..., nn.Module]] = {
    "logistic": torch_models.logistic,
    "mlp": torch_models.mlp,
    "lenet5": torch_models.lenet5,
    "resnet": torch_models.resnet,
}


class Twin:
    """A problem in PyTorch, with the variables and batches of ours."""

    def __init__(self, problem: Problem, start: Start, batches: BilevelBatch):
        dtype = torch.tensor(np.asarray(jax.tree.leaves(start.params)[0])).dtype
        self.model = MODELS[problem.model](**problem.options).to(device(), dtype)
        self.phi = LossNetwork().to(device(), dtype)
        torch_models.load_variables(problem.model, self.model, start.params, start.model_state)
        layers = start.phi_params.items()
        kernels = {f"{name}.weight": torch.tensor(np.asarray(layer["kernel"]).T) for name, layer in layers}
        self.phi.load_state_dict(kernels)
        self.batches = list(zip(_batches(batches.inner), _batches(batches.outer), strict=True))

    def program(self, make_step: StepMaker) -> Program:
        """A step on every batch."""

        def run(step: Step) -> None:
            for inner, outer in self.batches:
                step(inner, outer)
            if device().type == "cuda":
                torch.cuda.synchronize()

        return Program(lambda: make_step(copy.deepcopy(self.model), copy.deepcopy(self.phi)), run, len(self.batches))

    def phi_gradient(self, make_step: StepMaker) -> PyTree:
        """The gradient of phi in the first step, in the layout of ours."""
        phi = copy.deepcopy(self.phi)
        make_step(copy.deepcopy(self.model), phi)(*self.batches[0])
        gradients = {name.removesuffix(".weight"): param.grad for name, param in phi.named_parameters()}
        return {
            name: {"kernel": np.asarray(gradient.cpu()).T}
            for name, gradient in gradients.items()
            if gradient is not None
        }


def _batches(batch: tuple) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs, labels = torch_models.images_in_torch(batch[0]), torch.tensor(batch[1], dtype=torch.int64)
    return list(zip(inputs.to(device()), labels.to(device()), strict=True))
