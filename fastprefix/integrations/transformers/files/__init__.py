"""Read, write and publish adapters in this package's format and in other formats."""
