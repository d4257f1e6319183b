"""Benchmarks of fastprefix: ``python -m benchmarks`` (run from the repository's root; not part of the package)."""
