"""The page in a real browser: Chromium drives every tab, and what it shows is what the library draws. `make test-page`"""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sampling.form import EXAMPLES
from sampling.pipeline import load
from sampling.record import recall
from sampling.request import ImagePrompt, Request

pytestmark = pytest.mark.browser
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
SLOW = 60_000  # milliseconds: a busy machine may take that long
OWL = next(path for path in EXAMPLES if path.stem == "owl")
PICTURE = "img[src*=drawn-]"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int, Path]]:
    """The address of a page, its process, and its temporary folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("page")
    command = [sys.executable, "-m", "page", "--port", str(port)]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(folder)})
    assert page.stdout and "is ready" in page.stdout.readline()
    yield f"http://localhost:{port}", page.pid, folder
    page.terminate()
    page.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        yield play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS.split())


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(server: tuple[str, int, Path], browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The open page. At the end there are no errors in the console, and no request has left this computer."""
    width, height = request.param
    opened, wrong = browser.new_page(viewport={"width": width, "height": height}), []
    opened.set_default_timeout(SLOW)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    opened.on("request", lambda sent: None if re.match(rf"{server[0]}|data:|blob:", sent.url) else wrong.append(sent.url))
    opened.goto(server[0], wait_until="domcontentloaded")
    opened.get_by_role("button", name="Draw", exact=True).wait_for()
    yield opened
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    opened.close()
    assert not wrong


def picture_of(page: Any) -> np.ndarray:
    """The drawn picture that the page shows."""
    shown = page.locator(PICTURE).first
    shown.wait_for()
    data = page.request.get(shown.get_attribute("src")).body()
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).and_(page.locator(":visible")).click()


def test_upload_draw_save_and_drop(page: Any, tmp_path: Path) -> None:
    """The picture is the library's own, and its PNG gives the settings back."""
    page.locator("input[type=file]").first.set_input_files(OWL)
    page.get_by_label("Text", exact=True).fill("on a blue zebra background")
    page.get_by_label("number input for λ").fill("0.8")
    page.keyboard.press("Tab")
    press(page, "Draw")
    request = Request("on a blue zebra background", ImagePrompt(OWL, 0.8), guidance=4, steps=20)  # type: ignore[arg-type]
    shown = picture_of(page)
    with pytest.warns(UserWarning, match="zebra"):
        drawn = np.asarray(load().draw(request)).astype(int)
    assert np.abs(shown - drawn).max() <= 1
    page.get_by_text("left out: zebra").wait_for()
    press(page, "Keep it")
    page.get_by_text("python -m sampling").first.wait_for()
    saved = tmp_path / "saved.png"
    saved.write_bytes(page.request.get(page.locator(PICTURE).first.get_attribute("src")).body())
    assert recall(saved)[0] == request
    page.get_by_label("Text", exact=True).fill("something else")
    page.locator("input[type=file][accept='.png']").set_input_files(saved)
    page.get_by_text("The form has the settings").wait_for()
    assert page.get_by_label("Text", exact=True).input_value() == request.prompt


def test_stop(page: Any) -> None:
    press(page, "Settings")
    page.get_by_label("number input for Steps").fill("100")
    page.get_by_label("number input for Number of pictures").fill("8")
    page.keyboard.press("Tab")
    press(page, "Draw")
    page.get_by_text(re.compile(r"\d+/100 steps|\d+%")).first.wait_for()
    press(page, "Stop")
    page.get_by_text("stopped; nothing more was drawn").wait_for()


def test_a_hostile_file_is_refused_in_a_sentence(page: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    page.locator("input[type=file]").first.set_input_files(tmp_path / "bad.png")
    press(page, "Draw")
    page.get_by_text(re.compile("bad.png: (not a picture|the picture is damaged)")).wait_for()


def test_the_other_tabs(page: Any) -> None:
    page.get_by_role("tab", name="Lambda").click()
    press(page, "Compare")
    page.wait_for_function("[...document.querySelectorAll('.grid-wrap img')].filter(i => i.offsetParent).length == 14")
    page.get_by_role("tab", name="Look inside").click()
    page.get_by_label("concatenated").check()
    page.locator("button:visible", has_text=re.compile("^Look inside$")).last.click()
    page.get_by_text("of the one softmax").wait_for()
    page.get_by_role("tab", name="The study").click()
    page.get_by_role("tabpanel").locator("h1:visible").wait_for()


def test_the_keyboard_alone(page: Any) -> None:
    """Tab reaches the text, lambda and Draw; arrows move lambda, Enter draws."""
    names = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText")
        names.append(name)
        if name == "Draw" and page.evaluate("document.activeElement.role != 'tab'"):
            break
        if name and name.startswith("range slider for λ"):
            page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert any(name and "λ" in name for name in names)
    assert picture_of(page).shape == (64, 64, 3)
    assert page.get_by_label("number input for λ").input_value() == "0.95"


def test_many_requests_leave_memory_and_disk_as_they_were(page: Any, server: tuple[str, int, Path]) -> None:
    """The second half of 50 drawings adds less than 32 MB. Nothing is left but Gradio's copies, which go after an hour."""

    def memory() -> float:
        status = Path(f"/proc/{server[1]}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    press(page, "Settings")
    page.get_by_label("number input for Steps").fill("1")
    used = []
    for seed in range(50):
        page.get_by_label("Seed").fill(str(1000 + seed))
        page.keyboard.press("Tab")
        press(page, "Draw")
        page.wait_for_function(f"document.querySelector('{PICTURE}')?.src.includes('drawn-{1000 + seed}')")
        used.append(memory())
    print(f"memory in MB: {used[0]:.0f} after one drawing, {used[24]:.0f} after 25, {used[-1]:.0f} after 50")
    assert used[-1] - used[24] < 32
    time.sleep(1)
    assert not [path for path in server[2].glob("*/*.png") if path.name.startswith("drawn")]
