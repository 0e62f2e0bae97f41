"""Plain PyTorch: the definition of every operation, in any float dtype, differentiable any number of times."""
