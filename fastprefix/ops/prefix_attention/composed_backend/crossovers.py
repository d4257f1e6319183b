"""Where composition is faster than the Triton backend, as data that a run of ``python -m benchmarks.gpu`` fills."""

FEWEST_QUERIES: dict[tuple[str, bool, int], int] = {}
"""By architecture (a row of the tile tables), ``is_causal`` and head size: the fewest queries for which
``backend=None`` is composed. Without an entry it never is. It is empty, since nothing has been measured on a GPU yet.
"""
