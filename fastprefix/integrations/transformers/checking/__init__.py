"""Compare a method on a small copy of a model with a plain implementation (the textbook)."""
