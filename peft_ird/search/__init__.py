"""What is built on the tuner: the search for the best cell, and pictures."""
