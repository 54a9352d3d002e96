"""What the tests share: real inputs, and a way to start the scripts as a user does.

The real inputs are the directory that the environment variable TRANSFER_VGG16_INPUTS names. It
holds cifar10.npz (Keras's layout) and VGG16's weights without its top, one .h5 file. Tests that
need them are skipped without them.
"""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmark import save_part

ROOT = Path(__file__).resolve().parent.parent
TRANSFER = ROOT / "transfer_vgg16.py"
PREDICT = ROOT / "predict_saved.py"
ARTICLE = ROOT / "tests" / "article.py"
WRITTEN = {  # by a whole run
    "accuracy.png",
    "confusion_matrix.png",
    "history.csv",
    "loss.png",
    "predictions.png",
    "transfer_learning_vgg16_cifar10.png",
    "vgg16_cifar10.keras",
    "vgg16_features.npz",
}


def start(*command, cwd, limit=None, **environment):
    """Start a Python script with its arguments in `cwd`; return the process.

    With a `limit`, no file that it writes can grow beyond so many bytes.
    """

    def restrict():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=None if limit is None else restrict,
        encoding=environment.get("PYTHONIOENCODING", "utf-8"),
    )


def run(*command, status=0, **settings):
    """Run a Python script as `start` does, check its exit status; return (stdout, stderr)."""
    process = start(*command, **settings)
    stdout, stderr = process.communicate(timeout=1800)
    assert process.returncode == status, stdout + stderr
    return stdout, stderr


def read_history(directory):
    """Return history.csv as a list of dicts of floats, one for each epoch."""
    with (directory / "history.csv").open() as file:
        return [{key: float(row[key]) for key in row} for row in csv.DictReader(file)]


def read_figures(directory):
    """Return history.csv as an array (epochs, 4): accuracy, loss, val_accuracy, val_loss."""
    return np.array([list(row.values())[1:] for row in read_history(directory)])


def read_result(stdout):
    """Return the [loss, accuracy] that a script printed."""
    return [float(x) for x in re.search(r"^\[(\S+), (\S+)\]$", stdout, re.MULTILINE).groups()]


@pytest.fixture(scope="session", autouse=True)
def plain_environment(tmp_path_factory):
    """Keep out the screen, GPU, proxy, log level and Keras cache of whoever starts the tests."""
    hidden = ["DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND", "TF_CPP_MIN_LOG_LEVEL"]
    hidden += [name for name in os.environ if name.lower().endswith("_proxy")]
    with pytest.MonkeyPatch.context() as patch:
        for name in hidden:
            patch.delenv(name, raising=False)
        if sys.platform != "linux":  # where DISPLAY does not decide whether windows open
            patch.setenv("MPLBACKEND", "Agg")
        patch.setenv("CUDA_VISIBLE_DEVICES", "-1")
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
    return next(inputs.glob("*.h5"))


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
