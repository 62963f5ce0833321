"""A page in headless chromium: what its scripts made of it, what they said, what they asked the network for."""

import re
import shutil
import subprocess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Chromium has requests of its own, so the page's are asked of the page; behind its end, so that it is left as it is.
TELL_REQUESTS = """<script>
setTimeout(() => {
  const names = performance.getEntriesByType("resource").map((entry) => entry.name);
  document.body.setAttribute("data-requests", names.join(" "));
}, 5000);
</script>"""


DARK = "--blink-settings=preferredColorScheme=0"  # as if the reader's system were dark


def browse(path, tmp_path, *flags):
    """(document after scripts ran, console messages, requests) of a page in headless chromium."""
    told = tmp_path / "told.html"
    told.write_text(path.read_text(encoding="utf-8") + TELL_REQUESTS, encoding="utf-8")
    document, console = open_page(told, tmp_path, *flags)
    requests = re.search(r'data-requests="([^"]*)"', document)
    assert requests, console
    return document, console, requests[1].split()


def open_page(path, tmp_path, *flags):
    """(document after scripts ran, console messages) of a file where it lies, in headless chromium."""
    quiet = "background-networking component-update sync default-apps extensions gpu breakpad"
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--no-first-run",
            *(f"--disable-{what}" for what in quiet.split()),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            *flags,
            "--virtual-time-budget=8000",
            "--dump-dom",
            path.resolve().as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)
