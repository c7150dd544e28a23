"""Forms in which conversations with tools are published, a module each, read and written."""
