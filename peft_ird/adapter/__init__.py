"""An adapter in a model: its targets, its entries, where they come from."""
