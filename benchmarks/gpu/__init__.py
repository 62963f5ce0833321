"""What `make gpu-wheels` and `make gpu` do: everything for the day that a card is there, in one command."""
