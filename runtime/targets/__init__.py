"""One file for one format, each with save, load and check."""
