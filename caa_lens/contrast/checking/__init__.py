"""A linter of contrast pairs: what in them is not the behavior, and would be in the vector.

May never be imported here: a model, a prompt, torch. Each module looks for one kind of fault and gives `Finding`s.
"""
