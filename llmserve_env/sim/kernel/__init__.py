"""The kernel: all jitted code of the simulator, by mechanism.

In a batch all decoding sequences of a speculation class advance alike, so an engine keeps totals, not a
loop over its batch:

* a class's token clock says how many tokens each of its sequences has gained; a sequence finishes when the
  clock reaches a key that was known when its prefill ended (a heap per class);
* the contexts' sum grows by the batch size each iteration; with integer time the durations of a stretch of
  iterations without an event are an arithmetic progression, summed exactly;
* a sequence needs a block each time its class clock passes one residue modulo the block size, so the blocks
  that an iteration takes are a count per residue.

`s` is the `Service` of an episode (sim.state), `e` one of its engines, `q` the places of that engine's
running sequences. tests/alignment holds the same scheduler written plainly, and the two must agree request
by request.

From below: timing, calendar, blocks, sequences, queue, clients, lifecycle, batches, scheduler, routing,
cell, record, serve, threads.
"""

from llmserve_env.sim.kernel.serve import serve
from llmserve_env.sim.kernel.threads import checked_threads, new_board, serve_batch

__all__ = ["checked_threads", "new_board", "serve", "serve_batch"]
