"""Pages in a real browser, if there is one: no script fails, nothing sticks out."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from made_runs import make_run

from hyperjax.launch import report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

# In a page: says how far it is wider than its window once its charts are drawn, after a
# click on a heading and another horizontal axis.
PROBE = """<script>
addEventListener("error", e => parent.postMessage("failed: " + e.message, "*"));
const wait = setInterval(async () => {
  if (!document.body.dataset.drawn) return;
  clearInterval(wait);
  document.querySelector("th button").click();
  const select = document.querySelector("select.against");
  if (select) { select.value = "bytes"; select.dispatchEvent(new Event("change")); }
  await new Promise(done => setTimeout(done, 2000));
  const root = document.documentElement, over = root.scrollWidth - root.clientWidth;
  const charts = [...document.querySelectorAll(".chart svg.marks")];
  const axes = charts.filter(svg => svg.textContent.includes("bytes sent"));
  const said = [document.body.dataset.drawn, charts.length, axes.length, over];
  parent.postMessage(said.join(" "), "*");
}, 200);
</script>"""
FRAME = """<!doctype html><body><iframe src="{page}" width="{width}" height="900"
style="border:0"></iframe><script>
addEventListener("message", e => document.body.dataset.said = e.data);
</script></body>"""


def seen(page: Path, width: int) -> tuple[str, int, int, int]:
    """Whether charts were drawn, how many, how many against bytes, and the overflow."""
    text = page.read_text(encoding="utf-8")
    probed = page.with_name("probed.html")
    probed.write_text(text.replace("</main>", f"</main>{PROBE}"), encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(page="probed.html", width=width), encoding="utf-8")
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--virtual-time-budget=60000", "--window-size=1400,1000"),
            frame.as_uri(),
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    found = re.search('data-said="(.*?)"', done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    drawn, *numbers = found[1].split()
    assert drawn in ("yes", "no"), found[1]
    return drawn, *map(int, numbers)


@pytest.mark.parametrize("width", [400, pytest.param(1280, marks=pytest.mark.slow)])
def test_a_page_is_drawn_and_fits(tmp_path, width):
    for seed in range(2):
        for method in ("fedavg", "hyperfedzero"):
            settings = {"data.alpha": 0.1 * (seed + 1)}
            folder = tmp_path / f"runs/{method}{seed}"
            make_run(folder, method, rounds=8, seed=seed, settings=settings)
    page = report.run_report(str(folder))
    assert seen(Path(page), width) == ("yes", 7, 3, 0)
    path = report.comparison_report([tmp_path / "runs"], tmp_path / "x.html", "Runs")
    drawn, charts, against, over = seen(Path(path), width)
    assert (drawn, against, over) == ("yes", 3, 0) and charts >= 8
