"""The decoder, its loss and its decode loop; never prints, reads a clock, or opens a file (but asks processor.py).

Importing it settles one thing about JAX: on a CPU a step runs in the thread that asks for it.
"""

import jax

# There is nothing to do meanwhile, and only the main thread's memory is kept from one step to the next, whatever its
# size (tinystories_jax/allocator.py). GPUs do not read this; JAX reads it once, when it looks for devices.
jax.config.update("jax_cpu_enable_async_dispatch", False)
