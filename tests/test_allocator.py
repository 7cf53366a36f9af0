"""Memory that is kept: what is freed is there again without the pages that a step would get anew."""

import subprocess
import sys

from tests.test_cli import ROOT, script_environment

COUNT_FAULTS = """
import ctypes, resource, sys
from tinystories_jax.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
num_bytes = 2**26

def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(num_bytes)))
    ctypes.memset(block, 1, num_bytes)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

count_faults()
print(sum(count_faults() for _ in range(3)))
import jax
import jax.numpy as jnp
if sys.argv[1] == "keep":
    import tinystories_jax.model
print(jax.config.values["jax_cpu_enable_async_dispatch"])
print(jax.jit(lambda x: jnp.tanh(x @ x.T).sum())(jnp.ones((2048, 8)) / 16))
"""


def run(how: str) -> tuple[int, str, str]:
    """Returns page faults of filling 64 MB three times, whether JAX works beside the caller, and what it computed."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS, how],
        cwd=ROOT,
        env={name: value for name, value in script_environment().items() if not name.startswith("MALLOC_")},
        capture_output=True,
        text=True,
        check=True,
    )
    faults, asynchronous, value = done.stdout.split()
    return int(faults), asynchronous, value


def test_memory_that_was_freed_is_found_again_and_nothing_else_changes():
    faults, asynchronous, value = run("as it is")
    kept_faults, kept_asynchronous, kept_value = run("keep")
    # Three times 64 MB, in pages of 2 MB at most; kept, they are there already.
    assert faults >= 3 * 32
    assert kept_faults < 10
    assert (asynchronous, kept_asynchronous) == ("True", "False")
    assert kept_value == value
