"""Run adapters on models that are spread over several devices."""
