"""`python -m shardsum` is the command `shardsum`."""

from .cli import main

main()
