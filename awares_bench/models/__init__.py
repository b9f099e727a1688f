"""What a host model must provide, one model family a file; loading checkpoints; kernels."""
