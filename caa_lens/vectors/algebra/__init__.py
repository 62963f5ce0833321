"""Arithmetic with vectors that reads like the formulas.

`arithmetic` is what one vector or set can do (`+`, `without`, `slerp`), `combinations` makes one of several,
`subspaces` is the geometry under both, and `rules` says what may meet what. `expressions` writes down how a vector was
made, and `expression_parser` computes what is written.
"""
