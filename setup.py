"""Package layout; all other metadata is in pyproject.toml.

The folder ``kernels/`` is installed as ``seqcore.kernels``, never as a top-level ``kernels``: that name
belongs to another distribution, and shadowing it breaks whoever imports both.
"""

from setuptools import find_packages, setup

library = find_packages(include=["seqcore", "seqcore.*"])
kernels = [f"seqcore.{name}" for name in find_packages(include=["kernels", "kernels.*"])]

setup(
    # Here and not in pyproject.toml: no one spelling of it there is accepted by old and new setuptools alike,
    # and an offline GPU machine builds with whatever setuptools it has.
    license="BSD-3-Clause",
    packages=library + kernels,
    package_dir={"seqcore": "seqcore", "seqcore.kernels": "kernels"},
    include_package_data=False,  # only what is named here, not whatever lies in the folders
    package_data={"seqcore": ["py.typed", "testing/*.json"], "seqcore.kernels": ["tuned/*.json"]},
)
