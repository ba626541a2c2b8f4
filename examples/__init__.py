"""A real model that decodes long contexts with jax_indexer; see README.md."""
