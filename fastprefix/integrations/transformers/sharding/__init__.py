"""Run adapters on models that are distributed over several devices."""
