"""What is kept when a long job is stopped with Ctrl-C, said where Python shows the interrupt."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

MARK = "stopped: "
NOTHING = "nothing is kept, as a result is one only when it is whole; fewer layers at a time can be saved as they come"


@contextmanager
def kept_if_stopped(told: Callable[[], str] = lambda: NOTHING) -> Iterator[None]:
    """Add a note to a `KeyboardInterrupt` that says what is kept, and let it pass; of blocks in blocks the outermost.

    Args:
        told: asked when it happens.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.__notes__ = [note for note in getattr(stop, "__notes__", []) if not note.startswith(MARK)]
        stop.add_note(MARK + told())
        raise
