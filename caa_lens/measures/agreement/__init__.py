"""Whether contrast pairs agree on a direction, from their activations alone, before anything is steered."""
