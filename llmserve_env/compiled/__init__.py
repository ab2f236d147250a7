"""How jitted code is compiled: parts into one whole, kept for the sources that it was made from alone.

A `part` is compiled for the entry that calls it and for nobody else: it becomes intermediate code that is
linked into the entry, without machine code, wrappers or a cache of its own. The `entry` is optimised as one
module, so that what lies between its parts (arguments that nobody reads, calls from one place) disappears,
and is all that is cached.

Numba stamps a cached function with the file that it stands in, and freezes what it takes from others. An
entry's cache is therefore keyed with a digest of everything that it is compiled from: the code of its
parts, every constant that they name, and the compiler. A kernel whose constants have changed is another
kernel.
"""

from llmserve_env.compiled.entry import Entry, entry
from llmserve_env.compiled.linking import hot, part
from llmserve_env.compiled.stamp import stamp

__all__ = ["Entry", "entry", "hot", "part", "stamp"]
