"""A first run cannot hang, fail without a reason, or leave a broken file."""

import functools
import hashlib
import http.server
import io
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sys
import tarfile
import threading
import time
import zipfile

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from benchmark import save_part
from conftest import (
    ARTICLE,
    DEMO_ENDS,
    PREDICT,
    ROOT,
    TRANSFER,
    WRITTEN,
    call,
    check_error,
    copy_features,
    draw_data,
    list_written,
    make_model,
    needs_posix,
    read_history,
    run,
    run_program,
    save_model,
    start,
    write_data,
)
from PIL import Image

import predict_saved
import transfer_vgg16

# ----- without a network


def check_demo(directory):
    """Check that a whole demo, which learned something, is all there is in `directory`."""
    assert [path.name for path in directory.iterdir()] == ["demo"]
    assert list_written(directory / "demo") == WRITTEN
    history = read_history(directory / "demo")
    assert len(history) == 10
    assert history[-1]["accuracy"] > 0.5
    assert history[-1]["val_accuracy"] > 0.2


def test_no_network_runs_the_demo(no_network, demo, tmp_path):
    """A newcomer sees the reasons, the ways on, and the whole job; nothing is a dead end."""
    (tmp_path / "demo").mkdir()
    copy_features(demo[0] / "demo", tmp_path / "demo")
    stdout, stderr = call(TRANSFER, cwd=tmp_path)
    assert stderr == ""
    check_demo(tmp_path)
    before, after = stdout.split("Running the demo instead:\n")
    assert len(re.findall("^download from https://.+ failed \\(.+$", before, re.M)) == 3
    *_, last = after.splitlines()
    assert re.fullmatch(DEMO_ENDS, last)
    for way in ("docs/classroom.md", "--data", "--weights", ".keras", "--demo"):
        assert way in before


def test_no_network_for_the_companion(no_network, tmp_path):
    save_model(tmp_path / "vgg16_cifar10.keras")
    begin = time.monotonic()
    _, stderr = call(PREDICT, cwd=tmp_path, status=2)
    assert time.monotonic() - begin < 30
    check_error(stderr, r"CIFAR-10 could not be downloaded.+")
    for way in ("--data", "docs/classroom.md"):
        assert way in stderr


def test_no_network_for_the_weights(no_network, few, tmp_path):
    """The copy in data/ is used instead, and a line says so."""
    arguments = ["--data", few, "--epochs", 1]
    stdout, stderr = call(TRANSFER, *arguments, cwd=tmp_path)
    assert stderr == ""
    assert re.search(
        rf"^VGG16's weights could not be downloaded \(.+\): the copy in {ROOT / 'data'}, "
        "rounded to 16 bits, is used instead$",
        stdout,
        re.M,
    )
    copy = ROOT / "data" / "vgg16_notop_float16.weights.h5"
    base = keras.applications.VGG16(include_top=False, weights=str(copy), input_shape=(32, 32, 3))
    model = keras.models.load_model(tmp_path / "vgg16_cifar10.keras")
    for ours, theirs in zip(model.get_weights()[:26], base.get_weights(), strict=True):
        assert np.array_equal(ours, theirs)


NO_WEIGHTS = r"VGG16's weights could not be downloaded \(.+\): give --weights a local file, .+"


@pytest.mark.parametrize("arguments", [["--data", "data.npz"], ["--demo"]])
def test_no_network_and_no_copy_of_the_weights(arguments, no_network, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer_vgg16, "WEIGHTS_COPY", tmp_path / "missing.h5")
    write_data(tmp_path / "data.npz")
    _, stderr = call(TRANSFER, *arguments, cwd=tmp_path, status=2)
    check_error(stderr, NO_WEIGHTS)


@pytest.mark.slow
def test_no_network_for_the_script_alone(no_network, tmp_path):
    """Copied away, it has nowhere to take the weights from."""
    place = tmp_path / "place"
    place.mkdir()
    script = shutil.copy(TRANSFER, place)
    write_data(tmp_path / "data.npz")
    _, stderr = run(script, "--data", "data.npz", cwd=tmp_path, status=2)
    check_error(stderr, NO_WEIGHTS)


def test_demo(demo):
    directory, stdout = demo
    check_demo(directory)
    assert re.search(DEMO_ENDS, stdout)
    assert "could not be downloaded" not in stdout


# ----- a network with bad hosts


class Host(http.server.BaseHTTPRequestHandler):
    """Serve /missing, /wrong, /stall and /good; keep what was asked for."""

    asked = []
    archive = b""

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/missing":
            self.send_error(404)
            return
        content = self.archive if self.path == "/good" else b"wrong bytes" * 100
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.path == "/stall":
            self.wfile.write(content[:100])
            self.wfile.flush()
            time.sleep(10)
        else:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def make_archive(data):
    """Return the arrays `data` as the bytes of an archive in CIFAR-10's Python format."""
    buffer = io.BytesIO()
    batches = [(f"data_batch_{i + 1}", "train", i * 10000) for i in range(5)]
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, split, begin in [*batches, ("test_batch", "test", 0)]:
            x, y = data[f"x_{split}"], data[f"y_{split}"]
            images = x[begin : begin + 10000].transpose(0, 3, 1, 2).reshape(10000, -1)
            labels = y[begin : begin + 10000, 0].tolist()
            content = pickle.dumps({b"data": images, b"labels": labels})
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.slow
def test_bad_hosts_are_left_for_the_next(tmp_path):
    """Only the hosts' addresses, the hash that is asked for, and the patience are replaced."""
    data = draw_data(1, 1)
    for name, count in (("train", 50000), ("test", 10000)):
        labels = np.random.default_rng(count).integers(0, 10, (count, 1))
        data[f"y_{name}"] = labels.astype(np.uint8)
        images = np.zeros((count, 32, 32, 3), np.uint8)  # whose corners tell them apart
        images[:, 0, 0] = np.arange(count)[:, None] // [1, 256, 65536] % 256
        images[:, 31, 0, 2] = labels[:, 0]
        data[f"x_{name}"] = images
    np.savez_compressed(tmp_path / "data.npz", **data)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{closed.getsockname()[1]}/refused"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    Host.archive = make_archive(data)
    Host.asked.clear()
    urls = [refusing, *(f"{address}/{name}" for name in ("missing", "wrong", "stall", "good"))]

    program = f"""
        import transfer_vgg16
        import numpy as np
        from keras.src.datasets import cifar10
        transfer_vgg16.TIMEOUT = 3
        sha256 = {hashlib.sha256(Host.archive).hexdigest()!r}
        keras_get_file = cifar10.get_file
        def get_file(**arguments):
            arguments |= {{"file_hash": sha256, "origin": "{address}/load_data"}}
            return keras_get_file(**arguments)
        cifar10.get_file = get_file
        transfer_vgg16.CIFAR10_URLS = {urls!r}
        transfer_vgg16.CIFAR10_SHA256 = sha256

        assert transfer_vgg16.download_cifar10()
        (x_train, y_train), (x_test, y_test) = transfer_vgg16.cifar10.load_data()
        with np.load("data.npz") as file:
            for name, array in file.items():
                assert np.array_equal(array, locals()[name]), name
        print("all arrays are the same")
    """
    home = str(tmp_path / "home")
    stdout, stderr = run_program(program, cwd=tmp_path, KERAS_HOME=home)
    assert stderr == ""
    assert Host.asked == ["/missing", "/wrong", "/stall", "/good"]
    for url in urls[:-1]:
        assert re.search(f"^download from {url} failed \\(.", stdout, re.M)
    assert f"download from {address}/stall failed (no answer in 3 seconds)\n" in stdout
    assert stdout.endswith("all arrays are the same\n")

    Host.asked.clear()
    stdout, _ = run_program(program, cwd=tmp_path, KERAS_HOME=home)
    assert Host.asked == []
    assert stdout == "all arrays are the same\n"
    server.shutdown()


# ----- bad input


def save_weights(path):
    """Save random weights of VGG16 without its top to `path`; return `path`."""
    keras.applications.VGG16(include_top=False, weights=None).save_weights(path)
    return path


NO_RATE = r"is not a number from 1e-12 to 1e\+38"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--epochs", "0"], "argument --epochs: '0' is not a whole number from 1 to"),
        (["--epochs", "-3"], "argument --epochs: '-3' is not a whole number from 1 to"),
        (["--epochs", "1.5"], "argument --epochs: '1.5' is not a whole number from 1 to"),
        (["--epochs", "nan"], "argument --epochs: 'nan' is not a whole number from 1 to"),
        (["--batch-size", "0"], "argument --batch-size: '0' is not a whole number from 1 to"),
        (["--batch-size", "9" * 20], "argument --batch-size: '9{20}' is not a whole number from"),
        (["--batch-size", "x"], "argument --batch-size: 'x' is not a whole number from 1 to"),
        (
            ["--learning-rate", "0"],
            r"argument --learning-rate: '0' is not a number from 1e-12 to 1e\+38",
        ),
        (
            ["--learning-rate", "-1"],
            "argument --learning-rate: '-1' is not a number from 1e-12 to 1e",
        ),
        (
            ["--learning-rate", "nan"],
            "argument --learning-rate: 'nan' is not a number from 1e-12 to 1e",
        ),
        (
            ["--learning-rate", "inf"],
            "argument --learning-rate: 'inf' is not a number from 1e-12 to 1e",
        ),
        (
            ["--learning-rate", "x"],
            "argument --learning-rate: 'x' is not a number from 1e-12 to 1e",
        ),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number from 0 to 4294967295"),
        (["--precision", "x"], "argument --precision: invalid choice: 'x'"),
        (["--augment"], "unrecognized arguments: --augment"),
        (["a" * 300], "unrecognized arguments: a{300}"),
        (["--demo", "--data", "x.npz"], "--demo has images of its own: leave out --data"),
        (["--data", ""], "argument --data: '' is not a valid path: "),
        (["--data", "a" * 300], "argument --data: 'a{300}' cannot be opened"),
        (["--data", '"'], "argument --data: '.*' is not a valid path: "),
        (["--output-dir", ""], "argument --output-dir: '' is not a valid path: "),
        (
            ["--data", 'C:\\p" --epochs 1'],
            "argument --data: .+ is not a valid path: .+ remove the backslash",
        ),
    ],
)
def test_bad_argument(arguments, sentence, tmp_path):
    stdout, stderr = call(TRANSFER, *arguments, cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(stderr, rf"{sentence}.*")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_bad_argument_in_a_process_of_its_own(tmp_path):
    stdout, stderr = run(TRANSFER, "--epochs", 0, cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(stderr, "argument --epochs: '0' is not a whole number from 1 to .+")


@needs_posix
@pytest.mark.parametrize(
    ("directory", "reason"),
    [("file", "File exists"), ("file/x", "Not a directory"), ("/proc", ".+")],
)
def test_output_directory_that_cannot_be_written(directory, reason, tmp_path):
    (tmp_path / "file").touch()
    stdout, stderr = call(TRANSFER, "--output-dir", directory, cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(stderr, rf"nothing can be written into {directory} \({reason}\): choose another.+")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def write_nothing(path):
    pass


def write_text(path):
    path.write_text("x_train,y_train\n")


def write_empty(path):
    path.touch()


def write_truncated(path):
    write_data(path)
    path.write_bytes(path.read_bytes()[:-200])


def write_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __reduce__(self):
        return exec, ("open('exploded', 'w')",)


def write_pickle(path):
    path.write_bytes(pickle.dumps(Bomb()))


def write_zip_of_photos(path):
    image = io.BytesIO()
    Image.new("RGB", (32, 32)).save(image, "PNG")
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("cat/1.png", "dog/1.png"):
            archive.writestr(name, image.getvalue())


def change(**changes):
    return functools.partial(write_data, **changes)


IMAGES, LABELS = np.zeros((20, 32, 32, 3), np.uint8), np.zeros((20, 1), np.uint8)
OBJECTS = np.array([Bomb()], dtype=object)
DAMAGED = "data.npz is not an .npz file of plain arrays, or is damaged: make one with numpy.savez"
MUST_BE = r"they must be uint8 \(n, 32, 32, 3\) and whole numbers 0-9 \(n, 1\), n "
BAD_DATA = [
    (write_nothing, "data.npz does not exist: give --data the path of an .npz file, or of a dir"),
    (write_text, DAMAGED),
    (write_empty, DAMAGED),
    (write_truncated, DAMAGED),
    (write_array, DAMAGED),
    (write_pickle, DAMAGED),
    (write_zip_of_photos, "data.npz lacks x_test, .+: name .+, unpack it and give its directory"),
    (change(y_train=OBJECTS), DAMAGED),
    (change(y_test=None), "data.npz lacks y_test: name its arrays as Keras does"),
    (change(x_train=IMAGES[:, :28, :28]), r"data.npz: x_train is uint8\(20, 28, 28, 3\) and y_"),
    (change(x_train=IMAGES[..., 0]), r"data.npz: x_train is uint8\(20, 32, 32\) and y_train"),
    (change(x_train=IMAGES / 255), r"data.npz: x_train is float64\(20, 32, 32, 3\) and y_"),
    (change(y_train=LABELS + 0.5), r"data.npz: .+ and y_train float64\(20, 1\); " + MUST_BE),
    (change(y_train=np.eye(20)[:, :10]), r"data.npz: .+ and y_train float64\(20, 10\); they"),
    (change(y_train=LABELS[:19]), r"data.npz: .+\(20, 32, 32, 3\) and y_train uint8\(19, 1\)"),
    (change(y_train=LABELS + 10), r"data.npz: .+ and y_train uint8\(20, 1\); " + MUST_BE),
    (change(y_test=LABELS[:10] - np.int8(1)), r"data.npz: .+ and y_test .+; " + MUST_BE),
    (
        change(x_test=IMAGES[:0], y_test=LABELS[:0]),
        rf"data.npz: x_test is uint8\(0, 32, 32, 3\) and .+; {MUST_BE}1 or more",
    ),
    (
        change(x_train=IMAGES[:4], y_train=LABELS[:4]),
        rf"data.npz: x_train is uint8\(4, 32, 32, 3\) and .+; {MUST_BE}5 or more",
    ),
]


def check_bad_data(start, write, sentence, directory):
    write(directory / "data.npz")
    arguments = ["--data", "data.npz", "--weights", "unused.h5", "--output-dir", "out"]
    stdout, stderr = start(TRANSFER, *arguments, cwd=directory, status=2)
    assert "Total params" not in stdout
    check_error(stderr, rf"{sentence}.*")
    assert list((directory / "out").iterdir()) == []
    assert not (directory / "exploded").exists()


@pytest.mark.parametrize(("write", "sentence"), BAD_DATA)
def test_bad_data(write, sentence, tmp_path):
    check_bad_data(call, write, sentence, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("write", "sentence"), [BAD_DATA[0], BAD_DATA[5]])
def test_bad_data_in_a_process_of_its_own(write, sentence, tmp_path):
    check_bad_data(run, write, sentence, tmp_path)


def test_labels_may_be_flat(weights, tmp_path):
    data = write_data(tmp_path / "data.npz", y_train=LABELS[:, 0], y_test=LABELS[:10, 0])
    stdout, _ = call(TRANSFER, "--data", data, "--weights", weights, "--epochs", 1, cwd=tmp_path)
    assert "正解: [0]\n" in stdout


def test_reader_that_hangs_up(monkeypatch):
    """Such as `| true`: what a stream kept back is refused only at the end."""

    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert transfer_vgg16.guarded(lambda argv: 0)() == 141


def write_truncated_weights(path):
    save_weights(path)
    path.write_bytes(path.read_bytes()[:1_000_000])


def write_other_weights(path):
    keras.applications.MobileNet(include_top=False, weights=None).save_weights(path)


def write_vgg19_weights(path):
    keras.applications.VGG19(include_top=False, weights=None).save_weights(path)


def write_empty_h5(path):
    h5py.File(path, "w").close()


NOT_THOSE = r"does not hold the weights of VGG16 without its top \(.+\): "
NOT_THOSE += "give --weights another .h5 file, or .+"


@pytest.mark.parametrize("name", ["vgg16.weights.h5", "vgg16.h5"])
@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (write_nothing, "does not exist: give --weights the path of an .h5 file"),
        (write_text, NOT_THOSE),
        (write_empty, NOT_THOSE),
        (write_empty_h5, NOT_THOSE),
        (write_truncated_weights, NOT_THOSE),
        (write_other_weights, NOT_THOSE),
        (write_vgg19_weights, NOT_THOSE),
    ],
)
def test_bad_weights(write, sentence, name, tmp_path):
    original = tmp_path / "original.weights.h5"
    write(original)
    if original.exists():
        original.rename(tmp_path / name)
    data = write_data(tmp_path / "data.npz")
    arguments = ["--data", data, "--weights", name, "--output-dir", "out"]
    stdout, stderr = call(TRANSFER, *arguments, cwd=tmp_path, status=2)
    assert "Total params" not in stdout
    check_error(stderr, rf"{name} {sentence}")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("flags", [["--epochs", 3], ["--epochs", 1, "--batch-size", 100000]])
def test_diverging_training(flags, weights, tmp_path):
    """Also where the last update is the bad one, so that only val_loss tells."""
    data = write_data(tmp_path / "data.npz")
    arguments = ["--data", data, "--weights", weights, "--learning-rate", "1e30"]
    _, stderr = call(TRANSFER, *arguments, *flags, cwd=tmp_path, status=2)
    check_error(stderr, r"the loss became infinite or NaN in epoch \d: lower --learning-rate")
    assert (tmp_path / "loss.png").exists()


def truncate_model(path):
    save_model(path)
    path.write_bytes(path.read_bytes()[:-1000])


def save_other_model(path):
    model = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Flatten()])
    model.save(path)


def save_own_network(path):
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten()])
    model.add(keras.layers.Dense(10, activation="softmax"))
    model.compile("sgd", "categorical_crossentropy", metrics=["accuracy"])
    model.save(path)


def save_model_with_code(path):
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Lambda(lambda x: x)])
    model.save(path)


def make_directory(path):
    path.mkdir()
    save_model(path / "vgg16_cifar10.keras")


def save_ten_classes_again(path):
    """Save a model of photos with Keras, which leaves out the names of its classes."""
    model = make_model(48)
    names = [f"photos of {i}" for i in range(10)]
    transfer_vgg16.save_model(model, {"class_names": names}, path)
    assert predict_saved.read_notes(path)["class_names"] == names
    keras.models.load_model(path).save(path)
    assert predict_saved.read_notes(path)["class_names"] is None


def save_as_another_keras(path):
    """Save a model whose version and layers this Keras does not know."""
    save_model(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["metadata.json"] = b'{"keras_version": "99.1.2", "date_saved": "2031-01-01"}'
    members["config.json"] = members["config.json"].replace(b'"Functional"', b'"Dysfunctional"')
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


OTHER_VERSION = f"was saved by Keras 99.1.2, and Keras {keras.__version__} cannot load it"
BAD_MODELS = [
    (write_nothing, "does not exist: run transfer_vgg16.py first"),
    (write_text, "is not a model that transfer_vgg16.py saved, or it is damaged"),
    (write_empty, "is not a model that transfer_vgg16.py saved, or it is damaged"),
    (truncate_model, "is not a model that transfer_vgg16.py saved, or it is damaged"),
    (save_model_with_code, "is not a model that transfer_vgg16.py saved, or it is damaged"),
    (save_other_model, "is not a model that transfer_vgg16.py saved: give --model the path"),
    (save_own_network, "is not a model that transfer_vgg16.py saved: give --model the path"),
    (make_directory, "is a directory: give --model the .keras file in it"),
    (save_ten_classes_again, "does not have the names of its classes, which are lost if a"),
    (save_as_another_keras, OTHER_VERSION),
]


@pytest.mark.parametrize(("write", "sentence"), BAD_MODELS)
def test_bad_model(write, sentence, tmp_path):
    write(tmp_path / "model.keras")
    data = write_data(tmp_path / "data.npz")
    arguments = ["--model", "model.keras", "--data", data]
    stdout, stderr = call(PREDICT, *arguments, cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(stderr, rf"model.keras {sentence}.*")


@pytest.mark.slow
def test_bad_model_in_a_process_of_its_own(tmp_path):
    truncate_model(tmp_path / "model.keras")
    stdout, stderr = run(PREDICT, "--model", "model.keras", cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(stderr, "model.keras is not a model that transfer_vgg16.py saved, or it is .+")


def test_model_of_the_article_needs_no_class_names(tmp_path):
    """That it has none is said; with photos of ten classes, it could be another's."""
    save_model(tmp_path / "vgg16_cifar10.keras")
    data = write_data(tmp_path / "data.npz", y_test=LABELS[:10])
    stdout, stderr = call(PREDICT, "--data", data, cwd=tmp_path)
    assert stderr == ""
    assert stdout.startswith("vgg16_cifar10.keras names no classes: they are taken to be CIFAR-10")
    assert stdout.endswith(", 正解: 飛行機 (airplane)\n")


@pytest.mark.parametrize(
    "class_names",
    [
        [f"日本語のとても長いクラスの名前、番号は{i:04}です" * 5 for i in range(1000)],
        ["caf\udce9", "\udc83\udc5c", "𓀀𓁐", '"quoted", [one]'],
    ],
    ids=["a thousand", "cannot be encoded"],
)
def test_class_names_travel_with_the_model(class_names, tmp_path):
    """As many as there are, of whatever characters."""
    path = tmp_path / "model.keras"
    model = make_model()
    notes = {"class_names": class_names, "mirror": True, "temperature": 2.5}
    notes |= {"test": {"accuracy": 0.5, "images": 10}}
    transfer_vgg16.save_model(model, notes, path)
    assert predict_saved.read_notes(path) == notes
    images = np.zeros((1, 32, 32, 3))
    again = keras.models.load_model(path)
    assert np.array_equal(again.predict(images, verbose=0), model.predict(images, verbose=0))
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]


# ----- files that cannot be written, kills and Ctrl-C


def snapshot(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.slow
@needs_posix
@pytest.mark.parametrize(
    ("limit", "change", "name"),
    [
        (
            500_000,
            ["--precision", "mixed_bfloat16", "--image-size", 64],
            "block5_pool-.+.features",
        ),
        (10_000_000, ["--learning-rate", "1e-5"], "vgg16_cifar10.keras"),
    ],
)
def test_full_disk_leaves_the_former_files(limit, change, name, handful, weights, tmp_path):
    out = tmp_path / "out"
    arguments = ["--data", handful, "--weights", weights, "--epochs", 2, "--output-dir", out]
    call(TRANSFER, *arguments, cwd=tmp_path)
    before = snapshot(out)
    redrawn = [name for name in before if name.startswith("transfer_learning")]
    _, stderr = run(TRANSFER, *arguments, *change, cwd=tmp_path, status=2, limit=limit)
    check_error(stderr, rf"{out}/{name} could not be written \(File too large\): free some .+")
    assert snapshot(out) | {name: b"" for name in redrawn} == before | {
        name: b"" for name in redrawn
    }


ORNAMENTS = ["accuracy.png", "confusion_matrix.png", "history.csv", "loss.png", "mistakes.png"]
ORNAMENTS += ["predictions.png"]
ORNAMENTS += ["transfer_learning_vgg16_cifar10.png"]


@needs_posix
def test_run_goes_on_without_what_cannot_be_written(few, weights, tmp_path):
    """Each figure, and the CSV file, is in the way of a directory."""
    for name in ORNAMENTS:
        (tmp_path / name).mkdir()
    arguments = ["--data", few, "--weights", weights, "--epochs", 1]
    stdout, stderr = call(TRANSFER, *arguments, cwd=tmp_path)
    assert stderr == ""
    lines = re.findall(r"^(\S+) could not be written \(Is a directory\): free .+$", stdout, re.M)
    assert sorted(lines) == ORNAMENTS
    results = stdout.index("予測: ")
    assert all(stdout.index(f"\n{name} could") > results for name in ORNAMENTS[:-1])
    assert list_written(tmp_path) == WRITTEN
    keras.models.load_model(tmp_path / "vgg16_cifar10.keras")


@needs_posix
@pytest.mark.parametrize(
    "what", ["vgg16_cifar10.keras", pytest.param("*.features", marks=pytest.mark.slow)]
)
def test_run_ends_without_what_it_needs(what, few, weights, tmp_path):
    """A directory is in the way."""
    arguments = ["--data", few, "--weights", weights, "--epochs", 1]
    call(TRANSFER, *arguments, cwd=tmp_path)
    path = sorted(tmp_path.glob(what))[0]
    path.unlink()
    path.mkdir()
    _, stderr = call(TRANSFER, *arguments, cwd=tmp_path, status=2)
    check_error(stderr, rf"{path.name} could not be written \(Is a directory\): free some .+")
    assert not list(tmp_path.glob("part-*"))


@pytest.fixture
def lock(monkeypatch):
    """Let the system refuse the next `count` calls of a Path's method, as Windows may."""

    def refuse(method, count):
        original = getattr(transfer_vgg16.Path, method)

        def locked(self, *arguments, **settings):
            nonlocal count
            count -= 1
            if count >= 0:
                raise PermissionError(13, "Permission denied")
            return original(self, *arguments, **settings)

        monkeypatch.setattr(transfer_vgg16.Path, method, locked)

    return refuse


def test_locked_file_is_tried_again(lock, tmp_path, capsys):
    lock("replace", 2)
    transfer_vgg16.write_whole(tmp_path / "a.csv", lambda part: part.write_text("new"))
    assert (tmp_path / "a.csv").read_text() == "new"
    assert capsys.readouterr().out == ""


def test_file_that_stays_locked(lock, tmp_path, capsys):
    """Even the unfinished one cannot be deleted: there is nothing but the sentence."""
    lock("replace", 100)
    lock("unlink", 100)
    sentence = r"a\.csv could not be written \(Permission denied\): .+close programs that use .+"
    (tmp_path / "a.csv").write_text("old")
    transfer_vgg16.write_whole(tmp_path / "a.csv", lambda part: part.write_text("new"))
    path = re.escape(f"{tmp_path}{os.sep}")
    assert re.fullmatch(rf"{path}{sentence}\n", capsys.readouterr().out)
    with pytest.raises(transfer_vgg16.Failure, match=sentence):
        transfer_vgg16.write_whole(tmp_path / "a.csv", lambda part: part.touch(), needed=True)
    assert (tmp_path / "a.csv").read_text() == "old"


@pytest.mark.slow
def test_two_runs_in_one_directory(handful, weights, tmp_path):
    """They start together, write the same files, and both end well with the same numbers."""
    arguments = ["--data", handful, "--weights", weights, "--epochs", 5]
    runs = [start(TRANSFER, *arguments, cwd=tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=600) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], outputs
    assert [stderr for _, stderr in outputs] == ["", ""]
    results = [re.findall(r"val_loss: \S+|^\[.+\]$", stdout, re.M) for stdout, _ in outputs]
    assert results[0] == results[1]
    assert len(results[0]) == 6
    assert list_written(tmp_path) == WRITTEN
    keras.models.load_model(tmp_path / "vgg16_cifar10.keras")


def kill_at_random(script, arguments, directory):
    """Kill a training within a second of its first checkpoint; return whether that is whole."""
    path = directory / "vgg16_cifar10.keras"

    def version():
        return path.stat().st_mtime_ns if path.exists() else None

    before = version()
    process = start(script, *arguments, cwd=directory)
    while version() == before and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    try:
        model = keras.models.load_model(path)
    except Exception:
        return False
    images, labels = np.zeros((8, 32, 32, 3), np.uint8), np.zeros((8, 1))
    return bool(np.isfinite(model.evaluate(images, labels, verbose=0)[0]))


@pytest.mark.slow
@needs_posix
def test_kills_leave_a_whole_model(few, weights, tmp_path):
    arguments = ["--data", few, "--weights", weights, "--epochs", 10000]
    arguments += ["--learning-rate", "1e-6"]
    whole = [kill_at_random(TRANSFER, arguments, tmp_path) for _ in range(9)]
    assert whole == [True] * 9
    assert len(list(tmp_path.glob("part-*"))) <= 1  # each run removes what a killed one left


@pytest.mark.slow
@needs_posix
def test_such_kills_break_a_plain_checkpoint(few, weights, tmp_path):
    arguments = [few, weights, 10000]
    assert not all(kill_at_random(ARTICLE, arguments, tmp_path) for _ in range(40))


@pytest.mark.slow
@needs_posix
@pytest.mark.parametrize(
    "epochs",
    [["--epochs", 10000], ["--epochs", 2, "--unfreeze", 1, "--fine-tune-epochs", 10000]],
)
def test_ctrl_c_keeps_what_there_is(epochs, few, weights, tmp_path):
    """Like a user, it presses again if nothing happens: Keras loses a few (a bare `except`)."""
    arguments = ["--data", few, "--weights", weights, *epochs]
    process = start(TRANSFER, *arguments, cwd=tmp_path)
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    pressed = math.inf
    for line in process.stdout:
        if line.startswith("Epoch 4/") or time.monotonic() - pressed > 10:
            process.send_signal(signal.SIGINT)
            pressed = time.monotonic()
    _, stderr = process.communicate(timeout=120)
    watchdog.cancel()
    assert process.returncode == 130, stderr
    sentence = r"stopped after epoch (\d+): the best model and the curves are in (.+)\n"
    epochs, place = re.fullmatch(sentence, stderr).groups()
    assert place == str(tmp_path)
    assert int(epochs) >= 3
    assert len(read_history(tmp_path)) == int(epochs)
    keras.models.load_model(tmp_path / "vgg16_cifar10.keras")
    assert {path.name for path in tmp_path.iterdir()} >= {"loss.png", "accuracy.png"}
    assert not list(tmp_path.glob("part-*"))


@pytest.mark.slow
@needs_posix
def test_ctrl_c_before_the_first_epoch(subset, weights, tmp_path):
    arguments = ["--data", subset, "--weights", weights]
    process = start(TRANSFER, *arguments, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("The layers up to block5_pool run over"):
            process.send_signal(signal.SIGINT)
            break
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "stopped\n"
    left = {path.suffix for path in tmp_path.iterdir()}
    assert left <= {".png", ".features"}  # the latter for the next run to go on with


@pytest.mark.parametrize("error", [MemoryError("no room"), "ResourceExhausted"])
def test_memory_that_is_full(error, few, weights, tmp_path, monkeypatch):
    """One sentence names what helps. Only the fit that meets the full memory is replaced."""
    if error == "ResourceExhausted":
        text = "OOM when allocating tensor with shape[32,64]\nmore of TensorFlow's lines"
        error = tf.errors.ResourceExhaustedError(None, None, text)

    def fit(*arguments, **settings):
        raise error

    monkeypatch.setattr(keras.Model, "fit", fit)
    arguments = ["--data", few, "--weights", weights, "--epochs", 1]
    _, stderr = call(TRANSFER, *arguments, cwd=tmp_path, status=2)
    check_error(stderr, r"the memory is full: close .+ \((no room|OOM when .+\[32,64\])\)")
    for flag in ("--batch-size", "--image-size", "--unfreeze"):
        assert flag in stderr


@pytest.mark.parametrize("where", ["weights", "data"])
def test_memory_that_is_full_is_no_damaged_file(where, few, weights, tmp_path, monkeypatch):
    def fill(*arguments, **settings):
        raise MemoryError

    if where == "data":
        monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", fill)
    else:
        monkeypatch.setattr(keras.Model, "load_weights", fill)
    arguments = ["--data", few, "--weights", weights, "--epochs", 1]
    _, stderr = call(TRANSFER, *arguments, cwd=tmp_path, status=2)
    check_error(stderr, r"the memory is full: close .+ \(MemoryError\)")


# ----- any place, any console


@pytest.fixture
def classroom(images, tmp_path):
    """A directory with spaces and Japanese in its path, and the path of 50 images in it."""
    place = tmp_path / "教室 1"
    place.mkdir()
    return place, save_part(place / "画像 data.npz", images, 50, 10)


def check_last_line(stdout, images):
    label = transfer_vgg16.CLASS_NAMES[images["y_test"][0, 0]]
    assert stdout.endswith(f", 正解: {label}\n")


def test_any_place(classroom, images, weights, tmp_path):
    """From another directory, with spaces and Japanese in the paths."""
    place, data = classroom
    arguments = ["--data", data, "--weights", weights, "--epochs", 1]
    stdout, stderr = call(TRANSFER, *arguments, "--output-dir", place / "出力", cwd=tmp_path)
    assert stderr == ""
    check_last_line(stdout, images)
    assert list_written(place / "出力") == WRITTEN
    arguments = ["--model", place / "出力" / "vgg16_cifar10.keras", "--data", data]
    stdout, stderr = call(PREDICT, *arguments, cwd=tmp_path)
    assert stderr == ""
    check_last_line(stdout, images)


@pytest.mark.slow
def test_any_place_and_console(classroom, images, weights, tmp_path):
    """The same in processes without Japanese output."""
    place, data = classroom
    out = place / "出力"
    arguments = ["--data", data, "--weights", weights, "--epochs", 1, "--output-dir", out]
    for encoding in ("cp1252", "ascii", "cp932"):
        settings = {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
        stdout, stderr = run(TRANSFER, *arguments, cwd=tmp_path, **settings)
        assert stderr == ""
        assert re.search(r"\(\w+\), \S+: \S+ \(\w+\)\n$", stdout)
    arguments = ["--model", out / "vgg16_cifar10.keras", "--data", data]
    stdout, stderr = run(PREDICT, *arguments, cwd=tmp_path)
    assert stderr == ""
    check_last_line(stdout, images)
