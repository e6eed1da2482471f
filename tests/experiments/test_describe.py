"""What a configuration would cost: figures that agree with arithmetic, and data that need not be there."""

import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

import adalfl_jax
from adalfl_jax import data
from adalfl_jax.data import streaming
from adalfl_jax.training.initial import init_phi, init_theta, make_seed_keys
from adalfl_jax.training.phases import make_training_program
from adalfl_jax.training.setup import examples_for_a_batch, make_setup
from adalfl_jax.training.state import RunState
from experiments import describe, launch
from tests.configs.test_configs import random_setup
from tests.training.tiny import ROOT, SETTINGS, tiny_config

# ml_collections loads a configuration in a way that Python means to drop
pytestmark = [
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
    pytest.mark.usefixtures("verbosity"),
]

BATCH_SIZE = SETTINGS["batch_size"]
LITTLE = {"flops": 1.5e9, "arguments": 2e6, "temporary": 30e6, "output": 4e8}
MUCH = {"flops": 4e9, "arguments": 3e6, "temporary": 70e6, "output": 1.5e9}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs the program here, without data; returns what it printed and its last words, None if it has none."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))

    def run_program(*arguments, config="mnist_mlp"):
        argv = ["describe", f"--config={ROOT / 'configs' / config}.py", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # where the fields of a configuration are looked for
        with flagsaver.flagsaver():
            ended = None
            try:
                describe.main(launch.parse_flags(argv))
            except SystemExit as end:
                ended = end.code
        return capsys.readouterr().out, ended

    return run_program


@pytest.fixture
def no_measure(monkeypatch):
    """Nothing is compiled; the figures are those above."""
    figures = {"task_loss": LITTLE, "adalfl": MUCH}
    monkeypatch.setattr(describe, "measure", lambda setup, spec, method: figures[method])


@pytest.fixture
def no_compilation(monkeypatch):
    """Operations are counted before a program is compiled, so that can be left out."""
    sizes = ("argument_size_in_bytes", "temp_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes")
    compiled = types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(**dict.fromkeys(sizes, 0)))
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: compiled)


def setup_of(name, changes=()):
    """The setup of a config at tiny settings, on noise, and the shapes of its dataset."""
    changes = SETTINGS | dict(changes)
    setup = random_setup(name, changes["batch_size"], changes)
    return setup, data.load_spec(setup.config.dataset.name)


def measured(name, method, changes):
    return describe.measure(*setup_of(name, changes), method)


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def state_of(setup):
    """The state AdaLFL starts from, for every seed."""
    keys = make_seed_keys(setup.config.seeds)
    return RunState(init_theta(setup, keys), init_phi(setup, keys))


def write_images(tmp_path):
    inputs = np.random.default_rng(0).integers(0, 256, (1000, 6, 5, 3), np.uint8)
    np.savez(tmp_path / "mine.npz", inputs=inputs, targets=np.arange(1000) % 4)
    return str(tmp_path / "mine.npz")


# Each weight takes part in a multiplication and an addition an example, 2 operations, in every product that it has a
# part in: three of a training step (the outputs, the gradient of the layer's inputs, that of its weights) and eight of
# an AdaLFL step (three on the inner batch, three on the outer one, and two that push the outer gradient through the
# inner one). No gradient of the inputs of the first layer is needed, and no such derivative.
LARGE = {"model.hidden_sizes": (512, 512), "num_seeds": 1}
WEIGHTS = (64 * 512, 512 * 512, 512 * 10)


def test_a_step_takes_6_flops_a_parameter_and_example_and_that_of_adalfl_eight_thirds_of_them(no_compilation):
    task_loss, adalfl = (measured("digits_mlp", method, LARGE)["flops"] for method in ("task_loss", "adalfl"))
    num_params = sum(WEIGHTS) + 512 + 512 + 10
    assert task_loss == pytest.approx(6 * num_params * BATCH_SIZE, rel=0.05)
    assert adalfl / task_loss == pytest.approx(8 / 3, rel=0.02)
    # and with what the first layer saves
    assert task_loss == pytest.approx((6 * sum(WEIGHTS) - 2 * WEIGHTS[0]) * BATCH_SIZE, rel=0.015)
    assert adalfl == pytest.approx((16 * sum(WEIGHTS) - 6 * WEIGHTS[0]) * BATCH_SIZE, rel=0.02)


def test_the_flops_of_a_step_are_those_of_a_small_model_too(no_compilation):
    flops = measured("mnist_logistic", "task_loss", {"num_seeds": 1})["flops"]
    assert flops == pytest.approx(4 * 784 * 10 * BATCH_SIZE, rel=0.15)  # beside the products: bytes are normalised


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_the_flops_of_convolutions_are_those_of_one_seed_without_the_zeros_of_a_band(num_seeds, no_compilation):
    convolutions = 24 * 24 * 25 * 6, 8 * 8 * 25 * 6 * 16
    products = 256 * 120 + 120 * 84 + 84 * 10
    flops = measured("mnist_lenet5", "task_loss", {"num_seeds": num_seeds, "batch_size": BATCH_SIZE})["flops"]
    expected = (4 * convolutions[0] + 6 * (convolutions[1] + products)) * BATCH_SIZE
    assert flops == pytest.approx(expected, rel=0.05)


def test_a_mesh_does_not_change_the_flops_of_a_step(no_compilation):
    alone, divided = (measured("digits_mlp", "adalfl", {"mesh.data": parts})["flops"] for parts in (1, 2))
    assert alone == divided


@pytest.mark.parametrize(("share", "times"), [(0.2, 1), (1.0, 2)])
def test_the_flops_of_a_step_are_those_before_the_clean_set_joins(share, times, no_compilation):
    joined, alone = (
        measured("digits_mlp", "task_loss", {"outer.split": "valid", "outer.joint_share": chosen, "num_seeds": 1})[
            "flops"
        ]
        for chosen in (share, 0.0)
    )
    assert joined == pytest.approx(times * alone, rel=0.02)


def test_outer_examples_are_as_many_as_a_run_has():
    config = tiny_config({"outer.split": "valid", "outer.split_fraction": 0.45})
    setup = make_setup(config)
    train, outer = describe._splits(config, data.load_spec("digits"))
    assert len(setup.outer_examples.inputs) == outer.inputs.shape[0] == 65  # of 144, and not 64
    assert train.inputs.shape == setup.dataset.train.inputs.shape


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.95, 0.96, 0.99, 1.0])
def test_the_noise_that_stands_for_data_is_enough_for_any_share_of_outer_examples(fraction):
    config = tiny_config({"outer.split": "valid", "outer.split_fraction": fraction, "batch_size": 10})
    noise = data.random_dataset("digits", data.load_spec("digits"), examples_for_a_batch(config))
    setup = make_setup(config, noise)
    assert len(setup.outer_examples.inputs) >= 10
    assert len(setup.dataset.valid.inputs) >= 1


def test_a_chunk_is_no_longer_than_the_run(monkeypatch):
    lengths = []

    def make(*arguments):
        phase = make_training_program(*arguments)

        def lower(*arguments, num_steps):
            lengths.append(num_steps)
            return phase.advance.lower(*arguments, num_steps=num_steps)

        return phase._replace(advance=types.SimpleNamespace(lower=lower))

    monkeypatch.setattr(describe, "make_training_program", make)
    measured("digits_mlp", "task_loss", {"num_steps": 3, "eval_every": 50})
    assert lengths == [3]


def test_data_that_are_streamed_are_no_arguments():
    setup, spec = setup_of("mnist_mlp", {"num_seeds": 1, "dataset.streaming": "always", "outer.split": "valid"})
    assert describe.measure(setup, spec, "task_loss")["arguments"] < spec.num_bytes / 20  # some batches, and the state


@pytest.mark.parametrize("how", ["never", "always"])
def test_memory_has_the_block_that_waits_and_no_array_twice(how, monkeypatch):
    """XLA counts a block at work among the arguments, and a new state that takes the place of the old one as both."""
    sizes = {"argument_size_in_bytes": 1000, "temp_size_in_bytes": 200, "output_size_in_bytes": 300}
    analysis = types.SimpleNamespace(**sizes, alias_size_in_bytes=50)
    compiled = types.SimpleNamespace(memory_analysis=lambda: analysis)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: compiled)
    changes = {"num_seeds": 3, "num_steps": 12, "eval_every": 6, "dataset.streaming": how}
    figures = measured("mnist_mlp", "task_loss", changes)
    step = 2 * 3 * BATCH_SIZE * (28 * 28 + 4)  # inner and outer batches of all seeds
    assert figures["arguments"] == 1000 + (6 * step if how == "always" else 0)
    assert (figures["temporary"], figures["output"]) == (200, 300 - 50)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 2 * step)
    assert measured("mnist_mlp", "task_loss", changes)["arguments"] == 1000 + (2 * step if how == "always" else 0)


@pytest.mark.parametrize(("how", "excess"), [("auto", 0), ("auto", 1), ("always", 0), ("never", 1)])
def test_data_are_said_to_be_streamed_when_they_are(how, excess, tmp_path, monkeypatch, run, no_measure):
    name = write_images(tmp_path)
    num_bytes = data.load_spec(name).num_bytes
    monkeypatch.setattr(streaming, "_device_memory", lambda: 4 * (num_bytes - excess))  # a quarter may be filled
    expected = how == "always" or (how == "auto" and excess > 0)
    out, ended = run(f"--config.dataset.name={name}", f"--config.dataset.streaming={how}")
    assert ended is None
    assert (", streamed from the host" in out) == expected
    assert data.load(name, streaming=how).is_streamed == expected


COUNTED = {
    "mnist_logistic": (7850, 0),
    "mnist_mlp": (1_796_010, 0),
    "cifar10_resnet18": (11_173_962, 2 * (5 * 64 + 5 * 128 + 5 * 256 + 5 * 512)),
}


@pytest.mark.parametrize("config", COUNTED)
def test_parameters_and_statistics_are_counted(config, run, no_measure):
    out, ended = run(config=config)
    assert ended is None
    params, statistics = COUNTED[config]
    assert f": {params:,} parameters, {statistics:,} statistics\n" in out
    assert "loss        network: 1,720 parameters\n" in out  # 2 * 40 + 40 * 40 + 40, without biases


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learned_loss.family": "scaled_task_loss", "learned_loss.use_bias": False},
        {"learned_loss.family": "weight_network"},
    ],
)
def test_parameters_are_as_many_as_are_drawn(changes, run, no_measure):
    changes = {"model.hidden_sizes": (7, 5)} | changes
    setup, _ = setup_of("digits_mlp", changes | {"learned_loss.hidden_sizes": (40, 40)})
    params, model_state = jax.jit(setup.model.init)(jax.random.key(0))
    counts = [
        sum(np.size(leaf) for leaf in jax.tree.leaves(tree))
        for tree in (params, model_state, setup.learned_loss.init(jax.random.key(0)))
    ]
    out, _ = run(*(f"--config.{name}={value}" for name, value in changes.items()), config="digits_mlp")
    assert f"mlp: {counts[0]:,} parameters, {counts[1]:,} statistics\n" in out
    assert f"{setup.config.learned_loss.family}: {counts[2]:,} parameters\n" in out


SUMMARIES = {
    "digits_mlp": (
        "dataset     digits: 1,293 training examples of 8x8x1, 10 outputs\n",
        "steps       1,000 of 100 examples, 8 seeds at once\n",
        "computes in float32\n",
        f"device      {jax.devices()[0].device_kind}\n",
    ),
    "diabetes_mlp": ("dataset     diabetes: 317 training examples of 10, 1 output",),
}


@pytest.mark.parametrize("config", SUMMARIES)
def test_the_summary_says_what_is_trained(config, run, no_measure):
    out, ended = run(config=config)
    assert ended is None
    for text in SUMMARIES[config]:
        assert text in out


def test_a_corrupted_training_split_is_described(run, no_measure):
    flags = ("label_noise=0.4", "imbalance=10.0", "valid_examples=100")
    out, ended = run(*(f"--config.dataset.{flag}" for flag in flags), config="digits_mlp")
    assert ended is None
    assert "dataset     digits: about 546 training examples of 8x8x1" in out
    out, _ = run(*(f"--config.dataset.{flag}" for flag in (*flags, "noise_kind=removed")), config="digits_mlp")
    assert "dataset     digits: about 328 training examples of 8x8x1" in out
    _, ended = run("--config.dataset.label_noise=0.4", config="diabetes_mlp")
    assert ended.startswith("DatasetError: the dataset is a regression")


def test_the_summary_follows_the_flags(run, no_measure):
    flags = ("num_seeds=1", "batch_size=7", "num_steps=12", "model.compute_dtype=bfloat16", "dataset.image_size=20")
    out, ended = run(*(f"--config.{flag}" for flag in flags))
    assert ended is None
    assert "steps       12 of 7 examples, 1 seed at once\n" in out
    assert "computes in bfloat16\n" in out
    assert "of 20x20x1, 10 outputs\n" in out


def cells(out):
    """The table, a list of cells a row."""
    rows = [line for line in out.splitlines() if line.startswith(("┃", "│"))]
    return [[cell.strip() for cell in row.strip("┃│").replace("┃", "│").split("│")] for row in rows]


def test_the_table_has_the_figures_their_ratio_and_their_sum(run, no_measure):
    out, ended = run()
    assert ended is None
    assert "One step of one seed, and the memory of 10 seeds on a device" in out
    assert cells(out) == [
        ["loss", "GFLOP", "ratio", "state and data MB", "temporary MB", "new state MB", "in all MB"],
        ["task loss", "1.5", "1.00", "2", "30", "400", "432"],
        ["AdaLFL", "4", "2.67", "3", "70", "1,500", "1,573"],
    ]


TINY_FLAGS = [f"--config.{name}={value}" for name, value in (SETTINGS | {"num_seeds": 1}).items()]


def test_the_number_of_examples_need_not_be_known(run, tmp_path, monkeypatch, no_compilation):
    figures = measured("mnist_mlp", "task_loss", {"dataset.name": "kmnist", "num_seeds": 1})
    assert figures["flops"] == pytest.approx((4 * 784 * 8 + 6 * 8 * 10) * BATCH_SIZE, rel=0.15)
    monkeypatch.setattr(describe, "measure", lambda setup, spec, method: figures)
    out, ended = run(*TINY_FLAGS, "--config.dataset.name=kmnist")
    assert ended is None
    assert "kmnist: not prepared, examples of 28x28x1, 10 outputs\n" in out
    assert [row[0] for row in cells(out)] == ["loss", "task loss", "AdaLFL"]
    assert not list(tmp_path.iterdir())


def test_a_run_may_start_from_a_saved_loss(tmp_path, no_compilation):
    loss = adalfl_jax.LossNetwork(hidden_sizes=(3,))
    saved = tmp_path / "loss.safetensors"
    adalfl_jax.save_learned_loss(saved, loss, loss.init(jax.random.key(0)))
    starts = {"learned_loss.start": str(saved), "learned_loss.hidden_sizes": (3,), "num_seeds": 2}
    assert measured("mnist_mlp", "adalfl", starts)["flops"] > 0


@pytest.fixture
def figures(monkeypatch):
    """What is measured while the program runs, by method."""
    measured, measure = {}, describe.measure

    def record(setup, spec, method):
        measured[method] = measure(setup, spec, method)
        return measured[method]

    monkeypatch.setattr(describe, "measure", record)
    return measured


def test_ten_seeds_take_ten_states_and_the_data_which_need_not_be_there(run, figures, tmp_path):
    changes = {"outer.split": "valid", "num_seeds": 10}
    out, ended = run(*TINY_FLAGS, *(f"--config.{name}={value}" for name, value in changes.items()))
    assert ended is None
    assert not list(tmp_path.iterdir())
    assert [row[3] for row in cells(out)] == ["state and data MB", "42.8", "47.5"]
    both = state_of(setup_of("mnist_mlp", changes)[0])
    splits = {"task_loss": 54_000, "adalfl": 60_000}  # of outer batches the task loss has none
    for method, state in (("task_loss", both.theta), ("adalfl", both)):
        scalars = 10 * 8 + 4 + 4  # the key of each seed, the learning rate, the number of the step
        num_bytes = bytes_of(state) + splits[method] * (28 * 28 + 4) + scalars
        assert figures[method]["arguments"] == num_bytes
        num_metrics = 4 if method == "adalfl" else 1
        metrics = num_metrics * 10 * SETTINGS["eval_every"] * 4
        pointers = 8 * (len(jax.tree.leaves(state)) + num_metrics)  # XLA keeps a table of the arrays
        assert 0 <= figures[method]["output"] - bytes_of(state) - metrics <= pointers
    ten, one = figures["task_loss"], measured("mnist_mlp", "task_loss", changes | {"num_seeds": 1})
    assert ten["arguments"] - one["arguments"] == 0.9 * bytes_of(both.theta) + 9 * 8
    assert ten["temporary"] > 2 * one["temporary"]
    assert ten["flops"] == pytest.approx(one["flops"], rel=0.01)


@pytest.mark.slow
def test_the_program_parses_its_flags_and_refuses_without_a_traceback():
    command = [sys.executable, "-m", "experiments.describe", "--config=configs/mnist_mlp.py", "--config.batch_size=0"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 1
    assert done.stderr.startswith("ConfigError: config.batch_size must be ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


CANNOT_BE = {
    "num_stepss=3": "ConfigError: unknown field of the configuration 'num_stepss'; did you mean 'num_steps'?",
    "inner.momentum=1.5": "ConfigError: config.inner.momentum must be a number in [0, 1); got 1.5",
    "task_loss=squared_error": "ConfigError: config.task_loss must be one of softmax_cross_entropy, ",
    "augmentation.flip=True": "ConfigError: config.augmentation.flip must be False for dataset 'mnist'",
    "batch_size=54001": "ConfigError: config.batch_size is 54001, and split 'train' of 'mnist' has only 54000",
    "batch_size=6001 outer.split=valid": (
        "ConfigError: config.batch_size is 6001, and split 'valid' of 'mnist' has only 6000"
    ),
    "learned_loss.start=nowhere": "ConfigError: config.learned_loss.start must be one of random, ",
    "dataset.name=mnits": "DatasetError: unknown dataset 'mnits'; did you mean 'mnist'?",
    "dataset.name=nosuch.npz": "DatasetError: there is no file nosuch.npz",
    "dataset.name=imagenet2012": "DatasetError: images of dataset 'imagenet2012' differ in size; set dataset.",
    "dataset.name=emnist/nosuch": "DatasetError: ",
}


@pytest.mark.parametrize("settings", CANNOT_BE)
def test_a_configuration_that_cannot_be_ends_in_a_line(settings, run):
    out, ended = run(*(f"--config.{setting}" for setting in settings.split()))
    assert ended.startswith(CANNOT_BE[settings])
    assert "\n" not in ended
    assert out == ""


def test_a_configuration_file_that_is_not_there_is_named(run):
    out, ended = run(config="nosuch")
    assert ended.startswith("ConfigError: the configuration cannot be loaded: ")
    assert "No such file or directory: " in ended
    assert "nosuch.py" in ended
    assert "get_config() that returns a ConfigDict" in ended
    assert "\n" not in ended
    assert out == ""


def test_a_file_that_is_no_configuration_is_told_what_one_is(run, tmp_path):
    (tmp_path / "mine.py").write_text("def get_config(): return {}")
    ended = run(config=tmp_path / "mine")[1]
    assert "no attribute 'lock'; it must be a file with a get_config() that returns a ConfigDict" in ended


def test_a_flag_that_cannot_be_is_refused(run):
    assert run("--nosuch=3") == ("", "Unknown command line flag 'nosuch' (--help shows the flags)")


def test_arguments_that_are_no_flags_are_refused(run, no_measure):
    out, ended = run("config.num_seeds=1")
    assert ended == "unexpected arguments ['config.num_seeds=1']; flags look like --NAME=VALUE"
    assert out == ""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("brings_valid", [False, True])
def test_a_validation_split_of_a_users_own_is_described_as_it_would_be_loaded(brings_valid, run, no_measure, tmp_path):
    inputs, targets = np.random.default_rng(0).random((60, 4)), np.arange(60) % 10
    valid = {"valid_inputs": inputs, "valid_targets": targets} if brings_valid else {}
    size = () if brings_valid else ("--config.dataset.valid_fraction=0.3",)
    np.savez(tmp_path / "mine.npz", inputs=inputs, targets=targets, **valid)
    dataset = f"--config.dataset.name={tmp_path / 'mine.npz'}"
    split = "--config.outer.split=valid" if brings_valid else "--config.outer.split=train"
    output, ended = run(dataset, *size, split, "--config.batch_size=10", config="default")
    assert ended is None
    assert f"{48 if brings_valid else 33} training examples of 4, 10 outputs" in output
