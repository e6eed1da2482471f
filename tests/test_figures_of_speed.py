"""The figures of time and memory that the documents tell are those of the tables."""

import re

import pytest

from tests.documents import MEMORY, ON_A_GPU, OURS, OWN, PERFORMANCE, README, STEPS, figure
from tests.training.tiny import ROOT

GOALS = [
    ("peers", "MLP", "JAX, forward", OWN),
    ("peers", "ResNet-18", "JAX, forward", OWN),
    ("peers", "Logistic", "JAX, forward", OWN),
    ("parts", "Logistic", "the same, and the gradient of phi", STEPS),
    *(("thrift", "ResNet-18", row, STEPS) for row in ("finite difference", "a quarter", "an eighth")),
    *(("thrift", "MLP", row, STEPS) for row in ("a quarter", "an eighth", "pipelined", "pipelined, finite difference")),
    *(("peers", model, "PyTorch, higher", OURS) for model in ("Logistic", "MLP", "LeNet-5")),
    *(("peers", model, "PyTorch, autograd.grad", column) for model in ("MLP", "LeNet-5") for column in (OURS, OWN)),
    *(("thrift", "ResNet-18", row, MEMORY) for row in ("task loss", "recompute")),
    ("seeds mnist_logistic", "mnist", "AdaLFL, 10 seeds", "ratio"),
    ("seeds mnist_lenet5", "mnist", "AdaLFL, 10 seeds", "ratio"),
    *(
        ("estimators", f"{model}.*K inner", f"{k} checkpointed", MEMORY)
        for model in ("MLP", "LeNet-5")
        for k in (4, 32)
    ),
]
SIZES = [
    (".*by width", "100"),
    (".*by width", "300"),
    (".*by inputs and width", "64, 64"),
    (".*by outputs C", "1000"),
]


@pytest.mark.parametrize("where", GOALS, ids=" ".join)
def test_what_was_reached_is_what_the_tables_have(where):
    (goals,) = re.findall(r"^## What was aimed at\n(.*?)^## ", PERFORMANCE, re.DOTALL | re.MULTILINE)
    assert re.search(rf"(?<![\d.]){re.escape(figure(*where))}(?![\d])", goals)


@pytest.mark.parametrize(("title", "row"), [("LeNet-5.*one inner", "unrolled"), ("LeNet-5.*K inner", "1 unrolled")])
def test_the_page_says_how_far_two_measurements_of_one_step_differ(title, row):
    (introduction,) = re.findall(
        r"^## Estimators of the meta-gradient\n(.*?)<!--", PERFORMANCE, re.DOTALL | re.MULTILINE
    )
    assert figure("estimators", title, row, STEPS) in introduction


@pytest.mark.parametrize("model", ["Logistic", "MLP", "LeNet-5", "ResNet-18"])
def test_the_readme_has_the_times_of_a_step_beside_pytorch(model):
    (table,) = re.findall(r"^\| model \| plain steps \|.*?(?=\n\n)", README, re.DOTALL | re.MULTILINE)
    (row,) = (line for line in table.splitlines() if line.startswith(f"| {model}"))
    peers = [figure("peers", model, f"PyTorch, {name}", OURS) for name in ("higher", "TorchOpt", "autograd.grad")]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
        figure("peers", model, "JAX, forward", OWN),
        *peers,
    ]


@pytest.mark.parametrize("model", ["Logistic", "MLP", "LeNet-5"])
def test_the_readme_has_the_times_of_a_step_on_a_gpu(model):
    (sentence,) = re.findall(r"On\s+an\s+\[H100\].*?\.\n\n", README, re.DOTALL)
    for program, column in (("JAX, forward", OWN), ("PyTorch, higher", OURS)):
        assert figure("peers", model, program, column, page=ON_A_GPU) in sentence


@pytest.mark.parametrize("model", ["Logistic", "MLP", "LeNet-5"])
def test_the_page_of_a_gpu_sums_its_tables_up(model):
    text = ON_A_GPU.partition("<!--")[0]
    assert f" {figure('peers', model, 'JAX, forward', OWN, page=ON_A_GPU)} for " in text
    for program in ("task loss", "higher"):
        ratios = [figure("peers", each, f"PyTorch, {program}", OURS, page=ON_A_GPU) for each in ("Logistic", "LeNet-5")]
        assert f"{ratios[1]} to {ratios[0]} times" in text


def test_the_documents_say_what_sizes_cost():
    costs = [float(figure("scaling", by, row, STEPS)) for by, row in SIZES]
    narrow, wider, small, many_outputs = costs
    assert 3 < wider < narrow < 4
    assert f"one of 64 units on 64 inputs {small:.0f}, and an MLP with 1,000 outputs" in " ".join(README.split())
    assert f"instead of ten {many_outputs:.1f}:" in " ".join(README.split())
    assert f"{many_outputs:.1f} for an MLP of a thousand outputs" in (ROOT / "docs" / "meta_gradients.md").read_text()
    few, whole = (float(figure("scaling", ".*by batch size", size, "bilevel step, ms")) for size in ("16", "128"))
    assert 1 / 8 < few / whole == pytest.approx(1 / 5, abs=0.01)
