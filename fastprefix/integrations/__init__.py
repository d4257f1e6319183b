"""Integrations of the methods with other libraries, one folder each."""
