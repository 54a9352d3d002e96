"""Compare our runs with the article's plain code, in one go, on the same inputs.

    python tests/benchmark.py cifar10.npz vgg16_notop.weights.h5 --output benchmark.md
    python tests/benchmark.py cifar10.npz vgg16_notop.weights.h5 --images 2000   a short one
    python tests/benchmark.py cifar10.npz vgg16_notop.weights.h5 --ladder ladder.json
                                                      the way up from the article's accuracy

Every run is a process of its own, timed from start to exit. Before each of them, the machine's own
matrix multiplication is timed in the same precision: the share of that rate which a convolutional
network reaches is comparable between machines, seconds are not. Needs Linux or macOS.
"""

import argparse
import csv
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

TESTS = Path(__file__).resolve().parent
GFLOP_PER_IMAGE = 0.626  # the thirteen convolutions at 32x32, 2 for each multiply-add

LADDER = [  # each rung has the flags of those before it as well; a later value replaces an earlier
    {},
    {"--precision": "mixed_bfloat16"},
    {"--preprocess": ""},
    {"--optimizer": "adam"},
    {"--batch-size": "64", "--unfreeze": "1"},
    {"--unfreeze": "2", "--fine-tune-epochs": "4"},
    {"--mirror": "", "--image-size": "64"},
]

MATMUL = """
import sys, time, tensorflow as tf
a = tf.cast(tf.random.normal((4096, 4096)), sys.argv[1])
multiply = tf.function(lambda: tf.reduce_sum(a @ a))
multiply().numpy()
seconds = []
for _ in range(5):
    start = time.perf_counter()
    multiply().numpy()
    seconds.append(time.perf_counter() - start)
print(2 * 4096**3 / min(seconds) / 1e9)
"""


def save_part(path, data, train, test):
    """Write the first `train` and `test` images of the arrays `data` to `path`; return `path`."""
    sizes = {"train": train, "test": test}
    part = {
        f"{axis}_{name}": data[f"{axis}_{name}"][:n] for name, n in sizes.items() for axis in "xy"
    }
    np.savez(path, **part)
    return path


def matmul_rate(dtype):
    """Return this machine's rate for a 4096x4096 matrix product in `dtype`, in GFLOP/s."""
    command = [sys.executable, "-c", MATMUL, dtype]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def watch_memory(pid, sizes):
    """Append the bytes of memory that are a process's own to the list `sizes` until it ends."""
    try:
        process = psutil.Process(pid)
        while True:
            memory = process.memory_info()
            sizes.append(memory.rss - getattr(memory, "shared", 0))
            time.sleep(0.2)
    except psutil.NoSuchProcess:
        return


def run(command, directory):
    """Run `command` in `directory`; return its measurements as a dict.

    seconds: start to exit; base_seconds: those in which VGG16 runs; peak: the most memory of its
    own, in GB, which on Linux leaves out what it has mapped of files; disk: its outputs files, GB.
    """
    directory.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    environment["MPLBACKEND"] = "Agg"  # no window waits for somebody to close it
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    sizes = [0]
    threading.Thread(target=watch_memory, args=(process.pid, sizes), daemon=True).start()
    lines = [(line, time.perf_counter() - start) for line in process.stdout]
    process.wait()
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit("".join(line for line, _ in lines) + f"{command} ended with {process.returncode}")

    text = "".join(line for line, _ in lines)
    loss, accuracy = re.findall(r"^\[(\S+), (\S+)\]$", text, re.MULTILINE)[0]
    averaged = re.findall(r"^averaged with .+ accuracy (\S+)$", text, re.MULTILINE)
    with (directory / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    result = {
        "seconds": seconds,
        "peak": max(sizes) / 1e9,
        "disk": sum(path.stat().st_size for path in directory.glob("*.features")) / 1e9,
        "val_loss": float(history[-1]["val_loss"]),
        "val_accuracy": float(history[-1]["val_accuracy"]),
        "loss": float(loss),
        "accuracy": float(accuracy),
        "averaged": float(averaged[0]) if averaged else None,
    }
    passes = [i for i, (line, _) in enumerate(lines) if re.match("The layers .* run over", line)]
    if passes:  # each is followed by Keras's line of progress, when it is over
        result["base_seconds"] = sum(lines[i + 1][1] - lines[i][1] for i in passes)
    elif not any(line.startswith("The layers up to") for line, _ in lines):  # in every epoch
        begin = next(at for line, at in lines if line.startswith("Epoch 1/"))
        result["base_seconds"] = lines[-1][1] - begin
    return result


def table(rows):
    """Return a list of lists of strings as a Markdown table, the first one being its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def compare(data, weights, epochs, repeat, work):
    """Run everything `repeat` times, in turn; return the comparison as a Markdown table."""
    with np.load(data) as file:
        train, test = len(file["y_train"]), len(file["y_test"])
    article = [TESTS / "article.py", data, weights, str(epochs)]
    ours = [TESTS.parent / "transfer_vgg16.py", "--data", data, "--weights", weights]
    ours += ["--epochs", str(epochs)]
    second = [*ours, "--learning-rate", "2e-4"]
    once, every_epoch = train + test, epochs * train + 2 * test
    # name, command, directory, dtype, images that VGG16 sees
    runs = [
        ("the article's plain code", article, "article", "float32", every_epoch),
        ("`transfer_vgg16.py`", ours, "ours", "float32", once),
        ("again, `--learning-rate 2e-4`", second, "ours", "float32", 0),
        (
            "`--precision mixed_bfloat16`",
            [*ours, "--precision", "mixed_bfloat16"],
            "bfloat16",
            "bfloat16",
            once,
        ),
    ]
    results = {name: [] for name, *_ in runs}
    for i in range(repeat):
        for name, command, directory, dtype, images in runs:
            rate = matmul_rate(dtype)
            result = run(command, work / f"{directory}-{i}")
            if "base_seconds" in result:
                result["images"] = images / result["base_seconds"]
                result["gflops"] = result["images"] * GFLOP_PER_IMAGE
                result["share"] = result["gflops"] / rate
            results[name].append(result)
            print(f"{name}: {result}", flush=True)

    def median(name, key):
        return statistics.median(result[key] for result in results[name])

    rows = [
        ["run", "seconds", "times faster", "images/s", "GFLOP/s", "share of matmul", "peak GB"]
        + ["val loss", "val accuracy", "test loss", "test accuracy"]
    ]
    for name, *_ in runs:
        ratio = median(runs[0][0], "seconds") / median(name, "seconds")
        row = [name, f"{median(name, 'seconds'):.1f}", f"{ratio:.2f}"]
        if "images" in results[name][0]:
            row += [f"{median(name, 'images'):.0f}", f"{median(name, 'gflops'):.0f}"]
            row += [f"{median(name, 'share'):.0%}"]
        else:
            row += ["-"] * 3
        row += [f"{median(name, 'peak'):.2f}"]
        row += [
            f"{median(name, key):.4f}" for key in ("val_loss", "val_accuracy", "loss", "accuracy")
        ]
        rows.append(row)
    return table(rows)


def count_operations(flags, train, val, test):
    """Return the floating-point operations of a run on so many images, 2 for a multiply-add.

    A step of the training counts thrice its forward pass: the gradients of the activations and of
    the weights cost one each. After it, the test images are evaluated and predicted, and those to
    validate with predicted. With --mirror, VGG16 runs over all mirror images as well, and those to
    validate and to test with are predicted, too. Only convolutions and dense layers count.
    """
    import keras

    size, unfreeze = int(flags.get("--image-size", 32)), int(flags.get("--unfreeze", 0))
    blocks = [0] * 5
    base = keras.applications.VGG16(include_top=False, weights=None, input_shape=(size, size, 3))
    for layer in base.layers:
        if layer.weights:
            _, height, width, _ = layer.output.shape
            blocks[int(layer.name[5]) - 1] += 2 * math.prod(layer.kernel.shape) * height * width
    head = 2 * (256 * base.output.shape[1] ** 2 * 512 + 256 * 10)
    mirror = "--mirror" in flags
    once = (1 + mirror) * (train + val + test) * sum(blocks)
    epochs = 10 * (3 * train + val) * head
    if unfreeze:
        fine = int(flags.get("--fine-tune-epochs", 3)) * (3 * train + val)
        fine += test + (1 + mirror) * (test + val)
        epochs += fine * (sum(blocks[5 - unfreeze :]) + head)
    return once + epochs


def climb(data, weights, rungs, path, work):
    """Run the ladder's `rungs` that are not in the JSON file `path` yet; return a Markdown table.

    One that takes less than five minutes is run with two more seeds.
    """
    with np.load(data) as file:
        train, test = len(file["y_train"]), len(file["y_test"])
    val = train // 5
    results = json.loads(path.read_text()) if path.exists() else {}  # by images and flags
    flags, names = {}, {}
    for i, more in enumerate(LADDER):
        flags |= more
        name = " ".join(["+", *(f"{flag} {value}".strip() for flag, value in more.items())])
        words = [word for item in flags.items() for word in item if word]
        key = " ".join([f"{train} images", *words])
        names[key] = name if more else "the article's settings"
        if key in results or i not in rungs:
            continue
        command = [TESTS.parent / "transfer_vgg16.py", "--data", data, "--weights", weights]
        command += words
        runs = [run(command, work / str(i))]
        if runs[0]["seconds"] < 300:
            runs += [run([*command, "--seed", seed], work / str(i)) for seed in ("1", "2")]
        operations = count_operations(flags, train - val, val, test)
        results[key] = {"runs": runs, "operations": operations}
        print(f"{names[key]}: {results[key]}", flush=True)
        path.write_text(json.dumps(results, indent=1))

    results = {name: results[key] for key, name in names.items() if key in results}
    rows = [["flags", "test accuracy", "lowest-highest", "averaged", "TFLOP"]]
    rows[0] += ["peak GB", "disk GB"]
    for name, rung in results.items():
        first, runs = rung["runs"][0], rung["runs"]
        accuracies = [one["accuracy"] for one in runs]
        row = [name if name.startswith("the") else f"`{name}`"]
        row += [f"{statistics.mean(accuracies):.4f}"]
        spread = f"{min(accuracies):.4f}-{max(accuracies):.4f}"
        row += [spread if len(accuracies) > 1 else "seed 0 only"]
        averaged = [one["averaged"] for one in runs if one["averaged"]]
        row += [f"{statistics.mean(averaged):.4f}" if averaged else "-"]
        row += [f"{rung['operations'] / 1e12:.0f}"]
        row += [f"{first['peak']:.2f}", f"{first['disk']:.2f}"]
        rows.append(row)
    return table(rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="an .npz file in Keras's layout")
    parser.add_argument("weights", type=Path, help="VGG16's weights without its top, .h5")
    parser.add_argument("--images", type=int, help="only so many training images, a fifth to test")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=1, help="run all in turn, so many times")
    parser.add_argument("--output", type=Path, help="write the table here, as Markdown")
    parser.add_argument(
        "--ladder",
        type=Path,
        metavar="FILE.json",
        help="measure the way up instead; keep each rung in this file",
    )
    parser.add_argument("--rungs", type=int, nargs="*", default=range(len(LADDER)))
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        data = args.data.resolve()
        if args.images:
            with np.load(data) as file:
                test = max(1, args.images // 5)
                data = save_part(work / "data.npz", file, args.images, test)
        if args.ladder:
            markdown = climb(data, args.weights.resolve(), args.rungs, args.ladder, work)
        else:
            markdown = compare(data, args.weights.resolve(), args.epochs, args.repeat, work)
    print(markdown)
    if args.output:
        args.output.write_text(markdown, encoding="utf-8")


if __name__ == "__main__":
    main()
