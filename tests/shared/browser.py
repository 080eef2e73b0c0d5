"""A real browser for tests: headless Chromium, asked by its command line alone.

A page under test is put into frames of several widths in a page of ours, whose script reads it as the browser has
laid it out and leaves what it found in the document, which Chromium prints. Nothing is served, no name resolves.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000")  # fmt: skip


def chromium() -> str:
    """The browser; skips the test where there is none and none could be installed (`tools/check` tries in CI)."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium-headless-shell")
    return found


def seen(page: bytes, widths: list[int], script: str, folder: Path) -> list:
    """What `script`, the body of a function of (document, window), returns in a frame of each width."""
    frames = "".join(
        f'<iframe width="{w}" height="800" style="border:0" srcdoc="{escape(page.decode())}"></iframe>'
        for w in widths
    )
    asked = f"(document, window) => {{{script}}}"
    outer = f"""<!doctype html><meta charset="utf-8"><body>{frames}<pre id="found">[]</pre><script>
    addEventListener("load", () => {{
      const ask = {asked};
      const found = [...document.querySelectorAll("iframe")].map(
        (f) => ask(f.contentDocument, f.contentWindow));
      document.getElementById("found").textContent = JSON.stringify(found);
      document.querySelectorAll("iframe").forEach((f) => f.remove());
    }});
    </script></body>"""
    path = folder / "outer.html"
    path.write_text(outer, encoding="utf-8")
    command = [chromium(), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    found = json.loads(unescape(match[1]))
    assert len(found) == len(widths), "the page's script did not run"
    return found
