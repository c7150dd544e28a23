"""A plugin: parts of a training run that internlm_mm does not have."""
