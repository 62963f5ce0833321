"""The explorer's picture, from its page while it is served.

make explore ARGS="--port 8712"
.venv/bin/python docs/images/explore_picture.py http://127.0.0.1:8712
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from helpers.driven_browser import DrivenBrowser

STATUS = "document.getElementById('status').textContent"


def main(address: str) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, DrivenBrowser(folder) as page:
        page.size(1280, 760)
        page.dark(False)
        page.open(address)
        page.wait_for(f"{STATUS} == 'ready'")
        page.value("document.getElementById('multiplier').value = -2; say(); ask()")
        page.wait_for(f"{STATUS}.startsWith('done')")
        page.value("document.activeElement.blur()")
        page.picture(str(Path(__file__).resolve().parent / "explore.png"))


if __name__ == "__main__":
    main(sys.argv[1])
