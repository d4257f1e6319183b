"""Benchmarks of fastprefix. Run ``python -m benchmarks`` in the root of the repository. Not part of the package."""

import os

# The profiler, which measures memory on a CPU, writes messages to stderr that break the progress bars. PyTorch reads
# both variables when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
