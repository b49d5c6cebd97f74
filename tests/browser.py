"""A headless Chromium for the tests of pages: Debian's, driven by Selenium, with nothing that it would do on its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


def chromium() -> tuple[str, str] | None:
    """Chromium and its driver; None where they are not installed."""
    found = shutil.which("chromium"), shutil.which("chromedriver")
    return (found[0], found[1]) if found[0] and found[1] else None


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """A browser with a fresh profile, whose console and network can be read."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    found = chromium()
    assert found is not None
    options = ChromeOptions()
    options.binary_location = found[0]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=ChromeService(found[1]))
    try:
        driver.set_script_timeout(60)
        yield driver
    finally:
        driver.quit()


def show(driver: Any, page: Path, *, width: int = 1600, dark: bool = False) -> None:
    """Open a page at a width and in a theme, and wait until every chart is drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600}
    )
    theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}, {"name": "prefers-reduced-motion", "value": "reduce"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
    driver.get("about:blank")
    requests(driver), messages(driver)  # what went before is not this page's
    driver.get(page.resolve().as_uri())
    undrawn = "return [...document.querySelectorAll('.plot')].filter((box) => !box.dataset.drawn).length"
    WebDriverWait(driver, 60).until(lambda d: d.execute_script(undrawn) == 0)


def requests(driver: Any) -> list[str]:
    """Addresses that were asked for since the last time."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def messages(driver: Any) -> list[str]:
    """What the console was told since the last time."""
    return [entry["message"] for entry in driver.get_log("browser")]


def picture(driver: Any, path: Path) -> Path:
    """The whole page as a PNG."""
    import base64

    height = driver.execute_script("return document.documentElement.scrollHeight")
    width = driver.execute_script("return innerWidth")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(shot["data"]))
    return path
