"""How many tokens the head and its loss take at a time: for the loss itself and for the planner."""


def loss_chunk(asked: int | None, in_place: bool) -> int:
    """Tokens whose logits are held at a time.

    Every chunk reads and writes the whole gradient of the head, so that few chunks are fast. The
    two numbers hold about as much memory: 8 bytes a logit against 2, in half precision.

    Args:
        asked: What a config says, if it says anything.
        in_place: Whether a kernel puts the gradient of logits in their place.
    """
    if asked is not None:
        return asked
    return 4096 if in_place else 1024
