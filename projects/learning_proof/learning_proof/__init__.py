"""A proof that training here teaches: tiny models, tasks with known answers, held-out cases."""
