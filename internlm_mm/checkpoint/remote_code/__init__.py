"""Files that are copied into exported folders and run in the user's transformers, not in ours.

They import torch and transformers, and one another by relative imports, and nothing else; see
`internlm_mm.checkpoint.remote`.
"""
