"""A proof that training here teaches tool calls: a tiny model, tasks with known answers."""
