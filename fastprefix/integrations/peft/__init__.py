"""Run PEFT models on this package's kernels."""

from .acceleration import accelerate, decelerate

__all__ = ["accelerate", "decelerate"]
