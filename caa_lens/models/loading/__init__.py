"""From files on a disk or a hub to a `HookedTransformer` of Llama's kind."""
