"""Checks of the answers to the notebooks' exercises: right, wrong with a hint, or not answered yet.

A module a notebook, a function an exercise; each computes the right answer itself, from the model and the vectors that
it is given, so no answer is written anywhere. They ship with the package because a notebook in Colab has nothing else.
Nothing in the package imports it. May never be imported here: the command line, the demo, reports.
"""
