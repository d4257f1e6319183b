"""Prefix attention on a CUDA device, in one run of under nine minutes: parity, memory checks, tiles, speed.

    python -m benchmarks.gpu --out result.json

Every stage has a time and a process of its own; one that fails, hangs or loses the device is reported, and the others
go on. The raw figures are written after each step. Kernels are compiled by worker processes beforehand: nothing
compiles while a clock runs.
"""
