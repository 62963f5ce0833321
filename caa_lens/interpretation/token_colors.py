"""Tokens in colours, drawn by circuitsvis in Jupyter or on a page of its own, and still where no script runs.

circuitsvis' `ColoredTokens`, and `ColoredTokensMulti` with its selector, come from the script that the package brings;
nothing is asked of the network. The script takes 1.3 MB, packed 0.5 MB, so only the first picture that a process
displays carries it, and the page keeps it for all others (see `TokenColors`). Until it is there, and wherever scripts
do not run, the tokens stand there in the colours of one label.
"""

import base64
import gzip
import html
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import uuid4

from caa_lens.atomic_files import write_atomically
from caa_lens.plots.token_background import background

NEGATIVE_COLOUR, POSITIVE_COLOUR = "#c8453b", "#3b7dd8"  # the ends of the heat maps' red and blue


# An element runs the code, as a page that allows this script allows that one too.
UNPACK = """<script>
if (!window.caaLensCircuitsVis && !window.caaLensUnpacking) (async () => {
  window.caaLensUnpacking = true;
  const bytes = Uint8Array.from(atob("DATA"), (letter) => letter.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const element = document.createElement("script"), code = await new Response(unpacked).text();
  element.textContent = `window.caaLensCircuitsVis = (() => { ${code}\nreturn CircuitsVis; })();`;
  document.head.append(element);
  element.remove();
  window.dispatchEvent(new Event("caa-lens-circuitsvis"));
})();
</script>"""

_script_sent = False  # whether a picture that this process displayed has carried circuitsvis' script


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenColors:
    """Tokens coloured by values, symmetric about 0: a picture that displays itself in Jupyter.

    A page needs circuitsvis' script once. The picture that carries it leaves it on the page as
    `window.caaLensCircuitsVis`; pictures without it wait for that. It stays when that picture's output is cleared,
    until the page is loaded anew. Where it is not (a saved notebook without that output, one that is not trusted, a
    front end that keeps outputs apart, a site that shows code), a picture has the colours of one label, without a
    choice.

    Attributes:
        caption: what is shown, above the tokens.
        tokens: their texts.
        values: one row a token, one column a label.
        labels: what the selector offers; no selector if there is only one.
        bound: the value with full colour; its negative has the other colour.
    """

    caption: str
    tokens: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    labels: tuple[str, ...]
    bound: float

    def to_html(self, *, full_page: bool = True, script: bool = True) -> str:
        """The picture as HTML: a self-contained page, or a fragment with or without circuitsvis' script."""
        fragment = self._fragment()
        if full_page:
            head = '<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
            style = "<style>body { font: 15px sans-serif; margin: 2em }</style>"
            return f"{head}<title>{html.escape(self.caption)}</title>{style}\n{circuitsvis_script()}\n{fragment}"
        return f"{circuitsvis_script(packed=True)}\n{fragment}" if script else fragment

    def save(self, path: str | Path) -> Path:
        """Write a self-contained page, atomically."""
        page = self.to_html()
        return write_atomically(Path(path), lambda temporary: temporary.write_text(page, encoding="utf-8"))

    def _fragment(self) -> str:
        # circuitsvis sets a token's text as innerHTML, where `<s>` would vanish and `<img onerror=...>` would run, but
        # its hover text as plain text, where `&lt;s>` would read as such. A zero-width blank behind `<` and `&` makes
        # both of them plain characters in either place.
        tokens = [token.replace("&", "&\u200b").replace("<", "<\u200b") for token in self.tokens]
        props: dict[str, Any] = {"tokens": tokens, "negativeColor": NEGATIVE_COLOUR, "positiveColor": POSITIVE_COLOUR}
        if len(self.labels) == 1:
            element = "ColoredTokens"
            props |= {"values": [row[0] for row in self.values], "minValue": -self.bound, "maxValue": self.bound}
        else:
            # One bound for all labels: the widget keeps the first label's when another one is chosen.
            element, n = "ColoredTokensMulti", len(self.labels)
            props |= {"values": self.values, "labels": self.labels}
            props |= {"positiveBounds": [self.bound] * n, "negativeBounds": [-self.bound] * n}
        # Inside a script element only `</script` and `<!--` are special, so no `<` is left.
        text = json.dumps(props).replace("<", "\\u003c")
        name = f"caa-lens-{uuid4().hex}"
        return f"""<div style="margin: 15px 0">
<div style="margin-bottom: 8px">{html.escape(self.caption)}</div>
<div id="{name}" style="line-height: 1.8">{self._still()}</div>
</div>
<script>
(() => {{
  const props = {text};
  const draw = (triesLeft) => {{
    const vis = window.caaLensCircuitsVis;
    if (document.getElementById("{name}")) vis.render("{name}", vis.{element}, props);
    else if (triesLeft) setTimeout(draw, 100, triesLeft - 1);  // a notebook runs scripts before it attaches the output
  }};
  if (window.caaLensCircuitsVis) draw(50);
  else window.addEventListener("caa-lens-circuitsvis", () => draw(50), {{ once: true }});
}})();
</script>"""

    def _still(self) -> str:
        """The tokens in the colours of the middle label, without a script."""
        middle = len(self.labels) // 2
        spans = []
        for token, row in zip(self.tokens, self.values, strict=True):
            style = f"background: {background(row[middle], self.bound)}; white-space: pre-wrap"
            spans.append(f'<span style="{style}" title="{row[middle]:.4g}">{html.escape(token)}</span>')
        choice = ""
        if len(self.labels) > 1:
            choice = (
                f'<div style="margin-top: 8px">Shown: {html.escape(self.labels[middle])}. To choose another one, trust '
                "the notebook and run it from the top in a new kernel, or write a page with "
                "<code>.show().save(path)</code>.</div>"
            )
        return "".join(spans) + choice

    def __repr__(self) -> str:
        return f"TokenColors({self.caption}, {len(self.tokens)} tokens x {len(self.labels)} layers)"

    def _repr_html_(self) -> str:
        global _script_sent  # once a process, as a page is told from another one by nothing else
        carry, _script_sent = not _script_sent, True
        return self.to_html(full_page=False, script=carry)


def circuitsvis_script(*, packed: bool = False) -> str:
    """circuitsvis' bundled script as an element that a page may hold any number of times: only the first one runs.

    Args:
        packed: compressed, to a third of the size, which the browser unpacks.
    """
    code = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    code = code.replace("//# sourceMappingURL=iife.js.map", "")
    if packed:
        data = base64.b64encode(gzip.compress(code.encode(), mtime=0)).decode()
        return UNPACK.replace("DATA", data)
    code = code.replace("</script", "<\\/script")
    return f"""<script>
if (!window.caaLensCircuitsVis) {{
  window.caaLensCircuitsVis = (() => {{ {code}
    return CircuitsVis; }})();
  window.dispatchEvent(new Event("caa-lens-circuitsvis"));
}}
</script>"""
