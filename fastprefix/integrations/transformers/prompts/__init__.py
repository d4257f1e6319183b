"""Run prompt methods on a model, either in every row or once for the whole batch."""
