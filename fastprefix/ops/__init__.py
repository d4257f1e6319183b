"""The operations: one folder each, with its meaning, its registration, its reference and one file a backend."""
