"""Make whole models compute in float64. transformers' norms, rotary positions and routers round to float32."""

from fastprefix.integrations.transformers.checking.conformance import Float64

__all__ = ["Float64"]
