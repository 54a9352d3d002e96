"""The page of predict_saved.py --serve, in a real browser that reaches nothing else."""

import base64
import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
import types
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from conftest import PREDICT, call, check_error, make_model, run, start
from PIL import Image
from pillow_heif import register_heif_opener

import predict_saved
import transfer_vgg16

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [name for name in ("gradio", "playwright") if not importlib.util.find_spec(name)]
needs_gradio = pytest.mark.skipif(
    os.name == "nt" or "gradio" in MISSING,
    reason="needs gradio, and the signals of Linux or macOS",
)
needs_browser = pytest.mark.skipif(
    os.name == "nt" or not CHROMIUM or bool(MISSING),
    reason=f"needs Chromium, gradio and playwright, on Linux or macOS: no {MISSING}",
)
BROKEN = "This file cannot be read as a picture: choose another one"
TOO_LARGE = "exceed the maximum allowed size of 20"


class Page:
    """A running predict_saved.py --serve: its process and address, and where its uploads go."""

    def __init__(self, model, directory, *arguments, script=PREDICT):
        self.uploads = directory / "temporary"
        self.uploads.mkdir(exist_ok=True)
        command = [script, "--serve", "--model", model, *arguments]
        network = dict.fromkeys(["http_proxy", "https_proxy"], "http://127.0.0.1:9")  # is down
        self.process = start(*command, cwd=directory, TMPDIR=str(self.uploads), **network)
        self.printed = ""
        while not (line := self.process.stdout.readline()).startswith("The page is at"):
            assert line, self.process.stderr.read()
            self.printed += line
        self.url = re.match(r"The page is at (\S+): Ctrl-C here ends it", line)[1]

    def files(self):
        """Return the files it keeps, other than those that TensorFlow writes for itself."""
        files = [path for path in self.uploads.rglob("*") if path.is_file()]
        return [path for path in files if not path.name.startswith("__autograph_generated")]

    def end(self, way=signal.SIGINT):
        """Press Ctrl-C; return the exit status, what it printed to stderr, and the files left."""
        self.process.send_signal(way)
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr, self.files()


@pytest.fixture
def page(finished, tmp_path):
    page = Page(finished[0] / "vgg16_cifar10.keras", tmp_path)
    yield page
    if page.process.poll() is None:
        page.end()


@pytest.fixture(scope="module")
def open_page(finished, tmp_path_factory):
    """A page for the tests that do not end it."""
    page = Page(finished[0] / "vgg16_cifar10.keras", tmp_path_factory.mktemp("page"))
    yield page
    page.end()


@pytest.fixture(scope="module")
def photos(images, tmp_path_factory):
    """Ten pictures, of the kinds that cameras make: test images, enlarged."""
    register_heif_opener()
    directory = tmp_path_factory.mktemp("photos")
    for i in range(10):
        path = directory / f"{i}.{('jpg', 'png', 'heic', 'webp')[i % 4]}"
        Image.fromarray(images["x_test"][i]).resize((300, 200)).save(path)
    return sorted(directory.iterdir())


def answers(finished, *photos):
    """Return what the command line says: for each photo, its classes and percentages."""
    stdout, _ = call(PREDICT, *photos, cwd=finished[0])
    lines = [line.rpartition(": ")[2] for line in stdout.splitlines()]
    return [re.findall(r"(?:^|, )(.+?) ([\d.]+)%", line) for line in lines]


@contextlib.contextmanager
def browse(page, outside=None, width=1366, height=768):
    """Yield a tab of a browser with a camera of its own that shows the page.

    What it asks of other computers is refused, and listed in `outside`.
    """
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)

    def forward(route):
        if route.request.url.startswith((page.url, "data:", "blob:")):
            return route.continue_()
        if outside is not None:
            outside.append(route.request.url)
        return route.abort()

    flags = ["--no-sandbox", "--use-fake-device-for-media-stream"]
    flags += ["--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        tab = browser.new_page(viewport={"width": width, "height": height})
        tab.set_default_timeout(30_000)
        tab.route("**/*", forward)
        tab.goto(page.url)
        tab.get_by_role("heading", name="これは何? / What is this?").wait_for()
        yield tab
        browser.close()


def drop(tab, path, event="drop"):
    """Drop the file `path` on the page, as from a file manager, or paste it."""
    tab.locator("#photo button:has(input[type=file])").wait_for()
    tab.evaluate(
        """([data, name, event]) => {
            const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, {type: "image/png"}));
            if (event == "paste")
                document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer}));
            else
                document.querySelector("#photo button:has(input[type=file])").dispatchEvent(
                    new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
        }""",
        [base64.b64encode(path.read_bytes()).decode(), path.name, event],
    )


def check(tab, answer):
    """Wait until the page gives this answer, with both pictures, and nothing of what went in."""
    from playwright.sync_api import expect

    expect(tab.locator("#answer dt")).to_have_text([name for name, _ in answer])
    shares = [float(percent) for _, percent in answer]  # 42.5 may be of 42.49 or 42.51
    percentages = [re.compile(f"^({int(share)}|{math.ceil(share)})%$") for share in shares]
    expect(tab.locator("#answer dd")).to_have_text(percentages)
    expect(tab.locator("#message")).to_have_text("")
    for name in ("seen", "looked"):
        picture = tab.locator(f"#{name} img")
        expect(picture).to_be_visible()
        tab.wait_for_function(f"document.querySelector('#{name} img').naturalWidth > 0")
    expect(tab.locator("#photo img")).to_have_count(0)


@needs_browser
@pytest.mark.slow
def test_photos_in_a_browser(page, finished, photos, tmp_path):
    """Photos, a broken one, too large a one, another photo, one that is pasted: no reloading."""
    from playwright.sync_api import expect

    (tmp_path / "broken.png").write_bytes(photos[0].read_bytes()[:300])
    (tmp_path / "large.png").write_bytes(photos[0].read_bytes() + bytes(21_000_000))
    heic = next(path for path in photos if path.suffix == ".heic")
    portrait = tmp_path / "..portrait.png"
    Image.open(photos[3]).resize((300, 2000)).save(portrait)
    chosen = [photos[0], heic, photos[1], portrait, photos[5]]
    expected = dict(zip(chosen, answers(finished, *chosen), strict=True))
    assert expected[photos[0]] != expected[photos[1]]
    outside = []
    with browse(page, outside) as tab:
        for path in (photos[0], heic):
            drop(tab, path)
            check(tab, expected[path])
        tab.screenshot(path=tmp_path / "page.png")
        drop(tab, tmp_path / "broken.png")
        expect(tab.get_by_text(BROKEN)).to_have_count(1)
        expect(tab.locator("#seen img, #looked img, #answer dt")).to_have_count(0)
        drop(tab, photos[1])
        check(tab, expected[photos[1]])
        drop(tab, tmp_path / "large.png")
        expect(tab.get_by_text(TOO_LARGE)).to_have_count(1)
        drop(tab, portrait)
        check(tab, expected[portrait])
        for name in ("Upload file", "Capture from camera"):
            expect(tab.locator("#photo").get_by_label(name)).to_be_in_viewport()
        drop(tab, photos[5], "paste")
        check(tab, expected[photos[5]])
    assert outside == []
    assert np.asarray(Image.open(tmp_path / "page.png").convert("L")).std() > 10
    assert page.end() == (130, "stopped\n", [])


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1366, 768), (1920, 1080), (390, 844)])
def test_everything_is_seen_at_once(width, height, open_page, finished, photos):
    """On a projector nothing is below the fold, the pictures are large and side by side.

    On a phone, the answer comes first, then the pictures.
    """
    with browse(open_page, width=width, height=height) as tab:
        drop(tab, photos[0])
        check(tab, answers(finished, photos[0])[0])
        boxes = {
            name: tab.locator(f"#{name}").bounding_box()
            for name in ("photo", "answer", "seen", "looked")
        }
        fold = tab.evaluate("document.documentElement.scrollHeight") <= height
    assert boxes["seen"]["y"] == boxes["looked"]["y"]
    assert boxes["seen"]["x"] + boxes["seen"]["width"] <= boxes["looked"]["x"]
    if width > 700:
        assert fold
        assert min(boxes["seen"]["width"], boxes["seen"]["height"]) >= 0.55 * height
        assert boxes["photo"]["width"] < 0.3 * width
    else:
        assert boxes["answer"]["y"] + boxes["answer"]["height"] <= boxes["seen"]["y"]
        assert boxes["looked"]["y"] + boxes["looked"]["height"] <= height
        assert boxes["photo"]["y"] > boxes["seen"]["y"]


@needs_browser
@pytest.mark.slow
def test_live_camera(page):
    """The answer follows the camera by itself, and stops with it."""
    from playwright.sync_api import expect

    def wait_for_another(seconds=20):
        tab.wait_for_function(
            "old => document.querySelector('#seen img')?.src != old",
            arg=tab.evaluate("document.querySelector('#seen img')?.src"),
            timeout=1000 * seconds,
        )

    with browse(page) as tab:
        tab.get_by_role("tab", name="Live camera").click()
        tab.locator("#camera").get_by_title("grant webcam access").locator("button").click()
        button = tab.locator("#camera").get_by_label("capture photo")
        button.click()
        for _ in range(3):
            wait_for_another()
        began = time.monotonic()
        for _ in range(5):
            wait_for_another()
        assert time.monotonic() - began > 2  # about one a second, or fewer: frames are dropped
        expect(tab.locator("#answer dt")).to_have_count(3)
        button.click()
        tab.wait_for_timeout(5000)  # the last one is answered
        last = tab.locator("#seen img").get_attribute("src")
        tab.wait_for_timeout(5000)
        assert tab.locator("#seen img").get_attribute("src") == last
    assert page.end() == (130, "stopped\n", [])


@needs_gradio
@pytest.mark.slow
def test_two_hundred_requests(page, finished, photos, tmp_path):
    """Four at a time, good and broken mixed: each is answered rightly, memory does not grow."""
    from gradio_client import Client, handle_file

    (tmp_path / "broken.png").write_bytes(photos[0].read_bytes()[:300])
    expected = answers(finished, *photos)
    client = Client(page.url, verbose=False, download_files=False)
    process = psutil.Process(page.process.pid)

    def ask(i):
        path = tmp_path / "broken.png" if i % 5 == 4 else photos[i % 10]
        sentence, answer, *pictures = client.predict(handle_file(path), api_name="/answer")
        if i % 5 == 4:
            assert BROKEN in sentence
            assert pictures == [None, None]
            return
        found = [(one["label"], f"{one['confidence']:.1%}") for one in answer["confidences"]]
        assert found == [(name, f"{percent}%") for name, percent in expected[i % 10]]
        assert sentence == ""
        assert None not in pictures

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(20)))
        before = process.memory_info().rss
        list(pool.map(ask, range(20, 200)))
    assert process.memory_info().rss < 1.1 * before
    assert page.end() == (130, "stopped\n", [])


SOONER = """
import sys
import predict_saved

delete_old_files = predict_saved.delete_old_files

def delete_sooner(directory, seconds, keep):
    assert seconds == 90
    delete_old_files(directory, 10, keep)

predict_saved.delete_old_files = delete_sooner
sys.exit(predict_saved.main(sys.argv[1:]))
"""


def break_off_an_upload(url):
    """Send the beginning of a large file, and hang up."""
    address = re.match(r"http://(.+):(\d+)/", url).groups()
    with socket.create_connection(address) as connection:
        head = "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 15000000\r\n"
        head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        head += 'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        connection.sendall(head.encode() + bytes(5_000_000))
        time.sleep(1)


def open_hasty_page(model, directory):
    """Return a Page that deletes uploads after 10 seconds, not 90."""
    program = directory / "program.py"
    program.write_text(SOONER, encoding="utf-8")
    return Page(model, directory, script=program)


@pytest.fixture
def hasty_page(finished, tmp_path):
    page = open_hasty_page(finished[0] / "vgg16_cifar10.keras", tmp_path)
    yield page
    if page.process.poll() is None:
        page.end()


@pytest.mark.slow
@needs_gradio
def test_uploads_are_deleted_while_it_runs(hasty_page, photos):
    """Those that were answered, and one that was broken off, of which nobody hears anything."""
    from gradio_client import Client, handle_file

    page = hasty_page
    client = Client(page.url, verbose=False, download_files=False)
    client.predict(handle_file(photos[0]), api_name="/answer")
    answered = page.files()
    break_off_an_upload(page.url)
    files = page.files()
    assert answered
    assert len(files) > len(answered)
    for _ in range(30):
        if not any(path.exists() for path in files):
            break
        time.sleep(1)
    assert page.files() == []
    client.predict(handle_file(photos[0]), api_name="/answer")
    assert page.end() == (130, "stopped\n", [])


@pytest.mark.slow
@needs_gradio
@pytest.mark.parametrize("way", ["SIGHUP", "SIGTERM"])
def test_closed_terminal_leaves_no_upload(way, page, photos):
    from gradio_client import Client, handle_file

    client = Client(page.url, verbose=False, download_files=False)
    client.predict(handle_file(photos[0]), api_name="/answer")
    assert page.files()
    assert page.end(signal.Signals[way]) == (130, "stopped\n", [])


@pytest.mark.slow
@needs_gradio
def test_next_page_deletes_what_a_killed_one_left(page, finished, photos, tmp_path):
    from gradio_client import Client, handle_file

    client = Client(page.url, verbose=False, download_files=False)
    client.predict(handle_file(photos[0]), api_name="/answer")
    assert page.end(signal.SIGKILL)[2]
    following = Page(finished[0] / "vgg16_cifar10.keras", tmp_path)
    assert following.files() == []
    following.end()


@pytest.mark.slow
@needs_gradio
def test_what_is_no_picture(open_page, tmp_path):
    """The sentence names the file, not the server's directory; a program is not run."""
    from gradio_client import Client, handle_file

    client = Client(open_page.url, verbose=False, download_files=False)
    Image.new("RGB", (50, 50)).save(tmp_path / "drawing.eps")
    (tmp_path / "<b>text.png").write_text("no picture")
    reasons = {"drawing.eps": "EPS files are not read", "<b>text.png": "text.png"}
    for name, reason in reasons.items():
        sentence = client.predict(handle_file(tmp_path / name), api_name="/answer")[0]
        assert re.search(rf"{BROKEN} \([^/<]*{reason}.*\)", sentence)


@pytest.mark.slow
@needs_gradio
def test_bad_calls_print_nothing_and_read_no_other_file(page, photos, tmp_path):
    """What strangers send ends with an error for them; odd file names are answered."""
    from gradio_client import Client, handle_file

    url = f"{page.url}gradio_api/call/answer"

    def ask(data):
        body = json.dumps({"data": data}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            event = json.load(response)["event_id"]
        with urllib.request.urlopen(f"{url}/{event}", timeout=60) as response:
            return response.read().decode()

    mark = {"_type": "gradio.FileData"}
    private = tmp_path / "private.png"
    Image.open(photos[0]).save(private)
    for data in ([], ["x"], [1, 2], [{"path": str(private)}, 1], [{"path": 5, "meta": mark}]):
        assert "event: error" in ask(data)
    assert "this file was not uploaded" in ask([{"path": str(private)}])
    assert "event: error" in ask([{"path": str(private), "meta": mark}])
    client = Client(page.url, verbose=False, download_files=False)
    for name in ("..a.png", "....png", "a..b.png", "写真 #1.png"):
        shutil.copy(private, tmp_path / name)
        sentence, *_, looked = client.predict(handle_file(tmp_path / name), api_name="/answer")
        assert sentence == ""
        assert looked is not None
    assert page.end() == (130, "stopped\n", [])


def test_what_the_page_knows_is_said():
    notes = {"class_names": ["猫", "<b>"], "test": None}
    assert predict_saved.describe(notes) == "知っているクラス / It knows: 猫, <b>"
    notes["test"] = {"accuracy": 0.5272, "images": 10000}
    assert predict_saved.describe(notes).endswith("test pictures: 53% (10,000)")
    notes["class_names"] = [str(i) for i in range(300)]
    assert "18, 19 … (300)" in predict_saved.describe(notes)


@needs_browser
@pytest.mark.slow
@pytest.mark.skipif(not predict_saved.EXAMPLES.exists(), reason="there is no clip art")
def test_examples_to_click(tmp_path):
    """For a model of the clip art, and still after the time in which uploads are deleted."""
    from playwright.sync_api import expect

    with np.load(predict_saved.EXAMPLES) as data:
        notes = {"class_names": [str(name) for name in data["class_names"]]}
        notes["test"] = {"accuracy": 0.5, "images": 182}
    transfer_vgg16.save_model(make_model(), notes, tmp_path / "model.keras")
    page = open_hasty_page(tmp_path / "model.keras", tmp_path)
    time.sleep(13)
    with browse(page) as tab:
        expect(tab.get_by_text("50% (182)")).to_be_visible()
        pictures = tab.locator("#examples img")
        expect(pictures).to_have_count(5)
        loaded = "[...document.querySelectorAll('#examples img')].every(i => i.naturalWidth == 32)"
        tab.wait_for_function(loaded)
        pictures.nth(3).click()
        expect(tab.locator("#answer dt")).to_have_count(3)
        expect(tab.locator("#seen img")).to_be_visible()
    assert page.end() == (130, "stopped\n", [])


@needs_gradio
@pytest.mark.slow
def test_open_host_is_told(finished, tmp_path):
    page = Page(finished[0] / "vgg16_cifar10.keras", tmp_path, "--host", "0.0.0.0")
    assert (
        "Everybody in the network can use the page, at this computer's name or address and port "
        f"{page.url.rsplit(':', 1)[1].strip('/')}, and uploads are not encrypted" in page.printed
    )
    connections = psutil.Process(page.process.pid).net_connections("inet")
    assert [one.laddr.ip for one in connections if one.status == "LISTEN"] == ["0.0.0.0"]
    page.end()


@pytest.mark.slow
@needs_gradio
def test_only_this_computer_can_open_it(open_page):
    connections = psutil.Process(open_page.process.pid).net_connections("inet")
    assert [one.laddr.ip for one in connections if one.status == "LISTEN"] == ["127.0.0.1"]
    assert open_page.printed == ""


@pytest.mark.slow
@needs_gradio
def test_host_that_is_not_ours(finished, tmp_path):
    arguments = ["--model", finished[0] / "vgg16_cifar10.keras", "--host", "192.0.2.1"]
    _, stderr = run(PREDICT, "--serve", *arguments, cwd=tmp_path, status=2)
    check_error(stderr, r"no page can be served at 192\.0\.2\.1 \(.+\): choose another --host")


@pytest.mark.parametrize("found", [None, types.SimpleNamespace(__version__="5.49.1")])
def test_without_gradio(found, finished, tmp_path, monkeypatch):
    """It is not installed, or too old."""
    monkeypatch.setitem(sys.modules, "gradio", found)
    arguments = ["--serve", "--model", finished[0] / "vgg16_cifar10.keras"]
    _, stderr = call(PREDICT, *arguments, cwd=tmp_path, status=2)
    check_error(stderr, "the page needs Gradio 6: pip install -r requirements-page.txt, .+")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--serve", "a.png"], "--serve opens a page that takes the pictures: leave out"),
        (["--serve", "--data", "x"], "--serve opens a page that takes the pictures: leave out"),
        (
            ["--host", "0.0.0.0"],
            "--host says where the page of --serve can be opened: add --serve",
        ),
    ],
)
def test_bad_argument(arguments, sentence, tmp_path):
    stdout, stderr = call(PREDICT, *arguments, cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(stderr, rf"{sentence}.*")
