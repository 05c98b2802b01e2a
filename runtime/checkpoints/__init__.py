"""Compressed checkpoints of other libraries, read into the layouts of `pack`."""
