"""Selective fine-tuning for PEFT: train the weights that the data chooses."""

__version__ = "0.1.0"
