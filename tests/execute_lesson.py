"""Run the lesson, docs/lesson.ipynb and docs/ja/lesson.ipynb, and store its outputs.

    python tests/execute_lesson.py --data cifar10.npz --weights vgg16_notop.weights.h5
    python tests/execute_lesson.py --output-dir try          without a network: on the drawings
    python tests/execute_lesson.py docs/lesson.ipynb         only this one

Each one runs in a kernel of its own, in a copy of the script and data/. --data and --weights take
the place of the values in the cell that is tagged "parameters", while it runs. Large pictures are
made smaller; what would differ from run to run, such as the times of cells, is not stored.
"""

import argparse
import base64
import copy
import io
import shutil
import tempfile
from pathlib import Path

import nbclient
import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [ROOT / "docs" / "lesson.ipynb", ROOT / "docs" / "ja" / "lesson.ipynb"]
WIDTH = 900  # pixels of a stored picture at most


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("notebooks", type=Path, nargs="*", default=NOTEBOOKS, help="(both)")
    add("--data", type=Path, help="an .npz file (CIFAR-10, or without a network the drawings)")
    add("--weights", type=Path, help="VGG16's, an .h5 file (Keras's, or else the copy in data/)")
    add("--output-dir", type=Path, help="write the notebooks there, and not in their own places")
    add("--until", default="", help="leave out what comes after the first cell with this text")
    args = parser.parse_args()
    if args.until and not args.output_dir:
        parser.error("--until leaves out cells, which are not to be lost: add --output-dir")
    for path in map(Path.resolve, args.notebooks):
        notebook = execute(path, args.data, args.weights, args.until)
        target = path
        if args.output_dir:
            target = args.output_dir / path.relative_to(ROOT / "docs")
            target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
        print(f"{target} is executed", flush=True)


def execute(path, data=None, weights=None, until=""):
    """Return the notebook in the file `path`, executed in a kernel; it raises a cell's error."""
    notebook = nbformat.read(path, as_version=4)
    if until:
        last = next(i for i, cell in enumerate(notebook.cells) if until in cell.source)
        del notebook.cells[last + 1 :]
    running = copy.deepcopy(notebook)
    for cell in running.cells:
        if "parameters" in cell.metadata.get("tags", []):
            paths = [str(file.resolve()) if file else None for file in (data, weights)]
            cell.source = f"DATA, WEIGHTS = {paths}"
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(ROOT / "transfer_vgg16.py", directory)
        shutil.copytree(ROOT / "data", Path(directory) / "data")
        place = Path(directory) / path.relative_to(ROOT).parent
        place.mkdir(parents=True)
        resources = {"metadata": {"path": str(place)}}
        nbclient.NotebookClient(
            running, kernel_name="python3", timeout=None, resources=resources, record_timing=False
        ).execute()
    for cell, done in zip(notebook.cells, running.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = join(done.outputs), done.execution_count
            for output in cell.outputs:
                shrink(output)
    return notebook


def join(outputs):
    """Return a cell's outputs with texts that were printed one after the other as one."""
    joined = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output.output_type == "stream" and output.name == last.get("name"):
            last.text += output.text
        else:
            joined.append(output)
    return joined


def shrink(output):
    """Make the picture in a cell's output smaller, if it has one: up to WIDTH, in 256 colours."""
    text = output.get("data", {}).get("image/png")
    if not text:
        return
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        image = image.convert("RGB")
        if image.width > WIDTH:
            size = (WIDTH, round(image.height * WIDTH / image.width))
            image = image.resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.quantize(256).save(file, "PNG", optimize=True)
    output.data["image/png"] = base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    main()
