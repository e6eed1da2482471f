"""Predicts for rows of a file with a model of a finished run.

.venv/bin/python -m experiments.predict --workdir=runs/diabetes_mlp --inputs=rows.npz --outputs=predictions.npz

Where the configuration file of the run registers a model or a learned loss, give it too, as --config=FILE.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from absl import app, flags

from adalfl_jax.data import DatasetError
from adalfl_jax.data.files import read_arrays
from adalfl_jax.training import load_model
from experiments.launch import WORKDIR, parse_flags, told_in_a_line

INPUTS = flags.DEFINE_string("inputs", None, "File .npz with an array `inputs` [N, ...] in the units of the raw data.")
OUTPUTS = flags.DEFINE_string("outputs", None, "File .npz to make, with an array `outputs` [N, C].")
METHOD = flags.DEFINE_string("method", None, "A method of the run; may be left out where it has one alone.")
SEED = flags.DEFINE_integer("seed", None, "A seed of the run; by default the one with the best validation metric.")


def main(argv: list[str]) -> None:
    """Writes what the model predicts, and says of which method and seed it is."""
    del argv
    with told_in_a_line():
        for flag in (INPUTS, OUTPUTS):
            if not flag.value:
                raise DatasetError(f"--{flag.name} must name a file; got {flag.value!r}")
        source, target = (Path(flag.value or "").expanduser() for flag in (INPUTS, OUTPUTS))
        if target.exists():
            raise FileExistsError(f"{target} exists and stays as it is; name another file")
        if not target.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {target.parent} for {target.name}; make it first")
        inputs = read_inputs(source)
        trained = load_model(WORKDIR.value or "", METHOD.value, SEED.value)
        try:
            outputs = trained.predict(inputs)
        except DatasetError as error:
            raise DatasetError(f"{source}: {error}") from error
        with target.open("xb") as file:  # NumPy would add .npz to another name
            try:
                np.savez(file, outputs=outputs)
            except OSError:
                target.unlink()
                raise
        print(f"{target}: outputs {outputs.shape} of {trained.method}, seed {trained.seed}")


def read_inputs(path: Path) -> np.ndarray:
    """The array `inputs` of a file.

    Raises:
      DatasetError: it cannot be read, or has none.
    """
    arrays = read_arrays(path, ["inputs"])
    if not arrays:
        raise DatasetError(f"{path} must hold an array inputs, and has none of that name")
    return arrays["inputs"]


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "inputs", "outputs"])
    app.run(main, flags_parser=functools.partial(parse_flags, unused=("config.",)))
