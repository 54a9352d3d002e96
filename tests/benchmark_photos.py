"""The settings for photos, tried on three small sets: the tables of docs/photos.md and usage.md.

    python tests/benchmark_photos.py cifar10.npz
    python tests/benchmark_photos.py cifar10.npz --precision mixed_bfloat16      sooner

The sets are photos of CIFAR-10, as PNG files of 32 by 32 pixels, and the drawings in data/. Other
arguments are handed on to every run. A run is tested on the model that it saved.
"""

import argparse
import contextlib
import io
import re
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import predict_saved  # noqa: E402
import transfer_vgg16  # noqa: E402

SEEDS = (0, 1, 2)
SETTINGS = [  # those that need the same outputs of VGG16 are neighbours
    "--image-size 32 --no-preprocess --no-mirror --optimizer sgd --epochs 10",
    "--image-size 64 --no-mirror",
    "--no-preprocess --no-mirror",
    "--no-mirror --optimizer sgd --learning-rate 1e-3",
    "--no-mirror",
    "",
    "--image-size 160",
]
CALIBRATION = r"off by (\S+) on .+ by (\S+) after calibration, with the temperature (\S+)"


def write_photos(directory, images, labels, names):
    """Write a PNG file for each of `images` into the directory that its class has there."""
    for number, (image, label) in enumerate(zip(images, np.ravel(labels), strict=True)):
        path = directory / names[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def write_some(directory, data, names, classes, train, test):
    """Write the first `train` and `test` images of each of the `classes` into two parts."""
    for part, count in (("train", train), ("test", test)):
        images, labels = data[f"x_{part}"], np.ravel(data[f"y_{part}"])
        for label in classes:
            chosen = np.flatnonzero(labels == label)[:count]
            write_photos(directory / part, images[chosen], labels[chosen], names)


def write_sets(directory, cifar10):
    """Write the three sets; return their names and directories."""
    names = [re.sub(r".+\((.+)\)", r"\1", name) for name in transfer_vgg16.CLASS_NAMES]
    animals = [names.index(name) for name in ("cat", "dog", "horse")]
    sets = {
        name: directory / str(number)
        for number, name in enumerate(
            ["3 classes, 10 photos each", "10 classes, 50 each", "587 drawings"]
        )
    }
    few, more, drawings = sets.values()
    with np.load(cifar10) as file:
        data = {name: file[name] for name in file.files}
    write_some(few, data, names, animals, train=10, test=100)
    write_some(more, data, names, range(10), train=50, test=30)
    parts = transfer_vgg16.load_arrays(transfer_vgg16.DEMO_DATA)
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts[:2], strict=True))
    write_photos(drawings, images, labels, parts[2])
    return sets


def run(data, output_dir, arguments):
    """Train; return the saved model's notes on its test, and the calibration line's numbers."""
    arguments = ["--data", data, "--output-dir", output_dir, *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = transfer_vgg16.main(arguments)
    if status:
        sys.exit(f"{arguments} ended with {status}\n{printed.getvalue()}")
    notes = predict_saved.read_notes(output_dir / transfer_vgg16.MODEL_FILE)
    return notes["test"], re.search(CALIBRATION, printed.getvalue()).groups()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="CIFAR-10 as an .npz file in Keras's layout")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as work:
        sets = write_sets(Path(work), args.data)
        print(f"| flags | {' | '.join(sets)} | mean |\n|{' --- |' * (len(sets) + 2)}")
        calibrations = {}
        for flags in SETTINGS:
            cells, means = [], []
            for name, data in sets.items():
                output_dir, tests = data.with_name(f"{data.name}-model"), []
                for seed in SEEDS:
                    arguments = [*flags.split(), *more, "--seed", seed]
                    test, calibration = run(data, output_dir, arguments)
                    tests.append(test["accuracy"])
                    if not flags and seed == SEEDS[0]:
                        calibrations[name] = calibration, test["images"]
                means.append(statistics.mean(tests))
                cells.append(f"{means[-1]:.3f} ({min(tests):.3f}-{max(tests):.3f})")
            row = [f"`{flags}`" if flags else "the defaults", *cells]
            print(f"| {' | '.join(row)} | {statistics.mean(means):.3f} |", flush=True)
        print(
            "\n| trained on | calibration error, without and with | images |\n| --- | --- | --- |"
        )
        for name, ((before, after, temperature), count) in calibrations.items():
            print(f"| {name} | {before}, {after} ({temperature}) | {count} |")


if __name__ == "__main__":
    main()
