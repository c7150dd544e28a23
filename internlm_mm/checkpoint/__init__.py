"""Checkpoints that fit any layout, and their exchange with other formats."""
