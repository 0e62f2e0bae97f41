"""The operators ``torch.ops.seqcore.*``: schemas, fake kernels for tracing, and launches. No autograd here."""
