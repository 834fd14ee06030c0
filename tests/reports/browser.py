"""Headless Chromium as a judge of pages: the document as it is after all scripts have run."""

import shutil
import subprocess
from pathlib import Path

import pytest

_SECONDS = 120
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=20000",
)


def dump_dom(page: str, folder: Path) -> str:
    """The page's document after its scripts; skips the test where there is no Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    file, profile = folder / "page.html", folder / "profile"
    file.write_text(page, encoding="utf-8")
    profile.mkdir(exist_ok=True)
    command = [chromium, *_FLAGS, f"--user-data-dir={profile}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=_SECONDS)
    document = done.stdout.decode("utf-8")
    assert "</html>" in document, done.stderr.decode(errors="replace")[-2000:]
    return document
