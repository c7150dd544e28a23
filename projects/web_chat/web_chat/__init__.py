"""A chat in the browser over any model: ours, a Hugging Face folder, or a server."""
