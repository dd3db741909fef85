"""A real browser, where there is one: opens a page, and says what a script has found in it."""

import html
import json
import re
import shutil
import subprocess

import pytest

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
_CHECK = """<script>
const found = {errors: []};
addEventListener("error", event => found.errors.push(event.message));
addEventListener("load", () => {
  found.drawn = [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    const lines = [...svg.querySelectorAll("path")].filter(p => p.getBBox().width > 1 || p.getBBox().height > 1);
    const words = [...svg.querySelectorAll("text")].filter(t => t.getBBox().width > 0);
    return box.width > 100 && box.height > 50 && lines.length > 3 && words.length > 3;
  });
  try { (() => {BODY})(); } catch (error) { found.errors.push(String(error)); }
  document.body.dataset.found = JSON.stringify(found);
});</script>"""


def opened(page, folder, script=""):
  """Opens a page in headless Chromium.

  Args:
    page: its text.
    folder: for a copy and the browser's profile.
    script: JavaScript that adds to `found`, once the page is there.

  Returns:
    What was found: `drawn`, whether each picture has a size, lines and words; `errors`; and what `script` has added.
  """
  path = folder / "checked.html"
  path.write_text(page.replace("<body>", "<body>" + _CHECK.replace("BODY", script), 1))
  dump = subprocess.run(
      ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
       "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,900",
       f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()],
      capture_output=True, text=True, timeout=120, check=True).stdout
  return json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dump)[1]))
