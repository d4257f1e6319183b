"""Run prefix methods on a model."""
