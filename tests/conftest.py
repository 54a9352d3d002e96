"""What the tests share: real inputs, and a way to start the scripts as a user does.

The real inputs are the directory that the environment variable TRANSFER_VGG16_INPUTS names. It
holds cifar10.npz (Keras's layout) and vgg16_notop.weights.h5. Tests that need it are skipped
without it.
"""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
TRANSFER = ROOT / "transfer_vgg16.py"
PREDICT = ROOT / "predict_saved.py"
ARTICLE = ROOT / "tests" / "article.py"


def run(*command, cwd, status=0, **environment):
    """Run a Python script with its arguments in `cwd`; return (stdout, stderr) as text."""
    env = os.environ | {"PYTHONIOENCODING": "utf-8"} | environment
    process = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, timeout=1800
    )
    encoding = env["PYTHONIOENCODING"]
    stdout, stderr = process.stdout.decode(encoding), process.stderr.decode(encoding)
    assert process.returncode == status, stdout + stderr
    return stdout, stderr


def read_history(directory):
    """Return history.csv as a list of dicts of floats, one for each epoch."""
    with (directory / "history.csv").open() as file:
        return [{key: float(row[key]) for key in row} for row in csv.DictReader(file)]


def read_result(stdout):
    """Return the [loss, accuracy] that a script printed."""
    return [float(x) for x in re.search(r"^\[(\S+), (\S+)\]$", stdout, re.MULTILINE).groups()]


def save_part(path, data, train, test):
    """Write the first `train` and `test` images of the arrays `data` to `path`; return `path`."""
    sizes = {"train": train, "test": test}
    part = {
        f"{axis}_{name}": data[f"{axis}_{name}"][:n] for name, n in sizes.items() for axis in "xy"
    }
    np.savez(path, **part)
    return path


@pytest.fixture(scope="session", autouse=True)
def plain_environment(tmp_path_factory):
    """Keep out the screen, the log level and Keras's cache of whoever starts the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND", "TF_CPP_MIN_LOG_LEVEL"):
            patch.delenv(name, raising=False)
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        yield


@pytest.fixture(scope="session")
def inputs():
    directory = os.environ.get("TRANSFER_VGG16_INPUTS")
    if not directory:
        pytest.skip("TRANSFER_VGG16_INPUTS names no directory with the real inputs")
    return Path(directory)


@pytest.fixture(scope="session")
def weights(inputs):
    return inputs / "vgg16_notop.weights.h5"


@pytest.fixture(scope="session")
def cifar10(inputs):
    with np.load(inputs / "cifar10.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def subset(cifar10, tmp_path_factory):
    """2,000 training and 500 test images."""
    return save_part(tmp_path_factory.mktemp("data") / "subset.npz", cifar10, 2000, 500)


@pytest.fixture(scope="session")
def handful(cifar10, tmp_path_factory):
    """200 training and 100 test images."""
    return save_part(tmp_path_factory.mktemp("data") / "handful.npz", cifar10, 200, 100)


@pytest.fixture(scope="session")
def finished(subset, weights, tmp_path_factory):
    """Three epochs on the subset: where they were written to, and what was printed."""
    directory = tmp_path_factory.mktemp("訓練 結果")
    arguments = ["--data", subset, "--weights", weights, "--epochs", 3]
    stdout, stderr = run(TRANSFER, *arguments, cwd=directory)
    assert stderr == ""
    return directory, stdout
