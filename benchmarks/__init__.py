"""What stepping through time costs against attending in parallel, measured on the machine at hand.

``python -m benchmarks`` measures and writes the report; ``python -m benchmarks.report FILE.json`` draws it
again; ``pytest benchmarks --benchmark-json=FILE.json`` measures only; ``python -m benchmarks.campaign`` runs
tests, numerics and benchmarks on a machine with a GPU.
"""
