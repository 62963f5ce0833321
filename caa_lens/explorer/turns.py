"""Who writes when: one text at a time in one thread, with the event loop served between two tokens.

So a page or a notebook can stop a text in the middle, and nothing else ever runs the model meanwhile: a notebook's cell
that runs it, or edits it, waits for a token's end, and the text waits for the cell's. Whoever asks again replaces what
they have asked for; whoever asks while somebody else's text is being written is told so.
"""

import asyncio
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from caa_lens.explorer.session import Asked, Event, Session

REFUSED = "Another window's text is being written: wait until it is done, or stop it there."
# What a session's work may raise that the user can do something about; all else is a fault of ours.
SAID = (ValueError, TypeError, IndexError, RuntimeError, MemoryError, NotImplementedError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """Something in words: that a text is "begun" or all is "done", a "note" of a warning, or an "error"."""

    kind: str
    text: str = ""


Tell = Callable[[Event | Said], None]


class Turns:
    """The turns of one session's askers."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._owner: Hashable = None
        self._next: tuple[Asked, Tell] | None = None
        self._task: asyncio.Task | None = None

    def ask(self, owner: Hashable, asked: Asked, tell: Tell) -> None:
        """Write for somebody, as soon as what they had asked for before has stopped; needs a running event loop."""
        if self._task is not None and not self._task.done():
            if self._owner != owner:
                tell(Said(kind="error", text=REFUSED))
                return
            self._next = asked, tell
            self.session.stop()
            return
        self._owner, self._next = owner, (asked, tell)
        self._task = asyncio.get_running_loop().create_task(self._work())

    def stop(self, owner: Hashable) -> None:
        """Stop somebody's text behind its next token, and forget what else they asked for."""
        if self._owner == owner and self._task is not None and not self._task.done():
            self._next = None
            self.session.stop()

    async def done(self) -> None:
        """Wait until nothing is being written."""
        while self._task is not None and not self._task.done():
            await asyncio.wait([self._task])

    async def _work(self) -> None:
        while self._next is not None:
            (asked, tell), self._next = self._next, None
            tell(Said(kind="begun"))
            events, noted = self.session.write(asked), set[str]()
            try:
                while True:
                    event, notes = _step(events)
                    for note in notes:
                        if note not in noted:
                            noted.add(note)
                            tell(Said(kind="note", text=note))
                    if event is None:
                        break
                    tell(event)
                    await asyncio.sleep(0)
            except SAID as error:
                tell(Said(kind="error", text=str(error)))
            except Exception as error:
                tell(Said(kind="error", text=f"a fault of the explorer's own, {type(error).__name__}: {error}"))
                raise
            finally:
                events.close()
                tell(Said(kind="done"))


def _step(events: Iterator[Event]) -> tuple[Event | None, list[str]]:
    """The next event, and what was warned of on the way to it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        event = next(events, None)
    ours = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    return event, ours
