"""Run batches whose rows have different adapters."""
