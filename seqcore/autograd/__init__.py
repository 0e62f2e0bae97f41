"""The ``torch.autograd.Function``s: backward through the operators, double backward through the reference."""
