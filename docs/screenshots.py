"""Takes the pictures of ``docs/images`` anew: ``python docs/screenshots.py RUNS`` with the folder of an ``awares-bench run`` or ``demo``.

Wants Playwright and a Chromium (``CHROMIUM`` names it; Playwright's own otherwise), and the extra ``app``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from PIL import Image
from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
SIZE = {"width": 1280, "height": 860}
PORT = 7931


def shoot(page: Page, name: str, full: bool = False) -> None:
    """Save what the page shows, or with ``full`` all of it at three quarters of its size, as ``images/NAME.png`` in 64 colours."""
    page.wait_for_timeout(400)
    path = IMAGES / f"{name}.png"
    page.screenshot(path=path, full_page=full)
    image = Image.open(path).convert("RGB")
    image = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS) if full else image
    image.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def app(page: Page) -> None:
    """The app after a question by three methods, and how long it took."""
    command = [sys.executable, "-m", "awares_bench.cli", "app", "--port", str(PORT)]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as cwd, subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL) as server:
        try:
            address = f"http://127.0.0.1:{PORT}"
            while True:
                try:
                    urlopen(address, timeout=5).close()
                    break
                except (URLError, OSError):
                    if server.poll() is not None or time.monotonic() - begun > 120:
                        raise SystemExit("the app did not come up") from None
                    time.sleep(0.1)
            page.goto(address)
            page.click("#examples button.thumbnail-item >> nth=2")
            page.wait_for_selector("#preview img")
            page.click("#ask")
            page.wait_for_selector("#card1 .awares-card")
            print(f"app: {time.monotonic() - begun:.1f} s from the command to the first answer")
            page.wait_for_selector("#card3 .awares-card")
            page.wait_for_function("document.querySelectorAll('#asked .number').length == 1")
            asked = time.monotonic()
            page.click("#ask")
            page.wait_for_function("document.querySelectorAll('#asked .number').length == 2", polling=20)
            print(f"app: {time.monotonic() - asked:.2f} s for the second question, by three methods")
            shoot(page, "app", full=True)
        finally:
            server.terminate()


def reports(page: Page, runs: str) -> None:
    """index.html, a gallery and the leaderboard of ``runs``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "awares_bench.cli", "report", runs]
        subprocess.run(
            [*command, "--out", f"{folder}/r", "--formats", "svg", "--gallery", "3"], check=True, stdout=subprocess.DEVNULL
        )
        subprocess.run([*command, "--site", f"{folder}/site"], check=True, stdout=subprocess.DEVNULL)
        page.goto(f"file://{folder}/r/index.html")
        shoot(page, "index")
        gallery = next(Path(folder, "r", "gallery").glob("*--full.html"))
        page.goto(f"file://{gallery}")
        shoot(page, "gallery")
        page.goto(f"file://{folder}/site/index.html")
        shoot(page, "leaderboard")


def main(runs: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        app(page)
        reports(page, runs)
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
