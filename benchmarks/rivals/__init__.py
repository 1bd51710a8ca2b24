"""Implementations of context-parallel attention behind one interface, ours among them."""
