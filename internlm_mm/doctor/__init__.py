"""What this machine and this installation can do, and what is known to go wrong with them."""
