"""What is built on the tuner: pictures of selections."""
