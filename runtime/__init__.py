"""Ops, packed layouts and file formats: everything that runs a compressed program."""
