"""The arithmetic of steering vectors: formulas, the rules under them, and the expressions that record them."""
