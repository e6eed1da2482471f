"""The documents: their code runs, their links lead somewhere."""

import copy
import itertools
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.datasets
from flax import nnx
from sklearn.preprocessing import StandardScaler

import adalfl_jax
from adalfl_jax import data, models
from adalfl_jax.data.splits import split_indices
from adalfl_jax.hypergradient import ESTIMATORS, estimator_settings
from adalfl_jax.learned_losses import FAMILIES
from adalfl_jax.task_losses import softmax_cross_entropy
from adalfl_jax.training import TrainConfig, train
from adalfl_jax.training.setup import make_setup
from tests.training.tiny import DIABETES, ROOT, tiny_config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_block(page):
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return block


@pytest.mark.parametrize(
    ("offline_steps", "steps", "bounds"),
    [(200, 100, (10, 25, 60)), pytest.param(2000, 1000, (2, 5, 9), marks=pytest.mark.slow)],
    ids=["brief", "whole"],
)
def test_the_loop_of_the_readme_trains_and_is_ahead_of_the_task_loss(
    offline_steps, steps, bounds, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    names, block = {}, python_block(ROOT / "README.md")
    for written, number in ((", 2000)", offline_steps), (", 1000)", steps)):
        assert block.count(written) == 1
        block = block.replace(written, f", {number})")
    exec(block, names)  # noqa: S102, the code is ours
    error = float(re.fullmatch(r"test error (.*)%\n", capsys.readouterr().out)[1])
    model, digits, draw_batch = names["model"], names["digits"], names["draw_batch"]
    task_step = adalfl_jax.make_task_step(model.apply, softmax_cross_entropy, names["inner"])

    @jax.jit
    def train_on_the_task_loss():
        theta = adalfl_jax.Theta.create(*model.init(jax.random.key(2)), names["inner"])
        keys = jax.random.split(jax.random.key(3), steps)
        return jax.lax.scan(lambda theta, key: (task_step(theta, draw_batch(key).inner)[0], None), theta, keys)[0]

    theta = train_on_the_task_loss()
    outputs, _ = model.apply(theta.params, theta.model_state, digits.test.inputs, train=False, rng_key=None)
    most, least, at_most = bounds
    assert error < most < least < 100 * adalfl_jax.task_losses.error_rate(digits.test.targets, outputs) < at_most
    assert adalfl_jax.load_learned_loss("learned_loss.safetensors").loss == names["loss"]


def test_a_step_that_remembers_is_scanned_as_the_docs_say():
    names = {}
    scanned, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "meta_gradients.md").read_text(), flags=re.DOTALL)
    exec(scanned, names)  # noqa: S102, the code is ours
    assert names["metrics"].outer_loss.shape == (10,)
    assert bool(names["phi"].carry.steps.is_taken.all())


def test_an_estimator_of_ones_own_is_written_as_the_docs_say():
    before, own = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "meta_gradients.md").read_text(), flags=re.DOTALL)
    noise, name = " 0.01, noise", "hypergradient=at_moved_theta"
    assert own.count(noise) == own.count(name) == 1
    names, found = {}, []
    exec(before, names)  # noqa: S102, the code is ours
    for code in (own, own.replace(noise, " 0.0, noise"), own.replace(name, 'hypergradient="unrolled"')):
        after = dict(names)
        exec(code, after)  # noqa: S102, the code is ours
        found.append(after["metrics"])
    assert found[0].outer_loss != found[1].outer_loss
    chex.assert_trees_all_close(found[1], found[2], rtol=1e-5)


def test_a_loss_of_ones_own_trains_on_seeds_side_by_side_as_the_docs_say(tmp_path, monkeypatch):
    names = {}
    own_loss, own_family, shared_loss, _ = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "method.md").read_text(), flags=re.DOTALL
    )
    exec(own_loss, names)  # noqa: S102, the code is ours
    assert names["metrics"].outer_loss.shape == (4,)
    assert (names["metrics"].outer_loss < 0.5).all()
    assert (names["phi"].params["scale"] != 0).all()
    monkeypatch.setitem(FAMILIES, "Smoothing", None)  # to be forgotten behind this test
    exec(own_family, names)  # noqa: S102, the code is ours
    loss = names["Smoothing"]()
    adalfl_jax.save_learned_loss(tmp_path / "loss.safetensors", loss, loss.init(jax.random.key(0)))
    assert adalfl_jax.load_learned_loss(tmp_path / "loss.safetensors").loss == loss
    exec(shared_loss, names)  # noqa: S102, the code is ours
    assert names["metrics"].outer_loss.shape == (4,)
    assert (names["metrics"].outer_loss < 0.5).all()


def test_a_loss_is_learned_for_sequences_as_the_docs_say():
    names = {}
    *_, sequences = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "method.md").read_text(), flags=re.DOTALL)
    brief = sequences.replace("in jax.random.split(keys[2], 300):", "in jax.random.split(keys[2], 100):")
    assert brief != sequences
    exec(brief, names)  # noqa: S102, the code is ours
    assert names["metrics"].outer_loss < 0.5
    targets, outputs = jnp.array([[3, 1], [0, -1]]), jax.random.normal(jax.random.key(0), (2, 2, 5))
    there = targets[targets >= 0], outputs[targets >= 0]
    expected = softmax_cross_entropy(*there)
    assert names["over_positions"](softmax_cross_entropy)(targets, outputs) == pytest.approx(float(expected), rel=1e-6)


def test_a_model_of_ones_own_is_known_as_the_docs_say(monkeypatch):
    monkeypatch.setitem(models.MODELS, "two_layers", None)  # to be forgotten behind this test
    (block,) = re.findall(r"```python\n(import math.*?)```", (ROOT / "docs" / "data.md").read_text(), flags=re.DOTALL)
    names = {}
    exec(block, names)  # noqa: S102, the code is ours
    setup = make_setup(TrainConfig.from_mapping(names["get_config"]()))
    params, _ = jax.eval_shape(setup.model.init, jax.random.key(0))
    assert models.count_params(params) == 64 * 128 + 128 + 128 * 10 + 10


def test_a_linen_module_is_trained_as_the_docs_say():
    (block,) = re.findall(
        r"```python\n(import jax\nfrom flax import linen.*?)```",
        (ROOT / "docs" / "data.md").read_text(),
        flags=re.DOTALL,
    )
    names = {}
    exec(block, names)  # noqa: S102, the code is ours
    loss, inner, outer = adalfl_jax.LossNetwork(), optax.sgd(0.1), optax.adam(0.1)
    step = adalfl_jax.make_bilevel_step(names["apply"], loss.apply, softmax_cross_entropy, inner, outer)
    theta = adalfl_jax.Theta.create(*names["init"](jax.random.key(0)), inner)
    phi = adalfl_jax.Phi.create(loss.init(jax.random.key(1)), outer)
    examples = jnp.ones((8, 64)), jnp.zeros(8, int)
    batch = adalfl_jax.BilevelBatch(examples, examples, rng_key=jax.random.key(2))
    after, _, metrics = jax.jit(step)(theta, phi, batch)
    assert metrics.hypergradient_norm > 0
    means = [state.model_state["batch_stats"]["BatchNorm_0"]["mean"] for state in (theta, after)]
    assert (means[0] != means[1]).any()


def test_the_docs_list_every_estimator_and_its_settings():
    text = (ROOT / "docs" / "meta_gradients.md").read_text()
    for name in ESTIMATORS:
        assert re.search(rf"^\| `{name}` \|", text, flags=re.MULTILINE), name
        for setting in estimator_settings(name):
            assert f"estimator.{setting}" in (ROOT / "configs" / "default.py").read_text()


def blocks_of_a_run(folder):
    text = re.sub(r"runs/diabetes_mlp", str(folder), (ROOT / "docs" / "workdir.md").read_text())
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_a_loop_of_ones_own_goes_on_from_a_checkpoint_as_the_docs_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *_, own_loop = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "workdir.md").read_text(), flags=re.DOTALL)
    ends = []
    for num_steps, folder in ((20, "whole"), (10, "parts"), (20, "parts")):
        names, cut_off = {}, own_loop.replace("num_steps = 20", f"num_steps = {num_steps}")
        exec(cut_off.replace('"checkpoints"', f'"{folder}"'), names)  # noqa: S102, the code is ours
        ends.append((names["theta"], names["phi"]))
    assert names["done"] == 10
    chex.assert_trees_all_equal(ends[2], ends[0])


@pytest.mark.usefixtures("without_figures")
def test_a_trained_model_predicts_in_the_units_of_its_target_as_the_docs_say(tmp_path):
    train(tiny_config(DIABETES, num_steps=2, eval_every=2, **{"offline.num_steps": 0}), tmp_path / "run")
    of_raw_rows, of_splits, _ = blocks_of_a_run(tmp_path / "run")
    names = {}
    exec(of_raw_rows, names)  # noqa: S102, the code is ours
    raw = sklearn.datasets.load_diabetes(scaled=False)
    np.testing.assert_array_equal(names["patients"], raw.data[:1])
    rows, _, _ = split_indices("diabetes", raw.target, stratify=False)
    of_inputs, of_targets = (StandardScaler().fit(x[rows]) for x in (raw.data, raw.target[:, None]))
    trained, inputs = names["trained"], of_inputs.transform(names["patients"]).astype(np.float32)
    outputs, _ = trained.model.apply(trained.params, trained.model_state, inputs, train=False, rng_key=None)
    np.testing.assert_allclose(names["progression"], of_targets.inverse_transform(outputs), rtol=1e-4)

    exec(of_splits, names)  # noqa: S102, the code is ours
    error = np.mean((names["outputs"] - names["test"].targets) ** 2)
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["methods"]["adalfl"]
    np.testing.assert_allclose(error, metrics["test"]["per_seed"][np.argmin(metrics["valid"]["per_seed"])], rtol=1e-5)
    assert np.isfinite(names["loss"])


def test_a_step_is_divided_over_devices_as_the_docs_say():
    by_sharding, by_hand = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pods.md").read_text(), flags=re.DOTALL)
    names = {}
    exec(by_sharding, names)  # noqa: S102, the code is ours
    assert len(names["theta"].params["output"]["kernel"].sharding.device_set) == jax.device_count() == 8
    before = names["metrics"].outer_loss
    exec(by_hand, names)  # noqa: S102, the code is ours
    assert names["metrics"].outer_loss < before


def test_a_users_own_arrays_are_loaded_as_the_docs_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.loading, "DATASETS", copy.copy(data.DATASETS))
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), flags=re.DOTALL):
        exec(block, names)  # noqa: S102, the code is ours
    for name in ("mine.npz", "mine"):
        dataset = data.load(name)
        assert (dataset.input_shape, dataset.num_outputs, len(dataset.train.inputs)) == ((12, 12, 3), 4, 360)
    assert not dataset.can_flip
    np.testing.assert_allclose(names["module"](names["inputs"]), names["outputs"], rtol=1e-5, atol=1e-6)
    of_module = [nnx.to_pure_dict(nnx.state(names["module"], kind)) for kind in (nnx.Param, nnx.BatchStat)]
    chex.assert_trees_all_equal(of_module, [names["params"], names["model_state"]])


@pytest.mark.slow
def test_noisy_labels_and_a_clean_set_train_a_model_as_the_docs_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "noisy_labels.md").read_text(), flags=re.DOTALL):
        exec(block, {})  # noqa: S102, the code is ours
    error = float(re.fullmatch(r"test error (.*)%\n", capsys.readouterr().out)[1])
    assert error == pytest.approx(7, abs=1.5)
    dataset = data.load("noisy.npz")
    assert [len(split.inputs) for split in (dataset.train, dataset.valid, dataset.test)] == [1200, 200, 397]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def anchors_of(page):
    """Those of its headings, as GitHub makes them, and its own."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    made = [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]
    return {*made, *re.findall(r'<a id="([^"]+)"', text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_sections_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", page.read_text())
    missing = [
        f"{path}#{anchor}" for path, anchor in links if anchor not in anchors_of(page.parent / path if path else page)
    ]
    assert missing == []


@pytest.mark.parametrize("folder", ["adalfl_jax", "adalfl_jax/data", "adalfl_jax/training", "experiments"])
def test_the_layout_has_every_module(folder):
    (layout,) = re.findall(
        r"^## Layout\n\n```\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
    )
    indent, name = " " * 2 * folder.count("/"), folder.rpartition("/")[2]
    (described,) = re.findall(rf"^{indent}{name}/(.*?)(?=^{indent}\S|\Z)", layout, re.DOTALL | re.MULTILINE)
    modules = [path.stem for path in (ROOT / folder).glob("[a-z]*.py")]
    assert [module for module in modules if not re.search(rf"\b{module}\b", described)] == []


def test_the_default_config_documents_every_field():
    lines = (ROOT / "configs" / "default.py").read_text().splitlines()
    undocumented = [
        line.strip()
        for before, line in itertools.pairwise(lines)
        if re.match(r"\s+config\.\S+ = (?!ConfigDict)", line)
        and not before.strip().startswith("#")
        and "= ConfigDict" not in before
        and "config.seed" not in before
    ]
    assert undocumented == []
