"""The methods on models of other libraries: one folder each."""
