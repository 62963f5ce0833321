"""Timings and counts, each a script: what a thing costs, on this machine."""
