"""What other packages need to meet seqcore where they have a place for it. None of them is imported with seqcore."""
