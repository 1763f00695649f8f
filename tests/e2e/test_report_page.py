"""The report's page in a real Chromium, wide and narrow, light and dark: readable, and nothing is
fetched.

Needs ``selenium``, ``chromium`` and ``chromedriver``, as ``test_page.py`` does.  ``INVAR_REPORT``
may name a ``report.json`` to look at instead of the small one made here; pictures go to the folder
that ``INVAR_SHOTS`` names, if any.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from invar_ray.evaluation.outcome import write_outcome
from invar_ray.evaluation.page import render_html
from invar_ray.evaluation.report import read_report
from tests.unit.evaluation.test_page import outcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
webdriver = pytest.importorskip(
    "selenium.webdriver", reason="the package selenium is not installed (extra dev)"
)

# Text that its box hides, and elements that stick out of the page: what a reader cannot read.
CUT = """
const faults = [];
for (const e of document.querySelectorAll('main *')) {
  const style = getComputedStyle(e), box = e.getBoundingClientRect();
  if (e.closest('svg') && e.tagName !== 'svg') continue;
  if (!e.closest('.wide, .chart') && box.width > 0 && (box.right > innerWidth + 1 || box.left < -1))
    faults.push(['sticks out', e.tagName, e.className.toString(), Math.round(box.left), Math.round(box.right)]);
  if (['hidden', 'clip'].includes(style.overflowX) && e.scrollWidth > e.clientWidth + 1 && e.tagName !== 'svg')
    faults.push(['hides', e.tagName, e.className.toString(), e.scrollWidth, e.clientWidth]);
}
return faults;
"""
# The text of a chart: its size on the screen, and pairs that lie on each other.
CHARTS = """
const faults = [];
for (const svg of document.querySelectorAll('svg')) {
  const words = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim());
  const boxes = words.map(t => t.getBoundingClientRect());
  const frame = svg.getBoundingClientRect();
  boxes.forEach((a, i) => {
    if (a.height < 9) faults.push(['small', words[i].textContent, a.height]);
    if (a.left < frame.left - 1 || a.right > frame.right + 1) faults.push(['cut', words[i].textContent]);
    boxes.slice(i + 1).forEach((b, j) => {
      const over = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const under = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (over > 2 && under > 3) faults.push(['overlap', words[i].textContent, words[i + 1 + j].textContent]);
    });
  });
}
return faults;
"""
# Contrast of all text against the first ground behind it that is not see-through (WCAG 2.2, 1.4.3:
# 4.5 or more).
CONTRAST = """
const rgb = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const ground = e => { for (; e; e = e.parentElement) {
  const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] > .99) return c; } return null; };
const low = {};
for (const e of document.querySelectorAll('main *, main')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || ['title', 'desc'].includes(e.tagName)) continue;
  const style = getComputedStyle(e), back = ground(e);
  const ink = rgb(e.closest('svg') ? style.fill : style.color);
  if (!back) { low['no ground'] = e.tagName; continue; }
  const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
  const ratio = (a + .05) / (b + .05);
  if (ratio < 4.5) low[e.tagName + '.' + (e.getAttribute('class') || '')] = ratio.toFixed(2);
}
return low;
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    helper = shutil.which("chromedriver")
    if not program or not helper:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(flag)
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(helper))
    yield made
    made.quit()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("INVAR_REPORT")
    folder = tmp_path_factory.mktemp("report")
    if named:
        (folder / "report.html").write_text(render_html(read_report(Path(named))), encoding="utf-8")
    else:
        write_outcome(outcome(), folder, overlap_k=5)
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_the_page_is_readable_and_fetches_nothing(
    driver: Any, file: Path, width: int, scheme: str
) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get_log("performance")
    driver.get(file.as_uri())
    picture(driver, f"report-{width}-{scheme}", width)

    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert asked == [file.as_uri()]
    assert [
        entry for entry in driver.get_log("browser") if entry["level"] in {"SEVERE", "WARNING"}
    ] == []
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert driver.execute_script(CUT) == []
    assert driver.execute_script(CHARTS) == []
    assert driver.execute_script(CONTRAST) == {}
    ground = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground.strip("rgba()").split(",")[:3])) > 384) == (scheme == "light")


def picture(driver: Any, name: str, width: int) -> None:
    folder = os.environ.get("INVAR_SHOTS")
    if folder:
        height = driver.execute_script("return document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "scale": 1, "width": width, "height": height}
        shot = driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
        )
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))
