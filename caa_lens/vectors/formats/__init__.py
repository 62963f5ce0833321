"""Other tools' files of vectors, each format a module."""
