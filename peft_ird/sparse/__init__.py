"""The sparse delta: its data type, its arithmetic and its file."""
