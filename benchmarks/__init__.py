"""Benchmarks of fastprefix: ``python -m benchmarks`` (run from the repository's root; not part of the package)."""

import os

# The profiler, which counts memory on a CPU, comments on its work on stderr, right through the progress bars. Both are
# read when PyTorch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
