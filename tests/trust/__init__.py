"""What seqcore promises, which tests hold it to that, and the mutants that they kill: docs/trust.md is made of this."""
