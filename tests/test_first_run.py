"""A first run cannot hang, fail without a reason, or leave a broken file."""

import functools
import hashlib
import http.server
import io
import pickle
import random
import re
import signal
import socket
import tarfile
import textwrap
import threading
import time

import h5py
import keras
import numpy as np
import pytest
from benchmark import save_part
from conftest import ARTICLE, PREDICT, ROOT, TRANSFER, WRITTEN, read_history, run, start

# ----- without a network


@pytest.fixture
def no_network(monkeypatch):
    """Send every request to a port at which nothing listens."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")


@pytest.mark.parametrize("script", [TRANSFER, PREDICT])
def test_no_network_names_the_ways_on(script, no_network, tmp_path):
    if script == PREDICT:
        save_model(tmp_path / "vgg16_cifar10.keras")
    begin = time.monotonic()
    _, stderr = run(script, cwd=tmp_path, status=2)
    assert time.monotonic() - begin < 15
    assert re.fullmatch(r"error: CIFAR-10 could not be downloaded \(.+\)\. [^\n]+\n", stderr)
    for way in ("--data and (to train) --weights", ".keras", "KERAS_HOME", "--demo"):
        assert way in stderr


def test_no_network_for_the_weights(no_network, tmp_path):
    data = write_data(tmp_path / "data.npz")
    _, stderr = run(TRANSFER, "--data", data, cwd=tmp_path, status=2)
    assert re.fullmatch(r"error: VGG16's weights could not be downloaded \(.+\n", stderr)


def test_demo(no_network, tmp_path):
    begin = time.monotonic()
    stdout, stderr = run(TRANSFER, "--demo", cwd=tmp_path)
    assert time.monotonic() - begin < 60
    assert stderr == ""
    assert {path.name for path in (tmp_path / "demo").iterdir()} == WRITTEN
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    history = read_history(tmp_path / "demo")
    assert len(history) == 10
    assert history[-1]["val_accuracy"] > 0.5
    results = [line for line in stdout.splitlines() if re.search(r"accuracy|loss|\[|予測", line)]
    assert len(results) == 10 + 1 + 1 + 2
    assert all(line.startswith("demo: ") for line in results)


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
            time.sleep(40)
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


def test_bad_hosts_are_left_for_the_next(cifar10, inputs, tmp_path):
    """Only the hosts' addresses and the hash that is asked for are replaced."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{closed.getsockname()[1]}/refused"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    Host.archive = make_archive(cifar10)
    Host.asked.clear()
    urls = [refusing, *(f"{address}/{name}" for name in ("missing", "wrong", "stall", "good"))]

    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
            import sys
            sys.path.insert(0, {str(ROOT)!r})
            import transfer_vgg16
            import numpy as np
            from keras.src.datasets import cifar10
            sha256 = {hashlib.sha256(Host.archive).hexdigest()!r}
            keras_get_file = cifar10.get_file
            def get_file(**arguments):
                arguments |= {{"file_hash": sha256, "origin": "{address}/load_data"}}
                return keras_get_file(**arguments)
            cifar10.get_file = get_file
            transfer_vgg16.CIFAR10_URLS = {urls!r}
            transfer_vgg16.CIFAR10_SHA256 = sha256

            def main():
                (x_train, y_train), (x_test, y_test) = transfer_vgg16.load_cifar10()
                with np.load({str(inputs / "cifar10.npz")!r}) as file:
                    for name, array in file.items():
                        assert np.array_equal(array, locals()[name]), name
                print("all arrays are the same")

            transfer_vgg16.start(main)
        """)
    )
    home = str(tmp_path / "home")
    stdout, stderr = run(program, cwd=tmp_path, KERAS_HOME=home)
    assert stderr == ""
    assert Host.asked == ["/missing", "/wrong", "/stall", "/good"]
    for url in urls[:-1]:
        assert re.search(f"^{url} did not deliver CIFAR-10: .", stdout, re.M)
    assert stdout.endswith("all arrays are the same\n")

    Host.asked.clear()
    stdout, _ = run(program, cwd=tmp_path, KERAS_HOME=home)
    assert Host.asked == []
    assert stdout == "all arrays are the same\n"
    server.shutdown()


# ----- bad input


def write_data(path, **changes):
    """Write small arrays in Keras's layout to `path`, with `changes`; return `path`."""
    random = np.random.default_rng(0)
    data = {
        "x_train": random.integers(0, 256, (20, 32, 32, 3), np.uint8),
        "y_train": random.integers(0, 10, (20, 1), np.uint8),
        "x_test": random.integers(0, 256, (10, 32, 32, 3), np.uint8),
        "y_test": random.integers(0, 10, (10, 1), np.uint8),
    }
    data |= changes
    np.savez(path, **{name: array for name, array in data.items() if array is not None})
    return path


def save_weights(path):
    """Save random weights of VGG16 without its top to `path`; return `path`."""
    keras.applications.VGG16(include_top=False, weights=None).save_weights(path)
    return path


def save_model(path):
    """Save an untrained model of the article's form to `path`; return `path`."""
    base = keras.applications.VGG16(include_top=False, weights=None, input_shape=(32, 32, 3))
    base.trainable = False
    x = keras.layers.Flatten()(base.output)
    model = keras.Model(base.input, keras.layers.Dense(10, activation="softmax")(x))
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.save(path)
    return path


def check_error(stderr, sentence):
    assert "Traceback" not in stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert re.fullmatch(rf"error: {sentence}", stderr.strip()), stderr


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
        (["--learning-rate", "0"], "argument --learning-rate: '0' is not a number above 0"),
        (["--learning-rate", "-1"], "argument --learning-rate: '-1' is not a number above 0"),
        (["--learning-rate", "nan"], "argument --learning-rate: 'nan' is not a number above 0"),
        (["--learning-rate", "inf"], "argument --learning-rate: 'inf' is not a number above 0"),
        (["--learning-rate", "x"], "argument --learning-rate: 'x' is not a number above 0"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number from 0 to 4294967295"),
        (["--precision", "x"], "argument --precision: invalid choice: 'x'"),
        (["--demo", "--data", "x.npz"], "--demo draws its own images and weights"),
        (["--output-dir", "file"], r"nothing can be written into file \(File exists\)"),
        (["--output-dir", "file/x"], r"nothing can be written into file/x \(Not a directory\)"),
        (["--output-dir", "/proc"], r"nothing can be written into /proc \(.+\)"),
    ],
)
def test_bad_argument(arguments, sentence, tmp_path):
    (tmp_path / "file").touch()
    stdout, stderr = run(TRANSFER, *arguments, cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(stderr, rf"{sentence}.*")
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


def change(**changes):
    return functools.partial(write_data, **changes)


IMAGES, LABELS = np.zeros((20, 32, 32, 3), np.uint8), np.zeros((20, 1), np.uint8)
OBJECTS = np.array([Bomb()], dtype=object)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (write_nothing, "data.npz does not exist: give --data the path of an .npz file"),
        (write_text, "data.npz is no .npz file of plain arrays, or damaged: make"),
        (write_empty, "data.npz is no .npz file of plain arrays, or damaged: make"),
        (write_truncated, "data.npz is no .npz file of plain arrays, or damaged: make"),
        (write_array, "data.npz is no .npz file of plain arrays, or damaged: make"),
        (write_pickle, "data.npz is no .npz file of plain arrays, or damaged: make"),
        (change(y_train=OBJECTS), "data.npz is no .npz file of plain arrays, or damaged: make"),
        (change(y_test=None), "data.npz lacks y_test: name its arrays as Keras does"),
        (change(x_train=IMAGES[:, :28, :28]), r"data.npz: x_train is uint8\(20, 28, 28, 3\), it"),
        (change(x_train=IMAGES[..., 0]), r"data.npz: x_train is uint8\(20, 32, 32\), it must be"),
        (change(x_train=IMAGES / 255), r"data.npz: x_train is float64\(20, 32, 32, 3\), it must"),
        (change(y_train=LABELS + 0.5), r"data.npz: y_train is float64\(20, 1\), it must be whole"),
        (change(y_train=np.eye(20)[:, :10]), r"data.npz: y_train is float64\(20, 10\), it must"),
        (change(y_train=LABELS[:19]), "data.npz: x_train has 20 images but y_train has 19 labels"),
        (change(y_train=LABELS + 10), "data.npz: y_train runs from 10 to 10, it must stay within"),
        (change(y_test=LABELS[:10] - np.int8(1)), "data.npz: y_test runs from -1 to -1, it must"),
        (
            change(x_test=IMAGES[:0], y_test=LABELS[:0]),
            "data.npz: x_test has 0 images, it must have 1 or more",
        ),
        (
            change(x_train=IMAGES[:4], y_train=LABELS[:4]),
            "data.npz: x_train has 4 images, it must have 5 or more",
        ),
    ],
)
def test_bad_data(write, sentence, tmp_path):
    write(tmp_path / "data.npz")
    arguments = ["--data", "data.npz", "--weights", "unused.h5", "--output-dir", "out"]
    stdout, stderr = run(TRANSFER, *arguments, cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(stderr, rf"{sentence}.*")
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "exploded").exists()


def test_labels_may_be_flat(tmp_path):
    data = write_data(tmp_path / "data.npz", y_train=LABELS[:, 0], y_test=LABELS[:10, 0])
    weights = save_weights(tmp_path / "vgg16.weights.h5")
    stdout, _ = run(TRANSFER, "--data", data, "--weights", weights, "--epochs", 1, cwd=tmp_path)
    assert "正解: [0]\n" in stdout


def write_truncated_weights(path):
    save_weights(path)
    path.write_bytes(path.read_bytes()[:1_000_000])


def write_other_weights(path):
    keras.applications.MobileNet(include_top=False, weights=None).save_weights(path)


def write_vgg19_weights(path):
    keras.applications.VGG19(include_top=False, weights=None).save_weights(path)


def write_empty_h5(path):
    h5py.File(path, "w").close()


@pytest.mark.parametrize("name", ["vgg16.weights.h5", "vgg16.h5"])
@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (write_nothing, "does not exist: give --weights the path of an .h5 file"),
        (write_text, "does not hold the weights of VGG16 without its top"),
        (write_empty, "does not hold the weights of VGG16 without its top"),
        (write_empty_h5, "does not hold the weights of VGG16 without its top"),
        (write_truncated_weights, "does not hold the weights of VGG16 without its top"),
        (write_other_weights, "does not hold the weights of VGG16 without its top"),
        (write_vgg19_weights, "does not hold the weights of VGG16 without its top"),
    ],
)
def test_bad_weights(write, sentence, name, tmp_path):
    original = tmp_path / "original.weights.h5"
    write(original)
    if original.exists():
        original.rename(tmp_path / name)
    data = write_data(tmp_path / "data.npz")
    arguments = ["--data", data, "--weights", name, "--output-dir", "out"]
    stdout, stderr = run(TRANSFER, *arguments, cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(stderr, rf"{name} {sentence}.*")
    assert list((tmp_path / "out").iterdir()) == []


def test_diverging_training(tmp_path):
    data = write_data(tmp_path / "data.npz")
    weights = save_weights(tmp_path / "vgg16.weights.h5")
    arguments = ["--data", data, "--weights", weights, "--learning-rate", "1e30"]
    _, stderr = run(TRANSFER, *arguments, "--epochs", 3, cwd=tmp_path, status=2)
    check_error(
        stderr, r"the loss did not stay finite in epoch \d: choose a lower --learning-rate"
    )
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


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (write_nothing, "does not exist: run transfer_vgg16.py first"),
        (write_text, "is not a model that transfer_vgg16.py saved, or it is damaged"),
        (write_empty, "is not a model that transfer_vgg16.py saved, or it is damaged"),
        (truncate_model, "is not a model that transfer_vgg16.py saved, or it is damaged"),
        (save_model_with_code, "is not a model that transfer_vgg16.py saved, or it is damaged"),
        (save_other_model, "is not a model that transfer_vgg16.py saved: give --model the path"),
        (save_own_network, "is not a model that transfer_vgg16.py saved: give --model the path"),
    ],
)
def test_bad_model(write, sentence, tmp_path):
    write(tmp_path / "model.keras")
    stdout, stderr = run(PREDICT, "--model", "model.keras", cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(stderr, rf"model.keras {sentence}.*")


# ----- full disks, kills and Ctrl-C


def snapshot(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("limit", "change", "name"),
    [
        (100_000, [], "transfer_learning_vgg16_cifar10.png"),
        (500_000, ["--precision", "mixed_bfloat16"], "vgg16_features.npz"),
        (10_000_000, ["--learning-rate", "1e-5"], "vgg16_cifar10.keras"),
    ],
)
def test_full_disk_leaves_the_former_files(limit, change, name, handful, weights, tmp_path):
    out = tmp_path / "out"
    arguments = ["--data", handful, "--weights", weights, "--epochs", 2, "--output-dir", out]
    run(TRANSFER, *arguments, cwd=tmp_path)
    before = snapshot(out)
    _, stderr = run(TRANSFER, *arguments, *change, cwd=tmp_path, status=2, limit=limit)
    check_error(stderr, rf"{out / name} could not be written \(File too large\): free some .+")
    assert snapshot(out) == before


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


def test_kills_leave_a_whole_model(handful, weights, tmp_path):
    arguments = ["--data", handful, "--weights", weights, "--epochs", 10000]
    arguments += ["--learning-rate", "1e-6"]
    whole = [kill_at_random(TRANSFER, arguments, tmp_path) for _ in range(50)]
    assert whole == [True] * 50


def test_such_kills_break_a_plain_checkpoint(handful, weights, tmp_path):
    arguments = [handful, weights, 10000]
    assert not all(kill_at_random(ARTICLE, arguments, tmp_path) for _ in range(50))


@pytest.mark.parametrize(
    "epochs",
    [["--epochs", 10000], ["--epochs", 2, "--unfreeze", 1, "--fine-tune-epochs", 10000]],
)
def test_ctrl_c_keeps_what_there_is(epochs, handful, weights, tmp_path):
    arguments = ["--data", handful, "--weights", weights, *epochs]
    process = start(TRANSFER, *arguments, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("Epoch 4/"):
            process.send_signal(signal.SIGINT)
            break
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr == ""
    last = stdout.splitlines()[-1]
    epochs = int(re.fullmatch(r"stopped after epoch (\d+): the best .+ are in (.+)", last)[1])
    assert last.endswith(str(tmp_path))
    assert epochs >= 3
    assert len(read_history(tmp_path)) == epochs
    keras.models.load_model(tmp_path / "vgg16_cifar10.keras")
    assert {path.name for path in tmp_path.iterdir()} >= {"loss.png", "accuracy.png"}
    assert not list(tmp_path.glob("part-*"))


def test_ctrl_c_before_the_first_epoch(subset, weights, tmp_path):
    arguments = ["--data", subset, "--weights", weights]
    process = start(TRANSFER, *arguments, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("VGG16 runs once"):
            process.send_signal(signal.SIGINT)
            break
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "stopped\n"
    assert [path.name for path in tmp_path.iterdir()] == ["transfer_learning_vgg16_cifar10.png"]


# ----- any place, any console


def test_any_place_and_console(cifar10, weights, tmp_path):
    """From another directory, with spaces and Japanese in the paths, without Japanese output."""
    place = tmp_path / "教室 1"
    place.mkdir()
    data = save_part(place / "画像 data.npz", cifar10, 50, 10)
    arguments = [
        "--data",
        data,
        "--weights",
        weights,
        "--epochs",
        1,
        "--output-dir",
        place / "出力",
    ]
    for encoding in ("cp1252", "ascii", "cp932"):
        stdout, stderr = run(
            TRANSFER, *arguments, cwd=tmp_path, PYTHONIOENCODING=encoding, LC_ALL="C"
        )
        assert stderr == ""
        assert re.search(r"\(\w+\), \S+: \S+ \(cat\)\n$", stdout)
    stdout, stderr = run(
        PREDICT, "--model", place / "出力" / "vgg16_cifar10.keras", "--data", data, cwd=tmp_path
    )
    assert stderr == ""
    assert "正解: 猫 (cat)" in stdout
