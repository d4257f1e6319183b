"""What a model of transformers is: its layers, attention, calls and positions, and how to run it."""
