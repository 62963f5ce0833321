"""What the check of an exercise says to a wrong answer."""


def hint_of(said, hint):
    """It is wrong, and the hint is part of what is shown."""
    assert not said.right
    assert hint in repr(said), (hint, said)
