"""The implicit learning rate of a run, and the length of its first step."""

import chex
import jax
import numpy as np
import pytest

from adalfl_jax.learned_losses import load_learned_loss, save_learned_loss
from adalfl_jax.training import compare, outputs, train
from tests.training.tiny import final_state, records, tiny_config


@pytest.mark.usefixtures("without_figures")
def test_implicit_learning_rate_follows_the_schedule(tmp_path):
    config = tiny_config({"inner.schedule": "linear", "num_seeds": 1}, method="ml3")
    train(config, tmp_path / "run")
    rows = [row for row in records(tmp_path / "run") if row["method"] == "ml3"]
    rate = config.inner.learning_rate
    for row, expected in ((rows[0], rate), (rows[-1], rate / config.num_steps)):  # of the last step, and not 0
        assert row["implicit_learning_rate"] != 0
        assert row["implicit_learning_rate"] == pytest.approx(
            expected * row["gradient_scale"] * row["gradient_cosine"], rel=1e-4
        )


@pytest.fixture(scope="module")
def adjusted(tmp_path_factory):
    """Losses learned offline, and both methods behind them with a first step of a given length."""
    folder, common = tmp_path_factory.mktemp("adjusted"), {"offline.num_steps": 300, "offline.learning_rate": 0.01}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "write_figures", lambda *_: {})
        source = tiny_config(common, method="ml3", num_steps=1, eval_every=100)
        train(source, folder / "source")
        start = {"learned_loss.start": str(folder / "source"), "offline.num_steps": 0}
        config = tiny_config(start | {"inner.first_step_rate": 0.25, "methods": ("ml3", "adalfl")})
        return start, config, folder, compare(config, folder / "run")


def test_the_first_step_has_the_length_that_is_asked_for(adjusted):
    _, _, folder, summary = adjusted
    scales = [row["gradient_scale"] for row in records(folder / "source") if row.get("phase") == "training"][:2]
    rows = [row for row in records(folder / "run") if row["step"] == 0]
    for method in ("ml3", "adalfl"):
        info = summary["methods"][method]
        assert info["learning_rates"] == pytest.approx([0.25 / scale for scale in scales], rel=1e-5)
        assert info["learning_rate"] == pytest.approx(np.median(info["learning_rates"]))
        expected = [0.25 * row["gradient_cosine"] for row in rows if row["method"] == method]
        assert [row["implicit_learning_rate"] for row in rows if row["method"] == method] == pytest.approx(
            expected, 1e-5
        )


@pytest.mark.parametrize("method", [pytest.param("ml3", marks=pytest.mark.slow), "adalfl"])
def test_the_length_of_the_first_step_changes_the_rate_of_each_seed_and_nothing_else(method, adjusted, tmp_path):
    start, config, folder, summary = adjusted
    state = final_state(config, folder / "run", method)
    for seed, rate in enumerate(summary["methods"][method]["learning_rates"]):
        alone = tiny_config(start, **{"inner.learning_rate": rate}, method=method)
        train(alone, tmp_path / str(seed))
        found = final_state(alone, tmp_path / str(seed), method)
        for one, other in ((found.theta, state.theta), (found.phi, state.phi)):
            of_seed = [jax.tree.map(lambda leaf, at=seed: leaf[at], tree.params) for tree in (one, other)]
            chex.assert_trees_all_close(*of_seed, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("without_figures")
def test_a_loss_that_is_flat_keeps_its_rate(adjusted, tmp_path):
    start, _, folder, _ = adjusted
    saved = load_learned_loss(folder / "source" / "learned_loss.safetensors")
    saved.params["layer_1"]["kernel"] *= 0  # the last layer's
    save_learned_loss(tmp_path / "flat.safetensors", saved.loss, saved.params)
    overrides = start | {"learned_loss.start": str(tmp_path / "flat.safetensors"), "inner.first_step_rate": 0.25}
    with pytest.warns(UserWarning, match="is below a millionth of the task loss's"):
        summary = train(tiny_config(overrides, method="ml3"), tmp_path / "run")
    assert summary["methods"]["ml3"]["learning_rates"] == pytest.approx([0.1, 0.1])
