"""The search for tile sizes behind ``seqcore tune``: what it finds is written into a table, which the library reads."""
