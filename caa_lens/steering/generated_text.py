"""Text that a model wrote, and whether it came to its end."""

ELLIPSIS = " …"


class GeneratedText(str):
    """A string that knows whether `max_new_tokens` ended it; as a string it is the exact text, without a mark.

    Attributes:
        cut: the model had not come to its end-of-sequence token.
    """

    cut: bool

    def __new__(cls, text: str = "", *, cut: bool = False) -> "GeneratedText":
        made = super().__new__(cls, text)
        made.cut = cut
        return made

    @property
    def shown(self) -> str:
        """As people are to read it: with an ellipsis where it was cut."""
        return shown(self, self.cut)


def shown(text: str, cut: bool) -> str:
    """A text with an ellipsis where it was cut."""
    return text.rstrip() + ELLIPSIS if cut else str(text)
