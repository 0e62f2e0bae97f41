"""The ``torch.autograd.Function``s: forward and backward through the operators, double backward through the reference."""
