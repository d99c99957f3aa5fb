"""``python -m examples.demo`` shows the package at work."""
