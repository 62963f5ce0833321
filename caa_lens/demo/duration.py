"""How long a run will take, told from its first batches.

The first training pairs are read and timed. What the steps take in units of one such pair was measured on the demo
model (see `work`), so that the estimate is for this machine, as busy as it is now, and rough: other models and answers
of other lengths share their time out a little differently. When half of the work is done and it goes much faster or
slower than was told, that is said, too.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rich.console import Console

PROBED = 8  # pairs that are read to see how fast this machine is
MUCH = 1.5  # times as long, or as short, as was told


def work(
    *, n_train: int, n_held_out: int, n_swept: int, n_multipliers: int, n_new: int, n_prompts: int
) -> dict[str, float]:
    """What each step costs, in readings of one training pair: measured on the demo model's coarse run.

    Args:
        n_swept: layers that are swept.
        n_multipliers: those swept, without 0.
        n_new: tokens of each steered text.
    """
    cells = n_swept * n_multipliers
    return {
        "vectors": float(n_train),
        "reliability": float(n_train),
        "calibration": CALIBRATION * cells * n_held_out,
        "texts": TEXTS * n_prompts * n_new,
        "lens": LENS,
        "words": WORDS,
        "side_effects": SIDE_EFFECTS,
    }


# Of the processor's time on one thread. A cell is a layer at a multiplier, on one held-out pair, with the half as much
# that a calibration spends on neutral text.
CALIBRATION, TEXTS, LENS, WORDS, SIDE_EFFECTS = 0.22, 0.21, 48.0, 55.0, 185.0


@dataclass(slots=True)
class Duration:
    """What is left of a run, and what was told of it.

    Attributes:
        left: the work of the steps that are still to be done.
        clock: seconds.
    """

    console: Console
    left: dict[str, float]
    clock: Callable[[], float] = time.perf_counter
    _done: float = 0.0
    _began: float = 0.0
    _told: float = 0.0
    _again: bool = field(default=False)

    @classmethod
    def of(
        cls,
        console: Console,
        work: Mapping[str, float],
        there: set[str],
        read: Callable[[int], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> "Duration":
        """Time the reading of some pairs, and say how long all will take; nothing, if all that is kept is there.

        Args:
            there: steps whose results are kept.
            read: reads so many training pairs.
        """
        found = cls(console=console, left={step: cost for step, cost in work.items() if step not in there}, clock=clock)
        if there >= work.keys() - {"words"}:
            found.left.clear()
            return found
        read(1)  # whatever is looked at once
        began = clock()
        read(PROBED)
        found._began = clock()
        found._told = (found._began - began) / PROBED * sum(found.left.values())
        console.print(f"This takes {about(found._told)} on this machine, as busy as it is now.")
        return found

    def done(self, step: str) -> None:
        """A step is done; when half of the work is, what is left is told again if it is quite different."""
        self._done += self.left.pop(step, 0.0)
        left = sum(self.left.values())
        if self._again or not left or self._done < left:
            return
        self._again = True
        gone = self.clock() - self._began
        now = gone / self._done * left
        expected = self._told * left / (left + self._done)
        if now > MUCH * expected or now < expected / MUCH:
            self.console.print(f"It goes {'slower' if now > expected else 'faster'} than that: {about(now)} more.")


def about(seconds: float) -> str:
    """`about 2 minutes`; never finer than it can be known."""
    if seconds < 15:
        return "some seconds"
    if seconds < 55:
        return f"about {round(seconds / 10) * 10} seconds"
    if seconds < 90:
        return "about a minute"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minutes"
    return f"about {seconds / 3600:.1f} hours"
