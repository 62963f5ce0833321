"""A session's events as HTML, for page and notebook alike. Every text is escaped here: models write anything."""

from html import escape

from caa_lens.explorer.session import STEERED, Coloured, Finished, LensRead, Piece
from caa_lens.interpretation.lens_results import LogitLens
from caa_lens.plots.token_background import AGAINST, ALONG, FULLEST

NOT_READ = '<p class="soft">The lens was not read, as the text was stopped.</p>'
WHY = {"end": "", "length": " …", "stopped": " … (stopped)"}


def number(value: float | int, digits: int) -> str:
    """With its sign, as it is set in print."""
    return f"{value:+.{digits}f}".replace("-", "−")


def piece_html(piece: Piece) -> str:
    """A token that has no colour yet."""
    return f"<span>{escape(piece.text)}</span>" if piece.text else ""


def text_html(coloured: Coloured) -> str:
    """A text, token by token: blue along the vector, red against it; the cosine is the hover text."""
    spans = []
    for text, cosine in coloured.tokens:
        share = max(-1.0, min(1.0, cosine / coloured.bound))
        colour = f"rgba({ALONG if share > 0 else AGAINST}, {FULLEST * abs(share):.3f})"
        if text:
            spans.append(f'<span style="background: {colour}" title="{number(cosine, 3)}">{escape(text)}</span>')
    return "".join(spans)


def end_html(finished: Finished) -> str:
    """What stands behind a text that did not come to its own end."""
    return f'<span class="cut">{WHY[finished.why]}</span>' if WHY[finished.why] else ""


def legend_html(coloured: Coloured) -> str:
    """What the colours mean, in words."""
    along, against = (
        f'<span style="background: rgba({colour}, {FULLEST})">&nbsp;{number(end, 2)}&nbsp;</span>'
        for colour, end in ((ALONG, coloured.bound), (AGAINST, -coloured.bound))
    )
    return (
        f"{against} to {along}: cosine of each token's residual stream behind layer {coloured.layer} with the vector. "
        "Both texts are read without steering."
    )


def title_of(side: str, layer: int, multiplier: float | int) -> str:
    """What stands above a text."""
    return f"Steered: layer {layer}, times {number(multiplier, 1)}" if side == STEERED else "Unsteered"


def lens_html(read: LensRead) -> str:
    """The tokens that a vector raises and lowers, with bars, and whether that is more than random directions say."""
    if read.lens is None:
        return f'<p class="soft">reading the lens of layer {read.layer} …</p>'
    frame = read.lens.frame
    reach = max(float(frame["score"].abs().max()), 1e-9)
    columns = []
    for side, head, colour in (("promoted", "raised", ALONG), ("suppressed", "lowered", AGAINST)):
        rows = frame[frame["side"] == side].sort_values("rank")
        items = "".join(
            f'<tr><td class="token" title="{escape(token)}" style="background: linear-gradient(to right, '
            f'rgba({colour}, 0.35) {100 * abs(score) / reach:.0f}%, transparent 0)">{escape(token)}</td>'
            f'<td class="score">{number(score, 2)}</td></tr>'
            for token, score in zip(rows["token"], rows["score"].astype(float), strict=True)
        )
        columns.append(f'<table class="lens"><caption>{head}</caption>{items}</table>')
    return f'<p class="soft">{_verdict(read.lens)}</p><div class="lenses">{"".join(columns)}</div>'


def _verdict(lens: LogitLens) -> str:
    row = lens.by_layer().iloc[0]
    said = f"Layer {row['layer']}, times +1: the next-token logits that the vector raises and lowers, on average. "
    said += "A negative multiplier exchanges the two."
    if "verdict" in row:
        said += f" Beside {lens.settings['controls']} random directions: <strong>{escape(str(row['verdict']))}</strong>"
        said += f" (p = {row['p_value']:.2f})."
    return said
