"""A trained model read back: it predicts what the run measured, and says what is amiss with a folder."""

import json
import shutil

import jax
import numpy as np
import pytest
import sklearn.datasets

from adalfl_jax.data.splits import split_indices
from adalfl_jax.training import ConfigError, WorkdirError, compare, load_model, train
from adalfl_jax.training.setup import make_setup
from tests.training.tiny import DIABETES, final_state, tiny_config

pytestmark = pytest.mark.usefixtures("module_without_figures")

BRIEF = {"num_steps": 4, "eval_every": 4, "offline.num_steps": 2, "batch_size": 24}
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 250)
IMAGES = np.clip(RNG.normal(90 + 40 * LABELS[:, None, None], 40, (250, 6, 6)), 0, 255).astype(np.uint8)
TEST = slice(150, None)  # more than one block of predictions, and a part of one


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Images without colour, with a test split of their own, in a file."""
    path = tmp_path_factory.mktemp("data") / "mine.npz"
    np.savez(path, inputs=IMAGES[:150], targets=LABELS[:150], test_inputs=IMAGES[TEST], test_targets=LABELS[TEST])
    return path


@pytest.fixture(scope="module")
def images_run(mine, tmp_path_factory):
    """The workdir of a comparison of two methods on images of bytes, and its config."""
    config = tiny_config(BRIEF | {"dataset.name": str(mine), "methods": ("task_loss", "adalfl"), "num_seeds": 3})
    folder = tmp_path_factory.mktemp("images") / "run"
    compare(config, folder)
    return folder, config


def measured(folder, method, seed, split="test"):
    """What the run measured at its end."""
    summary = json.loads((folder / "summary.json").read_text())
    return summary["methods"][method][split]["per_seed"][summary["seeds"].index(seed)]


def assert_error_is(error, outputs):
    """Of outputs for the test split: one more or less would be 0.01, and rounding of the mean is far below."""
    assert (outputs.argmax(axis=1) != LABELS[TEST]).mean() == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("method", ["task_loss", "adalfl"])
@pytest.mark.parametrize("seed", [0, 2])
def test_images_get_the_error_the_run_measured(method, seed, images_run):
    folder, _ = images_run
    trained = load_model(folder, method, seed)
    outputs = trained.predict(IMAGES[TEST])
    assert (outputs.shape, outputs.dtype, trained.method, trained.seed) == ((100, 3), np.float32, method, seed)
    assert_error_is(measured(folder, method, seed), outputs)
    np.testing.assert_array_equal(trained.predict(IMAGES[TEST][..., None]), outputs)


def test_without_a_seed_it_is_the_one_with_the_best_validation_metric(images_run):
    folder, _ = images_run
    trained = load_model(folder, "adalfl")
    metrics = [measured(folder, "adalfl", seed, "valid") for seed in range(3)]
    assert len(set(metrics)) > 1
    assert trained.seed == np.argmin(metrics)
    assert trained.seed == json.loads((folder / "summary.json").read_text())["learned_loss"]["seed"]


def test_parameters_and_learned_loss_are_those_of_the_state(images_run):
    folder, config = images_run
    for method in ("task_loss", "adalfl"):
        trained, state = load_model(folder, method, 1), final_state(config, folder, method)
        wanted = jax.tree.map(lambda leaf: leaf[1], state)
        jax.tree.map(np.testing.assert_array_equal, trained.params, wanted.theta.params)
        if method == "task_loss":
            assert trained.learned_loss is None
        else:
            jax.tree.map(np.testing.assert_array_equal, trained.learned_loss.params, wanted.phi.params)
            assert np.isfinite(trained.learned_loss(LABELS[:5], trained.predict(IMAGES[:5])))


def test_any_number_of_rows_is_predicted(images_run):
    trained = load_model(images_run[0], "adalfl", 0)
    assert trained.predict(IMAGES[:0]).shape == (0, 3)
    together = trained.predict(IMAGES)  # 250 rows in blocks of 96
    alone = np.concatenate([trained.predict(IMAGES[row : row + 1]) for row in (0, 95, 96, 249)])
    np.testing.assert_allclose(alone, together[[0, 95, 96, 249]], rtol=1e-5, atol=1e-6)
    for num_rows in range(1, 97):
        assert trained.predict(IMAGES[:num_rows]).shape == (num_rows, 3)
    assert trained._outputs._cache_size() == len((1, 2, 4, 8, 16, 32, 64, 96))  # programs


def test_a_regression_predicts_raw_rows_in_the_units_of_its_target(tmp_path):
    config = tiny_config(BRIEF | DIABETES, method="task_loss")
    train(config, tmp_path / "run")
    raw = sklearn.datasets.load_diabetes(scaled=False)
    rows, _, held_out = split_indices("diabetes", raw.target, stratify=False)
    for seed in config.seeds:
        predicted = load_model(tmp_path / "run", seed=seed).predict(raw.data[held_out])
        assert (predicted.shape, predicted.dtype) == ((len(held_out), 1), np.float64)
        error = ((predicted[:, 0] - raw.target[held_out]) / raw.target[rows].std()) ** 2
        np.testing.assert_allclose(error.mean(), measured(tmp_path / "run", "task_loss", seed), rtol=1e-5)


@pytest.mark.slow
def test_the_statistics_of_batch_norm_are_read_too(mine, tmp_path):
    overrides = {"model.name": "wide_resnet", "model.depth": 10, "model.width": 1, "dataset.name": str(mine)}
    config = tiny_config(BRIEF | overrides, method="task_loss", num_seeds=1)
    train(config, tmp_path / "run")
    trained = load_model(tmp_path / "run")
    fresh = trained.model.init(jax.random.key(0))[1]
    moved = jax.tree.map(lambda found, start: np.abs(found - start).max(), trained.model_state, fresh)
    assert min(jax.tree.leaves(moved)) > 0
    outputs = trained.predict(IMAGES[TEST])
    assert_error_is(measured(tmp_path / "run", "task_loss", 0), outputs)


def test_a_model_of_many_devices_is_read_on_one(mine, tmp_path):
    overrides = {"dataset.name": str(mine), "mesh.seed": 2, "mesh.data": 4}
    train(tiny_config(BRIEF | overrides, method="task_loss"), tmp_path / "run")
    # As if the run had been on more devices than there are here.
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    settings["mesh"] = {"seed": 2, "data": 4, "model": 2}
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    for seed in (0, 1):
        trained = load_model(tmp_path / "run", seed=seed)
        with pytest.raises(ConfigError, match="takes 16 devices, and JAX has 8"):
            make_setup(trained.config)
        assert {device for leaf in jax.tree.leaves(trained.params) for device in leaf.devices()} == {jax.devices()[0]}
        outputs = trained.predict(IMAGES[TEST])
        assert_error_is(measured(tmp_path / "run", "task_loss", seed), outputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "holds several methods, of which one must be named: task_loss, adalfl$"),
        ({"method": "ml3"}, "holds no method 'ml3': task_loss, adalfl$"),
        ({"method": "adalfl", "seed": 3}, "holds no seed 3; it has 0, 1, 2$"),
    ],
)
def test_what_the_run_has_not_is_told_with_what_it_has(arguments, message, images_run):
    with pytest.raises(WorkdirError, match=message):
        load_model(images_run[0], **arguments)


def edit(name, **changes):
    def change(folder):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **changes}))

    return change


def remove(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def of_another_version(folder):
    edit("config.json", nosuch=1)(folder)
    edit("summary.json", environment={"adalfl_jax": "9"})(folder)


def test_a_model_is_read_after_the_loss_it_started_from_is_gone(images_run, tmp_path):
    shutil.copytree(images_run[0], folder := tmp_path / "run")
    settings = json.loads((folder / "config.json").read_text())
    edit("config.json", learned_loss=settings["learned_loss"] | {"start": f"{tmp_path / 'gone'}#{'0' * 12}"})(folder)
    outputs = load_model(folder, "adalfl", 0).predict(IMAGES[TEST])
    assert_error_is(measured(folder, "adalfl", 0), outputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "holds no run: it has no config.json"),
        (remove("summary.json"), "holds no finished run: it has no summary.json; the command of the run"),
        (lambda folder: (folder / "summary.json").write_text("{"), r"summary\.json cannot be read"),
        (edit("config.json", nosuch=1), r"config\.json cannot be read \(config\.nosuch is no field.* new folder$"),
        (
            edit("config.json", model={"name": "mine"}),
            r"model 'mine', which is not known here; register it.* --config=FILE",
        ),
        (
            edit("config.json", learned_loss={"family": "Mine"}),
            r"learned loss 'Mine', which is not known here; register it.* --config=FILE",
        ),
        (of_another_version, r"config\.nosuch is no field.* \(adalfl_jax 9 wrote it, and this is 0\.1\.0\)"),
        (remove("states/adalfl"), r"states/adalfl cannot be read as a trained state .*not found"),
        (remove("states/adalfl/_METADATA"), r"states/adalfl cannot be read as a trained state"),
        (remove("preprocessing.json"), r"preprocessing\.json cannot be read"),
        (
            lambda folder: (folder / "preprocessing.json").write_text('{"shape": 3}'),
            r"preprocessing\.json cannot be read \(it must be an object with shape, num_outputs, inputs, targets",
        ),
        (edit("preprocessing.json", inputs={}), r"preprocessing\.json cannot be read \('mean'\)"),
    ],
    ids=[
        "folder",
        "summary",
        "damaged summary",
        "config",
        "model",
        "learned loss",
        "version",
        "state",
        "metadata",
        "preprocessing",
        "damaged preprocessing",
        "damaged scaling",
    ],
)
def test_a_folder_that_lacks_something_is_told(change, message, images_run, tmp_path):
    shutil.copytree(images_run[0], folder := tmp_path / "run")
    change(folder)
    with pytest.raises(WorkdirError, match=message):
        load_model(folder, "adalfl")


def test_a_state_of_another_model_is_told(images_run, tmp_path):
    shutil.copytree(images_run[0], folder := tmp_path / "run")
    settings = json.loads((folder / "config.json").read_text())
    for hidden_sizes, message in (([9], r"theta\.params\.\S+ is .*, not "), ([8, 8], r"it has no theta\.params\.")):
        edit("config.json", model=settings["model"] | {"hidden_sizes": hidden_sizes})(folder)
        with pytest.raises(WorkdirError, match=rf"states/adalfl cannot be read as a trained state .*{message}"):
            load_model(folder, "adalfl")


def test_neither_the_data_nor_the_place_of_the_run_is_needed(mine, tmp_path):
    path = tmp_path / "mine.npz"
    shutil.copy(mine, path)
    train(tiny_config(BRIEF | {"dataset.name": str(path)}, method="task_loss", num_seeds=1), tmp_path / "run")
    path.unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    outputs = load_model(tmp_path / "moved").predict(IMAGES[TEST])
    assert_error_is(measured(tmp_path / "moved", "task_loss", 0), outputs)
