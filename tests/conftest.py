"""What the tests share: images, weights, and ways to start the scripts as a user does.

Everything runs without a network and without the real images: the tests draw their own, and take
the weights from data/. The environment variable TRANSFER_VGG16_INPUTS may name a directory with
the real inputs: cifar10.npz (Keras's layout) and VGG16's weights without its top, one .h5 file.
They then take the place of the drawn ones; tests of the real accuracy are skipped without them.

Tests call main() in their own process. Those that need another one, or long, are marked `slow`.
What takes seconds to make and only to be looked at is made once, for all workers: see `shared`.
"""

import contextlib
import csv
import gc
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
from benchmark import save_part
from filelock import FileLock
from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).resolve().parent.parent
TRANSFER = ROOT / "transfer_vgg16.py"
PREDICT = ROOT / "predict_saved.py"
ARTICLE = ROOT / "tests" / "article.py"
sys.path.insert(0, str(ROOT))  # so that tests can import the scripts
WRITTEN = {  # by a whole run
    "accuracy.png",
    "confusion_matrix.png",
    "history.csv",
    "loss.png",
    "mistakes.png",
    "predictions.png",
    "transfer_learning_vgg16_cifar10.png",
    "transfer_learning_vgg16_cifar10_blocks.png",
    "block5_pool.features",
    "vgg16_cifar10.keras",
}
needs_posix = pytest.mark.skipif(
    os.name == "nt", reason="Windows has no such signals, limits or messages"
)


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr == "not slow":
        line = 'The slow tests were left out: python -m pytest -m "" runs all of them'
        terminalreporter.write_line(line)


# ----- starting the scripts


def start(*command, cwd, limit=None, **environment):
    """Start a Python script with its arguments in `cwd`; return the process.

    With a `limit`, no file that it writes can grow beyond so many bytes.
    """

    def restrict():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    own = {"PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    outer = {name: os.environ[name] for name in os.environ.keys() - {"TF_CPP_MIN_LOG_LEVEL"}}
    environment = outer | own | environment  # that one, `call` has set
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=None if limit is None else restrict,
        encoding=environment["PYTHONIOENCODING"],
    )


def run(*command, status=0, **settings):
    """Run a Python script as `start` does, check its exit status; return (stdout, stderr)."""
    process = start(*command, **settings)
    stdout, stderr = process.communicate(timeout=1800)
    assert process.returncode == status, stdout + stderr
    return stdout, stderr


def run_program(text, *arguments, cwd, **settings):
    """Run the Python program `text`, which can import the scripts, as `run` does."""
    program = cwd / "program.py"
    program.write_text(textwrap.dedent(text), encoding="utf-8")
    return run(program, *arguments, cwd=cwd, **settings)


def call(script, *arguments, cwd, status=0, encoding="utf-8"):
    """Call a script's main() here, as a notebook does; check and return what `run` does.

    It saves the seconds in which TensorFlow is imported. What it prints goes through `encoding`.
    """
    module = importlib.import_module(script.stem)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding, newline="\n")
    stderr = io.TextIOWrapper(io.BytesIO(), encoding, "backslashreplace", newline="\n")
    before = Path.cwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            result = module.main([str(argument) for argument in arguments])
    finally:
        os.chdir(before)
        gc.collect()  # a model refers to itself
        texts = []
        for stream in (stdout, stderr):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode(encoding))
    assert (result or 0) == status, "".join(texts)
    return tuple(texts)


# ----- reading what they said


def list_written(directory):
    """Return the names of the files in `directory`; stored outputs without the digest in it."""
    digest = r"-[0-9a-f]{12}(?=\.features$)"
    return {re.sub(digest, "", path.name) for path in directory.iterdir()}


def copy_features(source, directory):
    """Copy the stored outputs of frozen layers, which take the longest to make."""
    for path in source.glob("*.features"):
        shutil.copy(path, directory)


DEMO_ENDS = r"This was the demo, on drawings, not CIFAR-10\. Its model is in .+\s*\Z"


def check_error(stderr, sentence):
    """Check that `stderr` is one line, which begins as the regular expression says."""
    assert "Traceback" not in stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert re.fullmatch(rf"error: {sentence}", stderr.strip()), stderr


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


# ----- inputs


def draw_data(train, test, classes=10):
    """Return arrays in Keras's layout, in which each class is a pattern of its own under noise."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 256, (classes, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    data = {}
    for name, count in (("train", train), ("test", test)):
        labels = random.integers(0, classes, (count, 1), np.uint8)
        noise = random.normal(0, 60, (count, 32, 32, 3))
        data[f"x_{name}"] = (patterns[labels[:, 0]] + noise).clip(0, 255).astype(np.uint8)
        data[f"y_{name}"] = labels
    return data


def write_data(path, **changes):
    """Write small arrays in Keras's layout to `path`, with `changes`; return `path`."""
    data = draw_data(20, 10) | changes
    np.savez(path, **{name: array for name, array in data.items() if array is not None})
    return path


def make_model(size=32):
    """Return an untrained model of the article's form for images of `size` by `size` pixels."""
    import keras  # here, as the process that hands out the tests does without TensorFlow

    base = keras.applications.VGG16(include_top=False, weights=None, input_shape=(size, size, 3))
    base.trainable = False
    x = keras.layers.Flatten()(base.output)
    model = keras.Model(base.input, keras.layers.Dense(10, activation="softmax")(x))
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def save_model(path):
    """Save such a model, as the article's own code does, to `path`; return `path`."""
    make_model().save(path)
    return path


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
        importlib.import_module("transfer_vgg16")
        gc.freeze()  # so that call() does not look for garbage in what was imported
        yield


@pytest.fixture
def no_network(monkeypatch):
    """Send every request to a port at which nothing listens."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")


@pytest.fixture(autouse=True)
def quick_drawing(request, monkeypatch):
    """Draw blank figures, except for tests that are marked `pictures`."""
    if not request.node.get_closest_marker("pictures"):
        draw_blank(monkeypatch)


def draw_blank(patch):
    """Let figures be blank, which takes no time, as long as the MonkeyPatch `patch` is in use."""
    import keras
    from matplotlib.figure import Figure

    def save_blank(figure, path, metadata=None):
        texts = PngInfo()
        for name, text in (metadata or {}).items():
            texts.add_text(name, text)
        Image.new("L", (1, 1)).save(path, "PNG", pnginfo=texts)

    buffer = io.BytesIO()
    save_blank(None, buffer)
    graph = types.SimpleNamespace(create_png=lambda prog: buffer.getvalue())
    patch.setattr(Figure, "savefig", save_blank)
    patch.setattr(keras.utils, "model_to_dot", lambda model, show_shapes: graph)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Return a function that makes a directory once, for all workers.

    shared(name, make) returns the directory `name`, and the text that make(directory), which
    fills it, returned. No test may write into it.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each worker has a directory of its own in it

    def make_once(name, make):
        directory, text = base / name, base / f"{name}.txt"
        with FileLock(base / f"{name}.lock"):
            if not text.exists():
                shutil.rmtree(directory, ignore_errors=True)  # of an attempt that failed
                directory.mkdir()
                text.write_text(make(directory), encoding="utf-8")
        return directory, text.read_text(encoding="utf-8")

    return make_once


@pytest.fixture(scope="session")
def inputs():
    directory = os.environ.get("TRANSFER_VGG16_INPUTS")
    return Path(directory) if directory else None


@pytest.fixture(scope="session")
def weights(inputs):
    if inputs:
        return next(inputs.glob("*.h5"))
    return ROOT / "data" / "vgg16_notop_float16.weights.h5"


@pytest.fixture(scope="session")
def cifar10(inputs):
    if not inputs:
        pytest.skip("TRANSFER_VGG16_INPUTS names no directory with the real images")
    with np.load(inputs / "cifar10.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def images(request, inputs):
    """2,000 training and 500 test images or more, as arrays: CIFAR-10's, else drawn ones."""
    return request.getfixturevalue("cifar10") if inputs else draw_data(2000, 500)


@pytest.fixture(scope="session")
def subset(images, tmp_path_factory):
    """250 training and 50 test images."""
    return save_part(tmp_path_factory.mktemp("data") / "subset.npz", images, 250, 50)


@pytest.fixture(scope="session")
def handful(images, tmp_path_factory):
    """200 training and 100 test images."""
    return save_part(tmp_path_factory.mktemp("data") / "handful.npz", images, 200, 100)


@pytest.fixture(scope="session")
def few(images, tmp_path_factory):
    """40 training and 20 test images: enough where it does not matter how much is learned."""
    return save_part(tmp_path_factory.mktemp("data") / "few.npz", images, 40, 20)


# ----- whole runs


@pytest.fixture(scope="session")
def finished(subset, weights, shared):
    """Three epochs on the subset, in a process of its own: where they were written, what printed.

    Its figures are whole, as a user gets them.
    """
    arguments = ["--data", subset, "--weights", weights, "--epochs", 3]

    def make(directory):
        stdout, stderr = run(TRANSFER, *arguments, cwd=directory)
        assert stderr == ""
        return stdout

    return shared("訓練 結果", make)


@pytest.fixture(scope="session")
def demo(shared):
    """A run of the demo without a network: where it was started, what it printed."""

    def make(directory):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("https_proxy", "http://127.0.0.1:9")
            stdout, stderr = call(TRANSFER, "--demo", cwd=directory)
        assert stderr == ""
        return stdout

    return shared("first steps", make)
