"""A vector of one layer, behavior, prompt or model used in another."""
