"""Questions that stand in both letter orders: the two pairs of one are joined into one, in which the letter cancels.

`(A) Yes (B) No` and `(A) No (B) Yes`, with Yes as the positive answer of both, have the differences `behavior + letter`
and `behavior - letter`. They say one thing and not two, so they count as one pair, whose sides are the means of theirs:
its difference is `behavior`, free of the letter as that of completions is, without any estimate. Which pairs are of one
question, the digits in the provenance tell, which are the same when letters are exchanged.
"""

from collections import defaultdict
from dataclasses import replace

import torch

from caa_lens.engine.pair_reading import PairActivations
from caa_lens.provenance import PAIR_HASHES

Members = tuple[tuple[int, ...], ...]
NO_LETTERS = ("", "")
SAME = 1e-5  # of a side's norm: what batching may change


def join_letter_orders(activations: PairActivations) -> tuple[PairActivations, Members]:
    """The activations with each two letter orders of a question as one pair, and of which pairs each is now.

    A question that stands more than twice, or twice with the same letters, is left as it is.

    Raises:
        ValueError: if the positive answer of one order has the text of the other's negative one.
    """
    hashes = activations.provenance.details.get(PAIR_HASHES, "").split()
    if len(hashes) != len(activations):
        return activations, tuple((i,) for i in range(len(activations)))
    found = defaultdict(list)
    for i, digits in enumerate(hashes):
        found[digits].append(i)
    members: list[tuple[int, ...]] = []
    for same in found.values():
        joins = len(same) == 2 and _is_exchanged(activations, *same)
        members += [tuple(same)] if joins else [(i,) for i in same]
    members.sort()
    if len(members) == len(activations):
        return activations, tuple(members)
    values = torch.stack([activations.values[list(one)].mean(0) for one in members])
    norms = torch.stack([activations.norms[list(one)].mean(0) for one in members])
    about = activations.provenance
    details = {**about.details, PAIR_HASHES: " ".join(hashes[one[0]] for one in members)}
    joined = PairActivations(
        values=values,
        norms=norms,
        layers=activations.layers,
        letters=tuple(activations.letters[one[0]] if len(one) == 1 else NO_LETTERS for one in members),
        provenance=replace(about, details=details),
    )
    return joined, tuple(members)


def _is_exchanged(activations: PairActivations, one: int, other: int) -> bool:
    """Whether two pairs of a question are its two letter orders."""
    letters = activations.letters
    if not letters[one][0] or letters[one] != letters[other][::-1]:
        return False
    sides = activations.values[[one, other], :, -1].double()  # [pair side d_model]
    if bool((sides[0] - sides[1].flip(0)).norm(dim=-1).max() <= SAME * sides.norm(dim=-1).mean()):
        raise ValueError(
            f"pair {other} is pair {one} with its answers exchanged, so that what is positive in one is negative in "
            "the other: keep the right one, then read the activations again"
        )
    return True
