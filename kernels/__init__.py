"""Triton kernels of seqcore: device code and tile sizes, with no knowledge of PyTorch, autograd or modules.

Installed as ``seqcore.kernels``; never import it as the top-level ``kernels``, a name that belongs to another package.
"""
