"""Figures from frames and plain values.

May never be imported here: anything of caa_lens but this room. A figure that needs to know a result's class asks for
the value it wants instead.
"""
