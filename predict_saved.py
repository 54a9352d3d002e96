#!/usr/bin/env python3
"""Evaluate the model that transfer_vgg16.py saved, and predict the first test image with it.

python predict_saved.py                    vgg16_cifar10.keras of this directory
python predict_saved.py DIR/vgg16_cifar10.keras --data cifar10.npz
python predict_saved.py --help             all arguments
"""

import argparse
from pathlib import Path

from transfer_vgg16 import (
    CLASSES,
    MODEL_FILE,
    VERBOSE,
    batches,
    fail,
    first_line,
    keras,
    load_cifar10,
    print_prediction,
    start,
)


def parse_arguments():
    """Return the arguments of the command line; end with status 2 where one is wrong."""
    parser = argparse.ArgumentParser(
        description="Evaluate the model that transfer_vgg16.py saved.",
        usage="%(prog)s [ARGUMENTS]",
    )
    parser.error = lambda message: fail(f"{message} (--help explains the arguments)")
    parser.add_argument(
        "model",
        type=Path,
        nargs="?",
        default=Path(MODEL_FILE),
        help="Load the model from this file (%(default)s).",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE.npz",
        help="Read the images from this file, which transfer_vgg16.py takes as well, instead of "
        "downloading CIFAR-10.",
    )
    return parser.parse_args()


def load_model(path):
    """Return the trained model in the file `path`: images (n, 32, 32, 3) to (n, 10) probabilities.

    Errors: status 2 where `path` is not such a file. Keras's safe mode stays on, so that no code
    in the file is run.
    """
    if not path.is_file():
        fail(f"{path} does not exist: run transfer_vgg16.py first, or give the path of its model")
    try:
        model = keras.models.load_model(path)
        shapes = model.input_shape, model.output_shape
    except Exception as error:  # a broken file can fail anywhere in Keras, h5py and zipfile
        fail(
            f"{path} is not a model that transfer_vgg16.py saved, or it is damaged "
            f"({first_line(error)}): run transfer_vgg16.py again"
        )
    ours = shapes == ((None, 32, 32, 3), (None, len(CLASSES)))
    ours = ours and "block5_pool" in [layer.name for layer in model.layers]
    if not ours or getattr(model, "loss", None) != "sparse_categorical_crossentropy":
        fail(
            f"{path} is not a model that transfer_vgg16.py saved: give the path of its "
            f"{MODEL_FILE}"
        )
    return model


def main():
    """Evaluate the saved model, then print its first prediction."""
    args = parse_arguments()
    model = load_model(args.model)
    _, (x_test, y_test) = load_cifar10(args.data)

    # ===== evaluateを使ったテストデータでの評価 / Evaluate on the test images
    print(model.evaluate(batches(x_test, y_test, batch_size=500), verbose=VERBOSE))

    # ===== predictを使って予測結果を表示 / Predict the first test image
    preds = model.predict(batches(x_test[:1], batch_size=1), verbose=VERBOSE)
    print_prediction(preds[0], y_test[0])


if __name__ == "__main__":
    start(main)
