"""Data sets, from files to prepared tensors."""
