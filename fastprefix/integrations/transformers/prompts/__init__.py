"""Run prompt methods on a model: in every row, or once for the whole batch."""
