"""Figures from results: each takes a finished result and computes nothing but its layout."""
