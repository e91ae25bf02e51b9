"""Gradients of single samples, a batch at a time, handed to statistics."""
