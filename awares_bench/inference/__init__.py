"""Turns to replies, batched, on any host model or server."""
