"""The page in a real browser: Chromium drives every tab, and what it shows is what the library draws. `make test-page`

With PAGE_PICTURES=docs, the last test writes the screenshots of docs/page.md. A busy machine may be slow: PAGE_PATIENCE=300 waits longer.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.attention import concatenated, decoupled
from sampling.fields import map_paths
from sampling.form import EXAMPLES
from sampling.loading import load
from sampling.options import parse
from sampling.record import recall
from sampling.request import ImagePrompt, Request
from sampling.sheets.strip import strip

pytestmark = pytest.mark.browser
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
PATIENCE = float(os.environ.get("PAGE_PATIENCE", 60)) * 1000  # milliseconds
OWL, HAT = (next(path for path in EXAMPLES if path.stem == name) for name in ("owl", "hat"))
PICTURE = "img[src*=drawn-]"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int, Path]]:
    """The address of a page, its process, and its temporary folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, start = tmp_path_factory.mktemp("page"), time.time()
    command = [sys.executable, "-m", "eval", "page", "--port", str(port)]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(folder)})
    assert page.stdout and "is ready" in page.stdout.readline()
    print(f"ready after {time.time() - start:.1f} s, at a load of {os.getloadavg()[0]:.1f}")
    yield f"http://localhost:{port}", page.pid, folder
    page.send_signal(2)  # Ctrl-C
    page.wait(60)
    assert not [*folder.iterdir()], "the temporary folder is not empty"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        yield play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS.split())


@pytest.fixture(params=SIZES)
def page(server: tuple[str, int, Path], browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The open page. At the end there are no errors in the console, and no request has left this computer."""
    width, height = SIZES[request.param]
    opened, wrong = browser.new_page(viewport={"width": width, "height": height}), []
    opened.set_default_timeout(PATIENCE)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    opened.on("request", lambda sent: None if re.match(rf"{server[0]}|data:|blob:", sent.url) else wrong.append(sent.url))
    opened.goto(server[0], wait_until="domcontentloaded")
    opened.get_by_role("button", name="Draw", exact=True).wait_for()
    yield opened
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    opened.close()
    assert not wrong


on_a_desktop = pytest.mark.parametrize("page", ["desktop"], indirect=True)


def fetched(page: Any, image: Any) -> np.ndarray:
    """The pixels of a picture that the page shows."""
    return np.asarray(Image.open(io.BytesIO(page.request.get(image.get_attribute("src")).body()))).astype(int)


def press(page: Any, name: str) -> None:
    """Press a button, or the title of a part that opens."""
    page.locator("button:visible", has_text=re.compile(rf"^\s*{name}\s*▼?\s*$")).last.click()


def tab(page: Any, name: str) -> None:
    """Open a tab. A phone shows the last ones in a menu."""
    shown = page.get_by_role("tab", name=name, exact=True).and_(page.locator(":visible"))
    if shown.count():
        shown.first.click()
    else:
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=name).click()


def set_steps(page: Any, steps: int, num: int = 1) -> None:
    press(page, "Settings")
    page.get_by_label("number input for Steps").fill(str(steps))
    page.get_by_label("number input for Number of pictures").fill(str(num))
    page.keyboard.press("Tab")


def draw(page: Any) -> Any:
    press(page, "Draw")
    page.locator(PICTURE).first.wait_for()
    return page.locator(PICTURE).first


def upload(page: Any, place: int, picture: Path) -> None:
    page.locator("input[type=file]").nth(place).set_input_files(picture)


def restore(page: Any, picture: Any, folder: Path) -> Path:
    """Save a picture, drop it, and wait until the form has its settings."""
    saved = folder / "saved.png"
    saved.write_bytes(page.request.get(picture.get_attribute("src")).body())
    page.get_by_label("Text", exact=True).fill("something else")
    upload(page, -1, saved)
    page.get_by_text("The form has the settings").wait_for()
    return saved


def command_of(page: Any) -> Request:
    """The request of the command that the page shows."""
    command = page.locator("#command textarea")
    command.wait_for()
    return map_paths(parse(shlex.split(command.input_value())[3:]).request, Path.absolute)


def test_upload_draw_save_and_drop(page: Any, tmp_path: Path) -> None:
    """The picture is the library's own, and its PNG gives the settings back."""
    upload(page, 0, OWL)
    page.get_by_label("Text", exact=True).fill("on a blue zebra background")
    page.get_by_label("number input for λ").fill("0.8")
    page.keyboard.press("Tab")
    start = time.time()
    shown = draw(page)
    print(f"drawn {time.time() - start:.1f} s after the click, at a load of {os.getloadavg()[0]:.1f}")
    request = Request("on a blue zebra background", ImagePrompt(OWL, 0.8), guidance=4, steps=20)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="zebra"):
        drawn = np.asarray(load().draw(request)).astype(int)
    assert np.abs(fetched(page, shown) - drawn).max() <= 1
    page.locator(".note:visible", has_text="zebra").first.wait_for()
    press(page, "Keep it")
    assert command_of(page) == request
    assert recall(restore(page, shown, tmp_path))[0] == request
    assert page.get_by_label("Text", exact=True).input_value() == request.prompt


def test_a_picture_is_painted_and_changed(page: Any, tmp_path: Path) -> None:
    """Only what is painted changes. The command draws the same, and the PNG gives picture and paint back."""
    set_steps(page, 4)
    press(page, "Change a picture")
    page.wait_for_function("document.querySelector('canvas')?.offsetWidth > 0")
    page.wait_for_timeout(5000)  # the editor starts after its canvas is there
    upload(page, 1, HAT)
    page.get_by_role("button", name="Brush Size").wait_for()
    page.wait_for_timeout(2000)
    page.locator("canvas").first.scroll_into_view_if_needed()
    box = page.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 30, y)
    page.mouse.down()
    page.mouse.move(x + 30, y, steps=5)
    page.mouse.up()
    page.wait_for_timeout(2000)
    shown = draw(page)
    press(page, "Keep it")
    request, hat = command_of(page), np.asarray(Image.open(HAT).convert("RGB")).astype(int)
    assert request.mask and request.init_image
    paint = np.asarray(Image.open(request.mask).getchannel("A")) > 0
    changed = fetched(page, shown)
    assert 0.005 < paint.mean() < 0.5
    assert np.abs(changed - hat)[~paint].max() <= 1 and np.abs(changed - hat)[paint].max() > 30
    assert np.abs(changed - np.asarray(load().draw(request)).astype(int)).max() <= 1
    restore(page, shown, tmp_path)
    page.wait_for_timeout(3000)
    draw(page)
    page.wait_for_timeout(1000)
    assert command_of(page).prompt == request.prompt


def test_the_picture_has_a_guidance_of_its_own(page: Any, tmp_path: Path) -> None:
    """It reaches the drawing and the command, and comes back from the PNG. Without a picture, it is left out."""
    set_steps(page, 2)
    for name, value in (("Guidance", 8), ("Guidance by the picture (0: the same)", 3.5)):
        page.get_by_label(f"number input for {name}", exact=True).fill(str(value))
    page.keyboard.press("Tab")
    shown = draw(page)
    press(page, "Keep it")
    request = command_of(page)
    assert (request.guidance, request.image_guidance) == (8, 3.5)
    assert np.abs(fetched(page, shown) - np.asarray(load().draw(request)).astype(int)).max() <= 1
    own = page.get_by_label("number input for Guidance by the picture")
    own.fill("0")
    restore(page, shown, tmp_path)
    assert own.input_value() == "3.5"
    page.get_by_role("button", name="Remove Image").first.click()
    draw(page)
    page.wait_for_function("!document.querySelector('#command textarea').value.includes('--image')")
    assert command_of(page) == replace(request, image_prompts=(), image_guidance=None)


def test_stop(page: Any) -> None:
    set_steps(page, 100, num=8)
    press(page, "Draw")
    page.get_by_text(re.compile(r"\d+/100 steps|\d+%|\d+\.\d+s")).first.wait_for()
    press(page, "Stop")
    page.get_by_text("stopped; nothing more was drawn").wait_for()


def test_hostile_files_are_refused_in_a_sentence(page: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    press(page, "Keep it")
    page.get_by_text("Drop a picture that was drawn here").wait_for()
    upload(page, -1, bad)
    page.get_by_text("bad.png: not a picture that this program drew").wait_for()
    upload(page, 0, bad)
    page.wait_for_timeout(2000)
    press(page, "Draw")
    page.get_by_text(re.compile("bad.png: (Pillow cannot read|the picture is damaged)")).wait_for()


def test_the_other_tabs(page: Any) -> None:
    set_steps(page, 2)
    tab(page, "Lambda")
    press(page, "Compare")
    page.wait_for_function("[...document.querySelectorAll('.grid-wrap img')].filter(i => i.offsetParent).length == 14")
    shown = [fetched(page, image) for image in page.locator(".grid-wrap img:visible").all()]
    request, pipeline = Request("on a pink background", ImagePrompt(OWL), guidance=4, steps=2), load()  # type: ignore[arg-type]
    drawn = [np.asarray(one).astype(int) for fuse in (decoupled, concatenated) for one in strip(pipeline, request, fuse)]
    assert max(np.abs(one - other).max() for one, other in zip(shown, drawn, strict=True)) <= 1
    edges = [image.bounding_box() for image in page.locator(".grid-wrap img:visible").all()]
    assert max(edge["x"] + edge["width"] for edge in edges) <= page.viewport_size["width"], "a picture is cut off"
    tab(page, "Look inside")
    page.get_by_label("concatenated").check()
    press(page, "Look inside")
    page.get_by_text("of the one softmax").wait_for()
    before = page.get_by_text("of the one softmax").inner_text()
    page.get_by_label("number input for Layer").fill("1")
    page.keyboard.press("Tab")
    page.wait_for_function(f"!document.body.innerText.includes({before!r})")
    tab(page, "The study")
    page.get_by_role("tabpanel").locator("h1:visible").wait_for()
    before = page.locator(".grid-wrap img:visible").count()
    page.get_by_role("button", name="Draw this point").click()
    page.wait_for_function(f"[...document.querySelectorAll('.grid-wrap img')].filter(i => i.offsetParent).length == {before + 8}")


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
    assert any(name and "λ" in name for name in names) and names[-1] == "Draw"
    page.keyboard.press("Enter")
    page.locator(PICTURE).first.wait_for()
    assert fetched(page, page.locator(PICTURE).first).shape == (64, 64, 3)
    assert page.get_by_label("number input for λ").input_value() == "0.95"


@on_a_desktop
def test_many_requests_leave_memory_and_disk_as_they_were(page: Any, server: tuple[str, int, Path]) -> None:
    """The second half of 50 drawings adds less than 32 MB. Nothing is left but Gradio's copies, which go after an hour."""

    def memory() -> float:
        status = Path(f"/proc/{server[1]}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    set_steps(page, 1)
    used = []
    for seed in range(1000, 1050):
        page.get_by_label("Seed").fill(str(seed))
        page.keyboard.press("Tab")
        there = f"document.querySelector('{PICTURE}')?.src.includes('drawn-{seed}')"
        for _ in range(60):  # Gradio ignores a click until the drawing before is quite finished
            press(page, "Draw")
            page.wait_for_timeout(500)
            if page.evaluate(there):
                break
        page.wait_for_function(there)
        used.append(memory())
    print(f"memory in MB: {used[0]:.0f} after one drawing, {used[24]:.0f} after 25, {used[-1]:.0f} after 50")
    assert used[-1] - used[24] < 32

    def folders() -> list[Path]:  # Gradio itself leaves an empty file of this name for each upload
        return [path for path in server[2].glob("tmp*/tmp*") if path.is_dir()]

    for _ in range(60):  # clicks that came too early may still draw
        if not folders():
            break
        page.wait_for_timeout(500)
    assert not folders(), "a drawing's own folder is left"
    left = sum(path.stat().st_size for path in server[2].rglob("*") if path.is_file())
    print(f"Gradio keeps {left / 1000:.0f} kB")


@on_a_desktop
def test_the_screenshots_of_the_docs(page: Any, tmp_path: Path) -> None:
    folder = Path(os.environ.get("PAGE_PICTURES", tmp_path))
    draw(page)
    page.wait_for_timeout(2000)
    save(page, folder / "page_draw.png")
    tab(page, "Look inside")
    press(page, "Look inside")
    page.get_by_text("softmax of their own").wait_for()
    page.wait_for_timeout(2000)
    save(page, folder / "page_look.png")


def save(page: Any, path: Path) -> None:
    """Write what the page shows."""
    page.mouse.move(0, 0)
    page.evaluate("scrollTo(0, 0)")
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        shot.convert("RGB").resize((960, 675), Image.Resampling.LANCZOS).save(path, optimize=True)
