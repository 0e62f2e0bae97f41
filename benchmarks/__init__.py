"""What stepping through time costs against attending in parallel, measured on the machine at hand.

``python -m benchmarks`` measures and writes the report; ``python -m benchmarks.report FILE.json`` draws it
again; ``pytest benchmarks --benchmark-json=FILE.json`` measures only; ``python -m benchmarks.campaign`` runs
tests, numerics and benchmarks on a machine with a GPU.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path


class KernelsOfTheCheckout:
    """Where ``seqcore.kernels`` is in a checkout that nobody installed; asked when it is found nowhere else."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "seqcore.kernels":
            return None
        folder = Path(__file__).resolve().parent.parent / "kernels"
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


sys.meta_path.append(KernelsOfTheCheckout)
