"""Run methods that put rows beside the tokens of an image."""
