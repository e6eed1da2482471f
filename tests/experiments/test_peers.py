"""The comparison with PyTorch: what is compared is the same, and what is not is not timed."""

import jax
import numpy as np
import pytest

from experiments.benchmark import peers, problems

torch = pytest.importorskip("torch", reason="PyTorch comes with the extra [bench]")
pytest.importorskip("higher", reason="higher comes with the extra [bench]")

from experiments.benchmark import torch_steps  # noqa: E402, it imports PyTorch

pytestmark = pytest.mark.slow

LOGISTIC = problems.PROBLEMS["logistic"]._replace(batch_size=5, num_steps=2)
RESNET = problems.PROBLEMS["resnet18"]._replace(input_shape=(16, 16, 3), batch_size=4)


@pytest.fixture(scope="module")
def table():
    return peers.compare("Logistic", LOGISTIC, 2, 1)


def test_every_step_has_a_row(table):
    programs = [row["program"] for row in table.rows]
    assert programs[:2] == ["JAX, task loss", "JAX, forward"]
    peer_names = ["task loss", "higher", "higher, gradient of phi alone", "TorchOpt", "autograd.grad"]
    assert programs[-5:] == [f"PyTorch, {name}" for name in peer_names]
    ratios = {row["program"]: row for row in table.rows}
    assert ratios["PyTorch, task loss"]["to_task_loss"].median == 1
    assert ratios["JAX, forward"]["to_ours"].median == 1
    assert "in double precision" in table.notes[0]


def test_gradients_agree_to_rounding_even_through_batch_norm(monkeypatch):
    monkeypatch.setattr(peers, "EXACT", ["forward"])  # a minute to compile where the machine is busy
    batches = problems.draw_batches(RESNET, 1)
    assert peers.check_gradients(RESNET, problems.draw_start(RESNET), batches) < 1e-8


def test_a_gradient_that_differs_is_not_timed(monkeypatch):
    load = torch_steps.torch_models.load_variables

    def load_perturbed(name, module, *trees):
        load(name, module, *trees)
        with torch.no_grad():
            module.output.weight[0] += 0.1

    monkeypatch.setattr(torch_steps.torch_models, "load_variables", load_perturbed)
    monkeypatch.setattr(peers, "time_in_turn", lambda *arguments: pytest.fail("something was timed"))
    with pytest.raises(peers.GradientMismatchError, match="differs from that by “JAX, forward” by"):
        peers.compare("Logistic", LOGISTIC, 2, 1)


def test_a_gradient_that_is_no_number_is_refused():
    with pytest.raises(peers.GradientMismatchError, match="nan of its norm"):
        peers.require_equal({peers.OURS: {"a": np.ones(2)}, "other": {"a": np.array([1, np.nan])}})


@pytest.mark.parametrize("name", torch_steps.BILEVEL_STEPS)
def test_three_steps_leave_the_model_and_the_loss_where_ours_leave_them(name):
    """What is carried from step to step is that of ours, in double precision."""
    with jax.enable_x64(True):
        start, batches = problems.draw_start(LOGISTIC), problems.draw_batches(LOGISTIC, 3)
        start, batches = problems.as_float64(start), problems.as_float64(batches)
        step, state = problems.bilevel_step_of(LOGISTIC, start, batches, problems.optax.adam(problems.OUTER_RATE))
        (_, phi), _ = jax.lax.scan(step, state, jax.device_put(batches))
        twin = torch_steps.Twin(LOGISTIC, start, batches)
        taken = {}

        def make_step(model, loss):
            taken["loss"] = loss
            return torch_steps.BILEVEL_STEPS[name](model, loss)

        program = twin.program(make_step)
        program.run(program.restart())
        for layer, values in phi.params.items():
            moved = np.abs(values["kernel"] - start.phi_params[layer]["kernel"]).max()
            assert moved > 1e-6
            theirs = getattr(taken["loss"], layer).weight.detach().numpy().T
            np.testing.assert_allclose(theirs, values["kernel"], rtol=0, atol=1e-5 * moved)
