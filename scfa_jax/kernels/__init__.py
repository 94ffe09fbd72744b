"""Implementations of attention over key ranges: they know tiles and codes, not patterns."""
