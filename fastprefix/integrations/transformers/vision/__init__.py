"""Run methods that add virtual tokens to the tokens of an image."""
