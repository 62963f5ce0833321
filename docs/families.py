"""The page of all families of models, and what works on each: `python docs/families.py` writes docs/families.md.

Run it once with each TransformerLens; the rows of the other one are kept. Names of families may follow, for a few only.
"""

import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import family_pages  # noqa: E402
from helpers.families import FAMILIES, absent_here  # noqa: E402
from helpers.family_checks import case_of  # noqa: E402


def main(names: list[str]) -> None:
    for name in tqdm(names or list(FAMILIES), unit="family"):
        gone = name in absent_here()
        row = family_pages.absent_row(name) if gone else family_pages.row_of(case_of(name))
        page = family_pages.written({name: row}, family_pages.text())  # one family at a time: it takes a while
        family_pages.PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
