"""How much steering, and where, within a budget of side effects."""
