"""Arithmetic with vectors that reads like the formulas, its rules, and expressions written and read back."""
