"""Photos a second and peak memory of load_photos, beside Keras's image_dataset_from_directory.

Draws 5,000 JPEG files of 500 by 375 pixels in two classes and reads them in 128 by 128 pixels, in
turn, each time in a process of its own. Keras's dataset is gone through once and not kept, while
load_photos keeps one array of all photos and has looked for copies before.

    python tests/benchmark_photos.py
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

COUNT, SIZE, ROUNDS = 5000, 128, 2


def draw_photos(directory):
    """Write the files: soft shapes with some noise, about as large as photos of that size."""
    random = np.random.default_rng(0)
    noise = random.normal(0, 7, (375, 500, 3))
    for i in range(COUNT):
        shapes = Image.fromarray(random.integers(0, 256, (12, 16, 3), "uint8"))
        pixels = np.asarray(shapes.resize((500, 375), Image.Resampling.BICUBIC))
        pixels = pixels + np.roll(noise, i, axis=(0, 1))
        path = directory / "ab"[i % 2] / f"{i:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(path, quality=88)


def megabytes():
    """Return this process's peak memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read(reader, directory):
    """Print the seconds that reading took, and the peak memory before and after."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import transfer_vgg16

    before, start = megabytes(), time.perf_counter()
    if reader == "load_photos":
        data, _ = transfer_vgg16.load_photos(Path(directory), SIZE)
        count = sum(len(images) for images, _ in data.values())
    else:
        keras = transfer_vgg16.keras
        dataset = keras.utils.image_dataset_from_directory(directory, image_size=(SIZE, SIZE))
        count = sum(len(images) for images, _ in dataset)
    assert count == COUNT
    seconds = time.perf_counter() - start
    print(f"{reader}: {COUNT / seconds:,.0f} photos/s, {before:,.0f} -> {megabytes():,.0f} MB")


def main():
    """Draw the photos and let both readers read them, in turn."""
    with tempfile.TemporaryDirectory() as directory:
        draw_photos(Path(directory))
        size = sum(path.stat().st_size for path in Path(directory).glob("*/*")) / COUNT
        print(f"{COUNT:,} files of {size / 1000:.0f} kB on average")
        for reader in ["load_photos", "image_dataset_from_directory"] * ROUNDS:
            command = [sys.executable, __file__, reader, directory]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(output.strip().split("\n")[-1], flush=True)


if __name__ == "__main__":
    read(*sys.argv[1:]) if sys.argv[1:] else main()
