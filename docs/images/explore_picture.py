"""The explorer's picture, from its page while it is served.

make explore ARGS="--port 8712"
.venv/bin/python docs/images/explore_picture.py http://127.0.0.1:8712
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from helpers.driven_browser import DrivenBrowser

PICTURE = Path(__file__).resolve().parent / "explore.png"
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
        page.picture(str(PICTURE))
    Image.open(PICTURE).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
