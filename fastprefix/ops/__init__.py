"""The operations. Each has a folder with its API, registration, reference and one module or folder per backend."""
