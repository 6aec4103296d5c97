"""Starts Ray clusters that run studies."""
