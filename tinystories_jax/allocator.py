"""How a process of ours holds memory on a CPU. Needs no JAX; nothing here changes what is computed."""

import ctypes

# The names and values of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER = -1
_TOP_PAD_BYTES = 2**28


def keep_freed_memory() -> None:
    """Lets this process keep the memory that its main thread frees, for the next step.

    XLA takes one large buffer for every step and frees it after. As it is, glibc gives that back to the system, and the
    next step gets it anew, page by page and zeroed: a fifth to a half of a training step on a CPU. Where malloc is not
    glibc's nothing changes. That steps run in the main thread is settled in tinystories_jax/model.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
        mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
        mallopt(_M_MMAP_MAX, 0)
