"""Find the attention layers and positions of a transformers model, and run the model on another attention."""
