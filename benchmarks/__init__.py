"""Measurements: `gates` (one gate), `resnet` (a network of them), `saved` (memory for backward),
`gpu` (one gate on a GPU).

Each is run as ``python -m benchmarks.<name>`` and checks a configuration before it times it.
"""
