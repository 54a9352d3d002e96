#!/usr/bin/env python3
"""Use the model that transfer_vgg16.py saved: evaluate it, or ask it what is in a picture.

python predict_saved.py                    evaluate vgg16_cifar10.keras of this directory
python predict_saved.py photo.jpg album    what is in a picture, and in those of a directory
python predict_saved.py --figure answer.png photo.jpg
                                           the same, drawn
python predict_saved.py --model DIR/vgg16_cifar10.keras --data cifar10.npz
python predict_saved.py --help             all arguments
"""

import argparse
import json
import os
import sys
import zipfile
from pathlib import Path

from transfer_vgg16 import (
    CLASSES,
    MODEL_FILE,
    VERBOSE,
    Image,
    batches,
    drawable,
    fail,
    first_line,
    images_at_once,
    keras,
    load_cifar10,
    load_photos,
    np,
    plot_images,
    print_prediction,
    read_photo,
    start,
)


def parse_arguments():
    """Return the arguments of the command line; end with status 2 where one is wrong."""
    parser = argparse.ArgumentParser(
        description="Evaluate the model that transfer_vgg16.py saved, or let it name pictures.",
        usage="%(prog)s [ARGUMENTS] [IMAGE ...]",
    )
    parser.error = lambda message: fail(f"{message} (--help explains the arguments)")
    parser.add_argument(
        "images",
        type=Path,
        nargs="*",
        metavar="IMAGE",
        help="Name the three likeliest classes of this picture, or of those in this directory, "
        "instead of evaluating the model.",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(MODEL_FILE),
        metavar="FILE.keras",
        help="Load the model from this file (%(default)s).",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="Evaluate on the test images of this .npz file or directory, which transfer_vgg16.py "
        "takes as well, instead of downloading CIFAR-10.",
    )
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE.png",
        help="Draw the first 25 pictures with their classes into this file.",
    )
    args = parser.parse_intermixed_args()
    if args.images and args.data:
        parser.error("--data is what to evaluate on: leave it out where you give pictures")
    if any(path.suffix == ".keras" for path in args.images):
        parser.error("a .keras file is a model: give it with --model")
    if args.figure and not args.images:
        parser.error("--figure draws pictures: name some")
    if args.figure and args.figure.suffix.lower() != ".png":
        parser.error(f"argument --figure: {args.figure} does not end in .png")
    return args


def load_model(path):
    """Return the trained model in the file `path`, and the names of its classes.

    The model maps images (n, size, size, 3), 0-255 RGB, to probabilities (n, classes).
    Errors: status 2 where `path` is not such a file. Keras's safe mode stays on, so that no code
    in the file is run.
    """
    if not path.is_file():
        fail(f"{path} does not exist: run transfer_vgg16.py first, or give --model another file")
    try:
        model = keras.models.load_model(path)
        with zipfile.ZipFile(path) as archive:  # the article's own code leaves it no comment
            names = json.loads(archive.comment) if archive.comment else CLASSES
        size = model.input_shape[1]
        ours = model.input_shape == (None, size, size, 3)
        ours = ours and model.output_shape == (None, len(names))
        ours = ours and "block5_pool" in [layer.name for layer in model.layers]
    except Exception as error:  # a broken file can fail anywhere in Keras, h5py and zipfile
        fail(
            f"{path} is not a model that transfer_vgg16.py saved, or it is damaged "
            f"({first_line(error)}): run transfer_vgg16.py again"
        )
    if not ours or getattr(model, "loss", None) != "sparse_categorical_crossentropy":
        fail(
            f"{path} is not a model that transfer_vgg16.py saved: give --model the path of its "
            f"{MODEL_FILE}"
        )
    return model, names


def load_test_data(data, size, names):
    """Return the test images and labels of `data`, or of CIFAR-10, for a model of such classes."""
    if data and os.path.isdir(data):
        test, found = load_photos(data, size, parts=["test"])
        if found != names:
            fail(f"the model knows {', '.join(names)}, but {data} has {', '.join(found)}")
        return test
    if names != CLASSES:
        fail(
            f"the model knows {', '.join(names)}, not CIFAR-10's classes: give it pictures, or "
            "--data with the directory that it was trained on"
        )
    return load_cifar10(data)[1]


def read_pictures(paths, size):
    """Return the pictures among `paths` and in the directories among them, and whether all are.

    They come as a list of paths and an array (n, size, size, 3). Any other file is named in a line
    of its own.
    """
    files, pictures, complete = [], [], True
    kinds = Image.registered_extensions().items()
    known = {end for end, kind in kinds if Image.MIME.get(kind, "").startswith("image/")}
    for path in paths:
        inside = [path]
        if os.path.isdir(path):
            names = sorted(os.listdir(path)) if os.access(path, os.R_OK) else []
            inside = [path / name for name in names if Path(name).suffix.lower() in known]
            inside = [file for file in inside if not file.name.startswith(".")]
            if not inside:
                print(f"error: {path} has no readable pictures in it", file=sys.stderr)
                complete = False
        for file in inside:
            try:
                pictures.append(read_photo(file, size))
                files.append(file)
            except Exception as error:  # Pillow has other ones for each format
                print(f"error: {file} is skipped: {first_line(error)}", file=sys.stderr)
                complete = False
    return files, np.array(pictures), complete


def name_pictures(model, names, paths, figure):
    """Print the three likeliest classes of each picture; draw them into the file `figure`, if any.

    Errors: status 2, after all the others are answered, where a path is no picture.
    """
    files, pictures, complete = read_pictures(paths, model.input_shape[1])
    if files:
        preds = model.predict(batches(pictures, batch_size=images_at_once(model)), verbose=0)

        def answers(names):
            return [[f"{names[i]} {p[i]:.1%}" for i in np.argsort(p)[::-1][:3]] for p in preds]

        for file, answer in zip(files, answers(names), strict=True):
            print(f"{file}: {', '.join(answer)}")
        if figure:
            captions = ["\n".join(answer) for answer in answers(drawable(names))]
            plot_images(pictures, captions, ["black"] * len(captions), figure)
    if not complete:
        raise SystemExit(2)


def main():
    """Name what is in the pictures that were given, or evaluate the saved model."""
    args = parse_arguments()
    model, names = load_model(args.model)
    if args.images:
        name_pictures(model, names, args.images, args.figure)
        return
    x_test, y_test = load_test_data(args.data, model.input_shape[1], names)

    # ===== evaluateを使ったテストデータでの評価 / Evaluate on the test images
    test = batches(x_test, y_test, batch_size=images_at_once(model))
    print(model.evaluate(test, verbose=VERBOSE))

    # ===== predictを使って予測結果を表示 / Predict the first test image
    preds = model.predict(batches(x_test[:1], batch_size=1), verbose=VERBOSE)
    print_prediction(preds[0], y_test[0], names)


if __name__ == "__main__":
    start(main)
