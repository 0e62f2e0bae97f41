"""Kernels of the recurrent cells."""
