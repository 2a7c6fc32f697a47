"""One name for a type of numbers, whether torch or a config gives it."""


def dtype_name(dtype: object) -> str:
    """The name without its package: `float32` for `torch.float32` and for `"float32"`."""
    return str(dtype).removeprefix("torch.")
