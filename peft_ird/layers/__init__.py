"""The layers that apply an adapter's deltas, and what is done with them there."""
