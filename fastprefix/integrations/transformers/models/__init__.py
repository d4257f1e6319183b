"""Find the layers, attention, calls and positions of a model of transformers, and run it on another attention."""
