#!/usr/bin/env python3
"""Use the model that transfer_vgg16.py saved: evaluate it, or ask it what is in a picture.

python predict_saved.py                    evaluate vgg16_cifar10.keras of this directory
python predict_saved.py photo.jpg album    what is in a picture, and in those of a directory
python predict_saved.py --figure answer.png photo.jpg
                                           the same, drawn
python predict_saved.py --model DIR/vgg16_cifar10.keras --data photos
                                           evaluate on the photos that no training saw
python predict_saved.py --serve            a page on this computer where anybody drops a photo
python predict_saved.py --help             all arguments
"""

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import unicodedata
import zipfile
from pathlib import Path

import transfer_vgg16


@transfer_vgg16.guarded
def main(argv=None):
    """Name what is in the pictures that were given, or evaluate the saved model."""
    args = parse_arguments(argv or [])
    transfer_vgg16.import_libraries()
    model, notes = load_model(args.model)
    if args.serve:
        return serve(model, notes, args.host or "127.0.0.1")
    if args.images:
        return name_pictures(model, notes, args.images, args.figure)
    class_names = notes["class_names"]
    x_test, y_test = load_test_data(args, model, class_names)

    # ===== evaluateを使ったテストデータでの評価 / Evaluate on the test images
    verbose, at_once = transfer_vgg16.verbosity(), transfer_vgg16.images_at_once(model)
    test = transfer_vgg16.batches(x_test, y_test, batch_size=at_once)
    print(model.evaluate(test, verbose=verbose))

    # ===== predictを使って予測結果を表示 / Predict the test images
    preds = classify(model, notes, x_test, verbose)
    if notes["mirror"]:
        transfer_vgg16.print_averaged(preds, y_test)
    transfer_vgg16.print_balance(preds, y_test, class_names)
    transfer_vgg16.print_prediction(preds[0], y_test[0], class_names)
    return 0


def parse_arguments(argv):
    """Return the arguments `argv`, a list of strings; end with status 2 where one is wrong."""
    parser = transfer_vgg16.make_parser("predict_saved.py", __doc__.split("\n")[0])
    add, path = parser.add_argument, transfer_vgg16.parse_path
    model = Path(transfer_vgg16.MODEL_FILE)
    add("images", type=path, nargs="*", help="name the classes of these pictures or directories")
    add("--model", type=path, default=model, help="the file of the model (%(default)s)")
    add("--data", type=path, help="test on cifar10.npz or a directory (CIFAR-10, downloaded)")
    add("--all", action="store_true", help="test on all photos of --data, which are new to it")
    add("--figure", type=path, help="draw the first 25 pictures and their classes into this .png")
    add("--serve", action="store_true", help="open a page in the browser that names pictures")
    add("--host", type=str, help="let others open the page, at this address (127.0.0.1)")
    end = argv.index("--") if "--" in argv else len(argv)
    # Python 3.11 takes what follows "--" for options all the same
    names = [os.path.join(os.curdir, name) for name in argv[end + 1 :]]
    args = parser.parse_intermixed_args([*argv[:end], *names])
    if args.images and args.data:
        parser.error("--data is what to evaluate on: leave it out where you give pictures")
    if any(".keras" in path.suffixes for path in args.images):
        parser.error("a .keras file is a model: give it with --model")
    if args.all and not transfer_vgg16.has_photos(args):
        parser.error("--all is for a directory of photos: give it with --data")
    if args.serve and (args.images or args.data):
        parser.error("--serve opens a page that takes the pictures: give it none, nor --data")
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
    Errors: status 2 where `path` is not such a file. Keras's safe mode stays on, so that no code
    in the file is run.
    """
    fail, keras = transfer_vgg16.fail, transfer_vgg16.keras
    if (path / "metadata.json").exists():
        fail(
            f"{path} is a .keras file that was unpacked, as some browsers do: pack what is in it "
            "into a .zip file, without a directory around it, and let its name end in .keras"
        )
    if path.is_dir():
        fail(f"{path} is a directory: give --model the .keras file in it")
    if not path.exists():
        fail(f"{path} does not exist: run transfer_vgg16.py first, or give --model another file")
    if path.suffix != ".keras" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = archive.namelist()
        if "metadata.json" in inside:
            fail(f"{path} is a .keras file under another name: let its name end in .keras")
        if any(name.endswith((".keras", "metadata.json")) for name in inside):
            fail(f"{path} is an archive: unpack it, and give --model the .keras file from it")
    try:
        model = keras.models.load_model(path)
        notes = read_notes(path)
        size = model.input_shape[1]
        ours = model.input_shape == (None, size, size, 3)
        ours = ours and "block5_pool" in [layer.name for layer in model.layers]
        ours = ours and getattr(model, "loss", None) == "sparse_categorical_crossentropy"
    except Exception as error:  # a broken file can fail anywhere in Keras, h5py and zipfile
        line, version = transfer_vgg16.first_line(error), read_keras_version(path)
        if version not in (None, keras.__version__):
            fail(
                f"{path} was saved by Keras {version}, and this is Keras {keras.__version__}, "
                f"which cannot load it ({line}): install the other one, or train again"
            )
        fail(
            f"{path} is not a model that transfer_vgg16.py saved, or it is damaged ({line}): run "
            "transfer_vgg16.py again"
        )
    if not ours:
        fail(
            f"{path} is not a model that transfer_vgg16.py saved: give --model the path of its "
            f"{transfer_vgg16.MODEL_FILE}"
        )
    article = model.input_shape == (None, 32, 32, 3) and model.inputs[0].name != "image"  # ours
    if notes["class_names"] is None and article and model.output_shape == (None, 10):
        print(f"{path} names no classes: they are taken to be CIFAR-10's, as in the article")
        notes["class_names"] = transfer_vgg16.CLASS_NAMES
    if model.output_shape != (None, len(notes["class_names"] or [])):
        fail(
            f"{path} does not have the names of its classes, which are lost where a program saves "
            "the model again: give --model the file that transfer_vgg16.py wrote"
        )
    return model, notes


def read_notes(path):
    """Return what transfer_vgg16.py noted in the .keras file `path`, as a dict.

    class_names: list of str, or None; mirror: whether it was trained on mirror images as well;
    temperature: see transfer_vgg16.temper().
    """
    notes = {"class_names": None, "mirror": False, "temperature": 1}
    with zipfile.ZipFile(path) as archive:
        if archive.comment:  # where the names once were
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
    Errors: status 2 where the model knows other classes.
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
            fail(f"{where} has no photos to test with: --all takes all of them")
        paths = [path for path, _ in files]
        labels = [[class_names.index(found[label])] for _, label in files]
        images, readable, _ = transfer_vgg16.read_photos(paths, model.input_shape[1])
        if len(images) == 0:
            fail(f"no photo of {where} to test with can be read: give --data another directory")
        return images, transfer_vgg16.np.array(labels)[readable]
    if class_names != transfer_vgg16.CLASS_NAMES:
        fail(
            f"the model knows {known}, not CIFAR-10's classes: give it pictures, or --data with "
            "a directory of such photos"
        )
    if not args.data and not transfer_vgg16.download_cifar10():
        fail(f"CIFAR-10 could not be downloaded, as said above. {transfer_vgg16.NO_NETWORK}")
    return transfer_vgg16.load_cifar10(args.data)[1]


def list_pictures(paths):
    """Return the files that `paths` name: a file, the pictures of a directory, or a pattern."""
    files = []
    for path in paths:
        if path.is_dir():
            pictures, _, others = transfer_vgg16.find_pictures(path)
            name = transfer_vgg16.printable(path)
            print(f"{name}: {len(pictures):,} pictures, {others:,} other files")
            files += pictures
        elif any(mark in path.name for mark in "*?") and not path.exists():
            # A Windows prompt does not expand it
            files += sorted(path.parent.glob(path.name)) or [path]
        else:
            files.append(path)
    return files


def classify(model, notes, images, verbose=0):
    """Return the probabilities (n, classes) of uint8 images (n, size, size, 3).

    They are averaged over images and mirror images, and tempered, as the `notes` say.
    """
    views = [images, images[:, :, ::-1]] if notes["mirror"] else [images]
    at_once, probabilities = transfer_vgg16.images_at_once(model), 0
    progress = transfer_vgg16.keras.utils.Progbar(len(views) * len(images), verbose=verbose)
    for view in views:
        parts = []
        for first in range(0, len(images), at_once):  # no batches(): the page calls this for ever
            parts.append(model.predict_on_batch(view[first : first + at_once]))
            progress.add(len(parts[-1]))
        probabilities += transfer_vgg16.np.concatenate(parts) / len(views)
    return transfer_vgg16.temper(probabilities, notes["temperature"])


def name_pictures(model, notes, paths, figure):
    """Print the three likeliest classes of each picture; draw them into the file `figure`, if any.

    Return the exit status: 2, after all others are answered, where a file is no picture.
    """
    files = list_pictures(paths)
    if figure:
        check_figure(figure, files)
    images, readable, errors = transfer_vgg16.read_photos(files, model.input_shape[1])
    if errors and len(images) == 0:
        transfer_vgg16.fail("none of the pictures can be read, as said above: give others")
    if len(images) == 0:
        transfer_vgg16.fail("there is no picture to name: give the paths of some")
    preds = classify(model, notes, images)
    for index, probabilities in zip(readable, preds, strict=True):
        answer = ", ".join(transfer_vgg16.likeliest(probabilities, notes["class_names"]))
        print(f"{transfer_vgg16.printable(files[index])}: {answer}")
    if figure:
        names = transfer_vgg16.drawable(notes["class_names"])
        classes, mirror = preds.argmax(axis=1)[:25], notes["mirror"]
        maps = transfer_vgg16.explain(model, images[:25], classes, mirror)
        looks = transfer_vgg16.overlay(images[:25], maps)
        transfer_vgg16.plot_predictions(images, preds, names, figure, looks=looks, needed=True)
    return 2 if errors else 0


def check_figure(path, pictures):
    """End with status 2 where the figure `path` is one of the pictures, or another program's."""
    if not path.exists():
        return
    if any(picture.exists() and picture.samefile(path) for picture in pictures):
        transfer_vgg16.fail(f"{path} is one of the pictures: give --figure another name")
    with contextlib.suppress(Exception), transfer_vgg16.Image.open(path) as image:
        if image.info.get("Software") == transfer_vgg16.SOFTWARE:
            return
    transfer_vgg16.fail(
        f"{path} is there already, and not a figure of this program: give --figure another name"
    )


def serve(model, notes, host):
    """Serve a page that names the pictures it is given, at the address `host`, until Ctrl-C.

    What is uploaded is deleted within two minutes, and when the page ends.
    Errors: status 2 without Gradio, or where nothing can be served at `host`.
    """
    with upload_directory(host) as uploads:
        try:
            import gradio

            found = int(gradio.__version__.split(".")[0]) >= 6
        except ImportError:
            found = False
        if not found:
            transfer_vgg16.fail("the page needs Gradio 6: pip install -r requirements-page.txt")
        size, names = model.input_shape[1], notes["class_names"]
        scale = math.ceil(256 / size)

        def answer(path):
            if path is None:  # the picture was taken away
                return None, None, None
            try:
                image = transfer_vgg16.read_photo(Path(path), size)
            except Exception as error:  # Pillow has other ones for each format
                # Where it lies here is nobody's business
                reason = str(error).replace(repr(path), Path(path).name)
                reason = transfer_vgg16.first_line(reason)
                raise gradio.Error(
                    "画像として読めません。別のファイルを選んでください / "
                    f"This is no picture that can be read: choose another file ({reason})",
                    print_exception=False,
                ) from None
            probabilities = classify(model, notes, image[None])
            best, mirror = probabilities.argmax(axis=1), notes["mirror"]
            maps = transfer_vgg16.explain(model, image[None], best, mirror)
            look = transfer_vgg16.overlay(image[None], maps)[0]
            larger = [one.repeat(scale, axis=0).repeat(scale, axis=1) for one in (image, look)]
            return dict(zip(names, map(float, probabilities[0]), strict=True)), *larger

        label = "写真 (20 MB まで) / Photo (up to 20 MB)"
        picture = gradio.Image(type="filepath", label=label, image_mode=None)
        picture.preprocess = lambda upload: upload and upload.path  # as it is: answer() reads it
        page = gradio.Interface(
            answer,
            picture,
            [
                gradio.Label(num_top_classes=3, label="答え / Answer"),
                gradio.Image(
                    format="png", buttons=[], label="モデルに見える画像 / The model's view"
                ),
                gradio.Image(format="png", buttons=[], label="注目した場所 / Where it looked"),
            ],
            title="これは何? / What is this?",
            live=True,
            flagging_mode="never",
            clear_btn=None,
            concurrency_limit=2,
            analytics_enabled=False,
        )
        try:
            socket.create_server((host, 0)).close()  # Gradio would wait for ever
            _, url, _ = page.launch(
                server_name=host,
                inbrowser=transfer_vgg16.has_screen(),
                max_file_size="20mb",
                footer_links=[],
                share=False,  # in Colab, and where GRADIO_SHARE says so, it would be in public
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
            )
        except (OSError, ValueError) as error:  # the second where a proxy hides this computer
            reason = transfer_vgg16.first_line(error)
            transfer_vgg16.fail(
                f"no page can be served at {host} ({reason}): choose another --host"
            )
        if host not in ("127.0.0.1", "localhost"):
            print(
                "Everybody who can reach this computer over the network can use the page, at its "
                f"name or address and port {page.server_port}, and what they upload is sent "
                "without encryption: leave out --host to keep it here"
            )
        # A browser that is closed during an upload is not the teacher's business
        logging.getLogger("uvicorn.error").setLevel("CRITICAL")
        print(f"The page is at {url}: Ctrl-C here ends it")
        try:
            while True:  # not Gradio's delete_cache: it forgets uploads that were broken off
                time.sleep(1)
                delete_old_files(uploads, 90)
        finally:
            page.close(verbose=False)


@contextlib.contextmanager
def upload_directory(host):
    """Give Gradio a directory for what is uploaded, deleted at the end, and its settings.

    What a page left there that was killed is deleted as well.
    """
    prefix = "transfer_vgg16-"  # then the process
    for old in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(ValueError):
            if not transfer_vgg16.psutil.pid_exists(int(old.name.split("-")[1])):
                shutil.rmtree(old, ignore_errors=True)
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {  # to close the terminal is a Ctrl-C, too
        number: signal.signal(number, signal.default_int_handler) for number in numbers
    }
    environment = dict(os.environ)
    others = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    try:
        with tempfile.TemporaryDirectory(
            prefix=f"{prefix}{os.getpid()}-",
            ignore_cleanup_errors=True,  # Windows, where one is still open
        ) as uploads:
            os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_RUN_HISTORY": "False"}
            os.environ["no_proxy"] = f"localhost,{host},{others}"  # Gradio asks its own address
            yield Path(uploads)
    finally:
        os.environ.clear()
        os.environ |= environment
        for number, handler in handlers.items():
            signal.signal(number, handler)


def delete_old_files(directory, seconds):
    """Delete the files in `directory` and below that were last written `seconds` ago or more."""
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):  # on Windows, one that is still open
            if path.is_file() and path.stat().st_mtime < time.time() - seconds:
                path.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
