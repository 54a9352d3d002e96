"""The page of predict_saved.py --serve, in a real browser that reaches nothing else."""

import base64
import importlib.util
import os
import re
import shutil
import signal
import socket
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from conftest import PREDICT, call, check_error, run, start
from PIL import Image
from pillow_heif import register_heif_opener

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
BROKEN = "This is no picture that can be read: choose another file"
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


def drop(tab, path):
    """Drop the file `path` on the page, as from a file manager."""
    transfer = tab.evaluate_handle(
        """([data, name]) => {
            const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, {type: "image/png"}));
            return transfer;
        }""",
        [base64.b64encode(path.read_bytes()).decode(), path.name],
    )
    tab.dispatch_event("button:has(input[type=file])", "drop", {"dataTransfer": transfer})


@pytest.mark.slow
@needs_browser
def test_photos_in_a_browser(page, finished, photos, tmp_path):
    """A photo, a broken one, too large a one, another photo: without reloading."""
    from playwright.sync_api import expect, sync_playwright

    (tmp_path / "broken.png").write_bytes(photos[0].read_bytes()[:300])
    (tmp_path / "large.png").write_bytes(photos[0].read_bytes() + bytes(21_000_000))
    expected = answers(finished, photos[0], photos[1])
    assert expected[0] != expected[1]
    outside = []

    def forward(route):
        if route.request.url.startswith((page.url, "data:", "blob:")):
            return route.continue_()
        outside.append(route.request.url)
        return route.abort()

    def check(answer):
        for name, percent in answer:
            row = tab.locator("[data-testid$=-label-output]:visible, dl:visible", has_text=name)
            expect(row.first).to_be_visible()
            near = f"{round(float(percent))}%"
            expect(tab.locator("body")).to_contain_text(near, timeout=20_000)
        assert [name for name, _ in answer] == tab.locator("dt").all_inner_texts()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 1000})
        tab.route("**/*", forward)
        tab.goto(page.url)
        expect(tab.get_by_role("heading", name="これは何? / What is this?")).to_be_visible()
        drop(tab, photos[0])
        check(expected[0])
        tab.screenshot(path=tmp_path / "page.png")
        for name, sentence in (("broken.png", BROKEN), ("large.png", TOO_LARGE)):
            tab.get_by_label("Remove Image").click()
            drop(tab, tmp_path / name)
            expect(tab.get_by_text(sentence).first).to_be_visible(timeout=20_000)
        drop(tab, photos[1])
        check(expected[1])
        assert tab.locator("img").count() >= 3
        browser.close()
    assert outside == []
    assert np.asarray(Image.open(tmp_path / "page.png").convert("L")).std() > 10
    assert page.end() == (130, "stopped\n", [])


@pytest.mark.slow
@needs_gradio
def test_two_hundred_requests(page, finished, photos, tmp_path):
    """Four at a time, good and broken mixed: each is answered rightly, memory does not grow."""
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    (tmp_path / "broken.png").write_bytes(photos[0].read_bytes()[:300])
    expected = answers(finished, *photos)
    client = Client(page.url, verbose=False, download_files=False)
    process = psutil.Process(page.process.pid)

    def ask(i):
        if i % 5 == 4:
            with pytest.raises(AppError, match=BROKEN):
                client.predict(handle_file(tmp_path / "broken.png"), api_name="/answer")
            return
        answer = client.predict(handle_file(photos[i % 10]), api_name="/answer")[0]
        found = [(one["label"], f"{one['confidence']:.1%}") for one in answer["confidences"]]
        assert found == [(name, f"{percent}%") for name, percent in expected[i % 10]]

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

def delete_sooner(directory, seconds):
    assert seconds == 90
    delete_old_files(directory, 10)

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


@pytest.fixture
def hasty_page(finished, tmp_path):
    """A page that deletes uploads after 10 seconds, not 90."""
    program = tmp_path / "program.py"
    program.write_text(SOONER, encoding="utf-8")
    page = Page(finished[0] / "vgg16_cifar10.keras", tmp_path, script=program)
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
def test_what_is_no_picture(page, tmp_path):
    """The sentence names the file, not the server's directory; a program is not run."""
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(page.url, verbose=False, download_files=False)
    Image.new("RGB", (50, 50)).save(tmp_path / "drawing.eps")
    (tmp_path / "text.png").write_text("no picture")
    for name, reason in (("drawing.eps", "EPS files are not read"), ("text.png", "text.png")):
        with pytest.raises(AppError, match=rf"{BROKEN} \([^/]*{reason}\)"):
            client.predict(handle_file(tmp_path / name), api_name="/answer")


@pytest.mark.slow
@needs_gradio
def test_open_host_is_told(finished, tmp_path):
    page = Page(finished[0] / "vgg16_cifar10.keras", tmp_path, "--host", "0.0.0.0")
    assert (
        "Everybody who can reach this computer over the network can use the page, at its name or "
        f"address and port {page.url.rsplit(':', 1)[1].strip('/')}, and what" in page.printed
    )
    connections = psutil.Process(page.process.pid).net_connections("inet")
    assert [one.laddr.ip for one in connections if one.status == "LISTEN"] == ["0.0.0.0"]
    page.end()


@pytest.mark.slow
@needs_gradio
def test_only_this_computer_can_open_it(page):
    connections = psutil.Process(page.process.pid).net_connections("inet")
    assert [one.laddr.ip for one in connections if one.status == "LISTEN"] == ["127.0.0.1"]
    assert page.printed == ""


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
    check_error(stderr, "the page needs Gradio 6: pip install -r requirements-page.txt")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--serve", "a.png"], "--serve opens a page that takes the pictures: give it none"),
        (["--serve", "--data", "x"], "--serve opens a page that takes the pictures: give it none"),
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
