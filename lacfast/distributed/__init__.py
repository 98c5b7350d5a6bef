"""Sums and moments over the ranks of torch.distributed: the only room that knows of ranks."""
