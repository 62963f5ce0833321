"""The README's picture, from a finished demo run: dose-response beside one prompt's texts.

    make demo
    .venv/bin/python docs/images/demo_picture.py runs/demo /tmp/demo.html
    chromium --headless --hide-scrollbars --virtual-time-budget=5000 --window-size=1200,620 \
        --screenshot=docs/images/demo.png file:///tmp/demo.html
"""

import html
import json
import sys
from pathlib import Path

from plotly.offline import get_plotlyjs

from caa_lens.measures.calibrating.calibrated import Calibration
from caa_lens.steering.generated_text import shown

PROMPT = "Write a few sentences about a rainy afternoon."

PAGE = """<!doctype html><meta charset="utf-8"><script>{script}</script>
<style>
body{{margin:0;padding:18px 22px;background:#fff;color:#1d2433;font:15px/1.45 system-ui,sans-serif;
display:grid;grid-template-columns:470px 1fr;gap:22px}}
dl{{margin:0;display:grid;grid-template-columns:max-content 1fr;gap:8px 14px}}
dt{{font-weight:700;text-align:right;padding-top:7px;white-space:nowrap}}
dd{{margin:0;padding:7px 11px;border-radius:6px}}
h1{{font-size:17px;margin:4px 0 12px}}</style>
<div>{figure}</div><div><h1>“{prompt}”</h1><dl>{rows}</dl></div>"""
SHADES = {"-2": "#f6cfc6", "-1": "#fae5df", "+0": "#f2f3f5", "+1": "#dfeaf8", "+2": "#c6dbf4"}


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = Calibration.load(folder / "calibration.parquet")
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))[PROMPT]
    rows = "".join(
        f"<dt>{'unsteered' if m == '+0' else m}</dt>"
        f"<dd style='background:{SHADES[m]}'>{html.escape(shown(**text))}</dd>"
        for m, text in texts.items()
    )
    figure = found.sweep.plot_layer(found.layer).update_layout(height=500, font={"color": "#1d2433"})
    page = PAGE.format(
        script=get_plotlyjs(),
        figure=figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False}),
        prompt=PROMPT,
        rows=rows,
    )
    out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
