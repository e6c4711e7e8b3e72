"""Named seeds: every random draw of the project is a function of a seed and of the names of what is drawn.

`derive_seed(0, "pairs", 17)` is the seed of the batch of step 17. Nothing has to be saved to resume, nothing depends on
the order in which parts of a program ran. Where torch itself draws from its global random state, as the constructors of
its layers do, that is put back afterwards.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on `seed` and on every name, in order (BLAKE2b); 1 and "1" are the same name."""
    parts = [str(int(seed)), *(str(name) for name in names)]
    # A name with a slash would read as two; such keys are JSON lists, which begin with no number.
    key = json.dumps(parts) if any("/" in part for part in parts) else "/".join(parts)
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def rng(device: torch.device | str, seed: int, *names: str | int) -> torch.Generator:
    """A fresh torch.Generator on `device`, seeded with `derive_seed(seed, *names)`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Torch's global random state, seeded, for what draws from it (constructors, dropout); restored on every device."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
