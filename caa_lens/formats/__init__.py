"""Other tools' files of steering vectors; `caa_lens.interchange` tells them apart."""
