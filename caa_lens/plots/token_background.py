"""The colour behind a token that a number belongs to, as CSS: the same in reports, notebooks and the explorer."""

ALONG, AGAINST = "59, 125, 216", "200, 69, 59"  # red, green, blue of token_similarity's two colours
FULLEST = 0.7  # opacity of the strongest colour, so that text on it can be read, in light and in dark


def background(value: float, bound: float) -> str:
    """Blue above 0, red below, strongest at `bound`; the page's own colour at 0."""
    return f"rgba({ALONG if value > 0 else AGAINST}, {min(1.0, abs(value) / bound) * FULLEST:.2f})"
