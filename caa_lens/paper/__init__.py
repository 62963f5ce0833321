"""The paper's published numbers and question sets: where they are, fetching, conversion."""
