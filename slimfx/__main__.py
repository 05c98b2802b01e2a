"""`python -m slimfx`, which torchrun needs."""

from slimfx.cli import main

main()
