#!/usr/bin/env python3
"""Use the model that transfer_vgg16.py saved: evaluate it, or ask it what is in a picture.

python predict_saved.py                    evaluate vgg16_cifar10.keras of this directory
python predict_saved.py photo.jpg album    what is in a picture, and in those of a directory
python predict_saved.py --figure answer.png photo.jpg
                                           the same, drawn
python predict_saved.py --model DIR/vgg16_cifar10.keras --data photos
                                           evaluate on the test photos
python predict_saved.py --serve            a page on this computer where anybody drops a photo
python predict_saved.py --help             all arguments
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

import os
import sys

if __name__ == "__main__":  # last in the path: a random.py beside this file replaces no other
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path.sort(key=lambda path: os.path.realpath(path) == here)
    if here not in sys.path:  # python -P
        sys.path.append(here)

import contextlib
import functools
import glob
import html
import json
import logging
import shutil
import signal
import socket
import tempfile
import time
import unicodedata
import zipfile
from pathlib import Path

import transfer_vgg16


@transfer_vgg16.guarded
def main(argv=()):
    """Name what is in the pictures that were given, or evaluate the saved model."""
    args = parse_arguments(argv)
    transfer_vgg16.start_clean()
    model, notes = load_model(args.model)
    if args.serve:
        return serve(model, notes, args.host or "127.0.0.1")
    if args.images:
        return name_pictures(model, notes, args.images, args.figure)
    class_names = notes["class_names"]
    x_test, y_test = load_test_data(args, model, class_names)

    # ===== evaluateを使ったテストデータでの評価 / Evaluate on the test images
    verbose = transfer_vgg16.verbosity()
    fast = transfer_vgg16.FrozenOnce(model, mirror=notes["mirror"])  # ours: VGG16 runs once
    print(fast.evaluate(x_test, y_test, verbose=verbose))

    # ===== predictを使って予測結果を表示 / Predict the test images
    preds = transfer_vgg16.temper(fast.predict(x_test, verbose=verbose), notes["temperature"])
    if notes["mirror"]:
        transfer_vgg16.print_averaged(preds, y_test)
    transfer_vgg16.print_balance(preds, y_test, class_names)
    transfer_vgg16.print_prediction(preds[0], y_test[0], class_names)
    return 0


def parse_arguments(argv):
    """Return the arguments `argv`, a list of strings; end with status 2 if one is wrong."""
    parser = transfer_vgg16.make_parser("predict_saved.py", "Use the model that was saved.")
    add, path = parser.add_argument, transfer_vgg16.parse_path
    model = Path(transfer_vgg16.MODEL_FILE)
    add("images", type=path, nargs="*", help="name the classes of these pictures or directories")
    add("--model", type=path, default=model, help="the file of the model (%(default)s)")
    add("--data", type=path, help="an .npz file or a directory to test on (CIFAR-10)")
    add("--all", action="store_true", help="test on all photos of --data, all new to the model")
    add("--figure", type=path, help="draw the first 25 pictures and their classes into this .png")
    add("--serve", action="store_true", help="open a page in the browser that names pictures")
    add("--host", type=str, help="let others open the page, at this address (127.0.0.1)")
    argv = [str(word) for word in argv]
    end = argv.index("--") if "--" in argv else len(argv)
    # Python 3.11 takes what follows "--" for options all the same
    names = [os.path.join(os.curdir, name) for name in argv[end + 1 :]]
    args = parser.parse_intermixed_args([*argv[:end], *names])
    if args.images and args.data:
        parser.error("--data is what to evaluate on: leave it out if you give pictures")
    if any(".keras" in path.suffixes for path in args.images):
        parser.error("a .keras file is a model: give it with --model")
    if args.all and not transfer_vgg16.has_photos(args):
        parser.error("--all is for a directory of photos: give it with --data")
    if args.serve and (args.images or args.data):
        parser.error("--serve opens a page that takes the pictures: leave out pictures and --data")
    if args.host and not args.serve:
        parser.error("--host says where the page of --serve can be opened: add --serve")
    if args.figure and not args.images:
        parser.error("--figure draws pictures: name some")
    if args.figure and args.figure.suffix.lower() != ".png":
        parser.error(f"argument --figure: {args.figure} does not end in .png")
    if args.figure and not args.figure.parent.is_dir():
        parser.error(f"argument --figure: the directory {args.figure.parent} does not exist")
    return args


def load_model(path):
    """Return the trained model in the file `path`, and what read_notes() returns.

    The model maps images (n, size, size, 3), 0-255 RGB, to probabilities (n, classes).
    Errors: status 2 if `path` is not such a file. Keras's safe mode stays on, so that no code
    in the file is run.
    """
    fail, keras = transfer_vgg16.fail, transfer_vgg16.keras
    if (path / "metadata.json").exists():
        fail(
            f"{path} is a .keras file that was unpacked, as some browsers do: zip what is in it, "
            "without a directory around it, and let the name of the .zip file end in .keras"
        )
    if path.is_dir():
        fail(f"{path} is a directory: give --model the .keras file in it")
    if not path.exists():
        other = path.parent / "demo" / path.name
        other = f"{other}, the demo's" if other.exists() else "another file"
        fail(f"{path} does not exist: run transfer_vgg16.py first, or give --model {other}")
    if path.suffix != ".keras" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = archive.namelist()
        if "metadata.json" in inside:
            fail(f"{path} is a .keras file under another name: let its name end in .keras")
        if any(name.endswith((".keras", "metadata.json")) for name in inside):
            fail(f"{path} is an archive: unpack it, and give --model the .keras file from it")
    problem = f"{path} is not a model that transfer_vgg16.py saved, or it is damaged"
    version, way = read_keras_version(path), "run transfer_vgg16.py again"
    if version not in (None, keras.__version__):
        problem = (
            f"{path} was saved by Keras {version}, and Keras {keras.__version__} cannot load it"
        )
        way = f"install Keras {version}, or train again"
    with transfer_vgg16.fail_with(problem, way):
        model = keras.models.load_model(path)
        notes = read_notes(path)
        size, classes = model.input_shape[1], model.output_shape[-1]
        takes_pictures = model.input_shape == (None, size, size, 3)
        ours = takes_pictures and model.output_shape == (None, classes) and model.compiled
        ours = ours and (notes["class_names"] or model.loss == "sparse_categorical_crossentropy")
    if not ours:
        fail(
            f"{path} is not a model that transfer_vgg16.py saved: give --model the path of its "
            f"{transfer_vgg16.MODEL_FILE}"
        )
    # main() names its input "image", the article does not. A model of ours without class names
    # was saved again by another program, which lost them
    article = model.input_shape == (None, 32, 32, 3) and model.inputs[0].name != "image"
    if notes["class_names"] is None and article and classes == 10:
        print(f"{path} names no classes: they are taken to be CIFAR-10's, as in the article")
        notes["class_names"] = transfer_vgg16.CLASS_NAMES
    if classes != len(notes["class_names"] or []):
        fail(
            f"{path} does not have the names of its classes, which are lost if a program saves "
            "the model again: give --model the file that transfer_vgg16.py wrote"
        )
    return model, notes


def read_notes(path):
    """Return what transfer_vgg16.py noted in the .keras file `path`, as a dict.

    class_names: list of str, or None; mirror: whether it was trained on mirror images as well;
    temperature: see transfer_vgg16.temper(); test: {"accuracy": float, "images": int} of its own
    test images, or None.
    """
    notes = {"class_names": None, "mirror": False, "temperature": 1, "test": None}
    with zipfile.ZipFile(path) as archive:
        if archive.comment:  # where older models have the names
            notes["class_names"] = json.loads(archive.comment)
        for name in notes:
            if f"{name}.json" in archive.namelist():
                notes[name] = json.loads(archive.read(f"{name}.json"))
    if notes["class_names"]:  # in an older model, as its directories' names were written
        names = [unicodedata.normalize("NFC", name).strip() for name in notes["class_names"]]
        notes["class_names"] = names
    return notes


def read_keras_version(path):
    """Return the version of Keras that saved the file `path`, or None."""
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("metadata.json"))["keras_version"]
    return None


def load_test_data(args, model, class_names):
    """Return the images and labels to evaluate on, of args.data or of CIFAR-10.

    Images: uint8 RGB (n, size, size, 3); labels: integers (n, 1), as in `class_names`.
    Errors: status 2 if the model knows other classes.
    """
    fail, known = transfer_vgg16.fail, transfer_vgg16.name_some(class_names)
    if transfer_vgg16.has_photos(args):
        where = transfer_vgg16.printable(args.data)
        parts, found = transfer_vgg16.find_photos(args.data, known=class_names)
        if unknown := [name for name in found if name not in class_names]:
            fail(
                f"the model knows {known}, but {where} has {transfer_vgg16.name_some(unknown)}: "
                "give --data directories named like the model's classes"
            )
        files = list(dict.fromkeys(sum(parts.values(), []))) if args.all else parts["test"]
        if not files:
            fail(f"{where} has no photos to test with: add --all to take all of them")
        paths = [path for path, _ in files]
        labels = [[class_names.index(found[label])] for _, label in files]
        images, readable, _ = transfer_vgg16.read_photos(paths, model.input_shape[1])
        if len(images) == 0:
            fail(f"none of the test photos in {where} can be read: give --data another directory")
        return images, transfer_vgg16.np.array(labels)[readable]
    data = args.data
    if not data and class_names != transfer_vgg16.CLASS_NAMES:
        data = transfer_vgg16.DEMO_DATA  # whose classes it may know
    if data:
        _, test, found = transfer_vgg16.load_arrays(data)
    elif transfer_vgg16.download_cifar10():
        problem = transfer_vgg16.CIFAR10_PROBLEM
        with transfer_vgg16.fail_with(problem, "free some space, try again"):
            _, test = transfer_vgg16.cifar10.load_data()
        found = transfer_vgg16.CLASS_NAMES
    else:
        fail(
            "CIFAR-10 could not be downloaded, as said above: give --data a local file, or see "
            "docs/classroom.md"
        )
    if class_names != found:
        fail(
            f"the model knows {known}, and not the classes of "
            f"{args.data or 'CIFAR-10'}: give it pictures, or --data with a directory of such "
            "photos"
        )
    if test[0].shape[1:] != model.input_shape[1:]:
        fail(
            f"the model takes images of {model.input_shape[1]} pixels, and {data or 'CIFAR-10'} "
            "has smaller ones: give --data a directory of photos"
        )
    return test


def list_pictures(paths):
    """Return the files that `paths` name: a file, the pictures of a directory, or a pattern."""
    files = []
    for path in sum(map(expand, paths), []):
        if path.is_dir():
            pictures, _, others = transfer_vgg16.find_pictures(path)
            name = transfer_vgg16.printable(path)
            print(f"{name}: {len(pictures):,} pictures, {others:,} other files")
            files += pictures
        else:
            files.append(path)
    return files


def expand(path):
    """Return what a pattern such as pets/*.jpg names, as a list of paths; itself if nothing.

    A Windows prompt leaves this to programs.
    """
    found = [] if path.exists() else glob.glob(str(path).replace("[", "[[]"))
    return sorted(map(Path, found)) or [path]


def classify(model, notes, images):
    """Return the probabilities (n, classes) of uint8 images (n, size, size, 3).

    They are averaged over images and mirror images, and tempered, as the `notes` say.
    """
    fast = transfer_vgg16.FrozenOnce(model, mirror=notes["mirror"])
    at_once, parts = transfer_vgg16.images_at_once(model), []
    for first in range(0, len(images), at_once):  # one step each: nothing is kept in memory
        parts.append(fast.predict(images[first : first + at_once], at_once, verbose=0))
    return transfer_vgg16.temper(transfer_vgg16.np.concatenate(parts), notes["temperature"])


def name_pictures(model, notes, paths, figure):
    """Print the three likeliest classes of each picture; draw them into the file `figure`, if any.

    Return the exit status: 2 if a file is no picture; the others are answered all the same.
    """
    files = list_pictures(paths)
    if figure:
        check_figure(figure, files)
    images, readable, errors = transfer_vgg16.read_photos(files, model.input_shape[1])
    if len(images) == 0:
        found = "none of the pictures can be read, as said above: give others"
        transfer_vgg16.fail(found if errors else "no pictures were found: give the paths of some")
    preds = classify(model, notes, images)
    for index, probabilities in zip(readable, preds, strict=True):
        answer = ", ".join(transfer_vgg16.likeliest(probabilities, notes["class_names"]))
        print(f"{transfer_vgg16.printable(files[index])}: {answer}")
    if figure:
        captions = [transfer_vgg16.printable(files[index].name) for index in readable[:25]]
        names, mirror = notes["class_names"], notes["mirror"]
        with transfer_vgg16.fail_with(f"{figure} could not be drawn", "leave out --figure"):
            transfer_vgg16.plot_pairs(
                model, images[:25], preds[:25], names, figure, captions, mirror=mirror, needed=True
            )
    return 2 if errors else 0


def check_figure(path, pictures):
    """End with status 2 if the figure `path` is one of the pictures, or another program's."""
    if not path.exists():
        return
    if any(picture.exists() and picture.samefile(path) for picture in pictures):
        transfer_vgg16.fail(f"{path} is one of the pictures: give --figure another name")
    with contextlib.suppress(Exception), transfer_vgg16.Image.open(path) as image:
        if image.info.get("Software") == transfer_vgg16.SOFTWARE:
            return
    transfer_vgg16.fail(
        f"{path} exists, and is not a figure of this program: give --figure another name"
    )


def serve(model, notes, host):
    """Serve a page that names the pictures it is given, at the address `host`, until Ctrl-C.

    What is uploaded is deleted within two minutes, and when the page ends.
    Errors: status 2 without Gradio, or if nothing can be served at `host`.
    """
    with upload_directory(host) as uploads:
        try:
            import gradio

            found = int(gradio.__version__.split(".")[0]) >= 6
        except ImportError:
            found = False
        if not found:
            transfer_vgg16.fail(
                "the page needs Gradio 6: pip install -r requirements-page.txt, or uv run "
                "--with-requirements requirements-page.txt predict_saved.py --serve"
            )
        size = model.input_shape[1]
        answer_image(model, notes, transfer_vgg16.np.zeros((size, size, 3), "uint8"))  # warms up
        page = lay_out_page(gradio, functools.partial(answer, model, notes), notes, uploads)
        with transfer_vgg16.fail_with(f"no page can be served at {host}", "choose another --host"):
            socket.create_server((host, 0)).close()  # Gradio would wait for ever
        problem = f"Gradio {gradio.__version__} cannot serve the page at {host}"
        way = "install Gradio 6, or see that no proxy hides this computer"
        with transfer_vgg16.fail_with(problem, way):
            _, url, _ = page.launch(
                server_name=host,
                inbrowser=transfer_vgg16.has_screen(),
                max_file_size="20mb",
                allowed_paths=[str(uploads)],  # also where a name begins with a dot
                footer_links=[],
                share=False,  # in Colab, and where GRADIO_SHARE says so, it would be in public
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
                css=PAGE_CSS,
                js=PAGE_JS,
            )
        if host not in ("127.0.0.1", "localhost"):
            print(
                "Everybody in the network can use the page, at this computer's name or address "
                f"and port {page.server_port}, and uploads are not encrypted: leave out --host to "
                "keep the page to yourself"
            )
        # Say nothing of browsers that are closed during an upload
        logging.getLogger("uvicorn.error").setLevel("CRITICAL")
        print(f"The page is at {url}: Ctrl-C here ends it", flush=True)
        examples = set(uploads.rglob("*"))  # nobody has uploaded anything yet
        try:
            # Nor of what strangers send: Gradio would print a traceback
            with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
                while True:  # not Gradio's delete_cache: it forgets uploads that were broken off
                    time.sleep(1)
                    delete_old_files(uploads, 90, examples)
        finally:
            page.close(verbose=False)


def answer(model, notes, path):
    """Return what the page shows for the picture in the file `path`, or why there is no answer.

    A sentence; the probabilities {class name: float}; the picture as the model sees it, and where
    it looked, uint8 RGB (size, size, 3). What there is not is None.
    """
    try:
        image = transfer_vgg16.read_photo(Path(path), model.input_shape[1])
    except Exception as error:  # Pillow has other ones for each format
        # Visitors need not know where the file is
        reason = str(error).replace(repr(path), Path(path).name) or type(error).__name__
        reason = transfer_vgg16.first_line(reason)
        sentence = (
            "画像として読めません。別のファイルを選んでください / "
            f"This file cannot be read as a picture: choose another one ({reason})"
        )
        return html.escape(sentence), None, None, None
    try:
        return "", *answer_image(model, notes, image)
    except Exception as error:
        print(f"A picture got no answer: {transfer_vgg16.first_line(error)}", flush=True)
        return "答えられませんでした / There was an error: try again", None, None, None


def answer_image(model, notes, image):
    """Return the last three values of answer() for the uint8 RGB array `image`."""
    probabilities = classify(model, notes, image[None])
    best = probabilities.argmax(axis=1)
    look = transfer_vgg16.highlight(model, image[None], best, notes["mirror"])[0]
    named = dict(zip(notes["class_names"], map(float, probabilities[0]), strict=True))
    return named, image, look


EXAMPLES = transfer_vgg16.DEMO_DATA

PAGE_CSS = """
.app {padding: 8px !important}
main {gap: 8px !important; padding: 0 8px !important}
h1 {margin: 0 !important}
.prose {font-size: 18px !important}
#seen, #looked {aspect-ratio: 1; max-height: calc(100vh - 310px)}
#seen img, #looked img {width: 100%; height: 100%; object-fit: contain; object-position: top}
#seen .icon-button-wrapper, #looked .icon-button-wrapper {display: none}
#answer .confidence-set {font-size: 18px}
#answer .bar {height: 12px}
#examples .grid-container {grid-template-columns: repeat(5, minmax(0, 64px))}
#examples .thumbnail-item {max-height: 64px}
#message .prose {font-weight: bold; color: #c00}
@media (max-width: 700px) {
    h1 {font-size: 20px !important}
    .prose {font-size: 14px !important}
    #columns {flex-direction: column}
    #left {display: contents}
    #message, #answer {order: 1}
    #right {order: 2}
    #left .tabs, #examples {order: 3}
    #pictures {flex-wrap: nowrap}
}
"""

PAGE_JS = """() => document.addEventListener("paste", event => {
    const input = document.querySelector("#photo input[type=file]");
    if (input && event.clipboardData.files.length) {
        input.files = event.clipboardData.files;
        input.dispatchEvent(new Event("change", {bubbles: true}));
    }
})"""


def lay_out_page(gradio, answer, notes, uploads):
    """Return the page, a gradio.Blocks: what goes in and the answer, then the two pictures.

    `answer` takes a path, and returns what answer() does; `uploads` is where uploaded files are.
    """

    def keep_path(upload):  # Gradio would decode the picture, which answer() does
        if upload and upload.url and upload.url.startswith("data:"):  # a frame of the camera
            return gradio.processing_utils.save_base64_to_cache(upload.url, str(uploads))
        if upload and not Path(upload.path).resolve().is_relative_to(uploads.resolve()):
            raise gradio.Error("this file was not uploaded", print_exception=False)
        return upload and upload.path

    def respond(path):
        return answer(path) if path else gradio.skip()  # as when the camera is switched off

    def answer_example(event: gradio.SelectData):
        return answer(examples[event.index])

    def show_picture(caption, name):
        with gradio.Column(min_width=150):
            gradio.HTML(caption)
            return gradio.Image(
                format="png", buttons=[], show_label=False, container=False, elem_id=name
            )

    title, examples = "これは何? / What is this?", save_examples(notes["class_names"], uploads)
    with gradio.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gradio.HTML(f"<h1>{title}</h1>{html.escape(describe(notes))}", elem_id="known")
        with gradio.Row(elem_id="columns"):
            with gradio.Column(scale=1, min_width=320, elem_id="left"):
                with gradio.Tab("写真 / Photo"):
                    photo = gradio.Image(
                        show_label=False,
                        height=200,
                        elem_id="photo",
                        placeholder="写真を置く、Ctrl+V / Drop or paste a photo (20 MB)",
                    )
                with gradio.Tab("カメラ / Live camera"):
                    camera = gradio.Image(
                        streaming=True, show_label=False, height=200, elem_id="camera"
                    )
                message = gradio.HTML(elem_id="message")
                label = gradio.Label(num_top_classes=3, show_label=False, elem_id="answer")
            with gradio.Column(scale=3, elem_id="right"):
                with gradio.Row(elem_id="pictures"):
                    seen = show_picture("モデルに見える画像 / What the model sees", "seen")
                    looked = show_picture("注目した場所 / Where it looked", "looked")
                with gradio.Row():
                    gradio.HTML(
                        "赤いほど、答えの根拠になった場所です / Red: what spoke for the answer"
                    )
                    gallery = gradio.Gallery(
                        examples,
                        columns=5,
                        height=82,
                        allow_preview=False,
                        buttons=[],
                        show_label=False,
                        container=False,
                        visible=bool(examples),
                        elem_id="examples",
                    )
        photo.preprocess = camera.preprocess = keep_path
        shown, quiet = [message, label, seen, looked], {"show_progress": "hidden"}
        asked = photo.input(respond, photo, shown, api_name="answer", concurrency_limit=2, **quiet)
        quiet["api_visibility"] = "private"
        asked.then(lambda: None, None, photo, **quiet)  # makes room for the next one
        gallery.select(answer_example, None, shown, **quiet)
        # Of the frames that come in while it computes, only the last one counts
        camera.stream(
            respond, camera, shown, stream_every=1, time_limit=None, concurrency_limit=4, **quiet
        )
    return page


def save_examples(class_names, directory):
    """Save a test picture of each of five classes into `directory`; return the paths.

    Only a model that was trained on the clip art in data/ has some.
    """
    np, paths = transfer_vgg16.np, []
    with contextlib.suppress(OSError), np.load(EXAMPLES) as data:
        if list(data["class_names"]) == class_names:
            for label in range(5):
                first = data["x_test"][data["y_test"].ravel() == label][0]
                paths.append(directory / f"example-{label}.png")
                transfer_vgg16.Image.fromarray(first).save(paths[-1])
    return paths


def describe(notes):
    """Return which classes the model knows, and how many of its own test pictures it got right."""
    names, test = notes["class_names"], notes["test"]
    known = ", ".join(names[:20]) + (f" … ({len(names)})" if len(names) > 20 else "")
    text = f"知っているクラス / It knows: {known}"
    if test:
        right = f"{test['accuracy']:.0%} ({test['images']:,})"
        text += f" — テスト画像での正解率 / Right for its own test pictures: {right}"
    return text


@contextlib.contextmanager
def upload_directory(host):
    """Give Gradio a directory for what is uploaded, deleted at the end, and its settings.

    What a page of this computer left there that was killed is deleted as well.
    """
    uploads = Path(tempfile.gettempdir()) / "transfer_vgg16-uploads-"
    for old in uploads.parent.glob(f"{transfer_vgg16.PARTIAL}*-{uploads.name}*"):
        if transfer_vgg16.is_of_no_run(old):
            shutil.rmtree(old, ignore_errors=True)
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {  # closing the terminal counts as a Ctrl-C
        number: signal.signal(number, signal.default_int_handler) for number in numbers
    }
    environment = dict(os.environ)
    others = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    try:
        with tempfile.TemporaryDirectory(
            prefix=transfer_vgg16.partial_path(uploads).name,
            ignore_cleanup_errors=True,  # Windows, where one is still open
        ) as directory:
            os.environ |= {"GRADIO_TEMP_DIR": directory, "GRADIO_RUN_HISTORY": "False"}
            os.environ["no_proxy"] = f"localhost,{host},{others}"  # Gradio calls its own address
            yield Path(directory)
    finally:
        os.environ.clear()
        os.environ |= environment
        for number, handler in handlers.items():
            signal.signal(number, handler)


def delete_old_files(directory, seconds, keep=()):
    """Delete the files below `directory` that were written `seconds` ago or more, but `keep`."""
    for path in set(directory.rglob("*")) - set(keep):
        with contextlib.suppress(OSError):  # on Windows, one that is still open
            if path.is_file() and path.stat().st_mtime < time.time() - seconds:
                path.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
