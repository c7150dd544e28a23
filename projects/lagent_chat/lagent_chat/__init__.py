"""A chat with tools in the terminal: Lagent, or a loop of our own, over any model."""
