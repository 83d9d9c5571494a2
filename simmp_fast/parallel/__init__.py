"""What a training step computes over the batches of several ranks; for one rank, the plain operators."""
