"""A campaign's stages: what each runs, and the programs that only a stage runs."""
