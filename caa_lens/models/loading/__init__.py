"""From files on a disk or a hub to a model of TransformerLens: a `HookedTransformer` or a `TransformerBridge`."""
