"""What a model must offer to the library, and how each of TransformerLens' two kinds offers it.

`choice.adapter_of(model)` is the only place that asks which kind a model is. May never be imported here: prompts,
vectors, or anything that steers.
"""
