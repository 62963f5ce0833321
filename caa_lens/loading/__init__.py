"""What `caa_lens.models.load_model` stands on: tensors from files, configuration, layout, tokenizer, downloads."""
