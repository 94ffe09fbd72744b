"""`python -m train`: trains the language model of `models` on text."""
