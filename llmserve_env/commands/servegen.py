"""`llmserve servegen`: ServeGen's published chunks as tables."""

from __future__ import annotations

from pathlib import Path

from llmserve_env.files import write_atomic


def servegen(folder: Path, /, *, out: Path, quantiles: Path | None = None) -> None:
    """Join ServeGen's chunks of a model to the table that servegen:// reads.

    Args:
        folder: folder with chunk-N-trace.csv files, such as data/language/m-small of its repository.
        out: file for the clients' windows (CSV).
        quantiles: file for the clients' length quantiles (CSV), from the chunk-N-dataset.json files.

    Raises:
        InputError: a chunk cannot be read, or a file cannot be written.
    """
    from llmserve_env.commands.shared.report import check_outputs
    from llmserve_env.workloads.generators.servegen_chunks import quantile_table, read_windows_of, table

    check_outputs({"out": out, "quantiles": quantiles})
    windows = read_windows_of(folder)
    lengths = None if quantiles is None else quantile_table(folder, windows)
    write_atomic(out, table(windows))
    clients = len({window[0] for window in windows})
    print(f"{clients:,} clients, {len(windows):,} windows: servegen://{out}")
    if quantiles is not None and lengths is not None:
        write_atomic(quantiles, lengths)
        print(f"their lengths: servegen://{out}?quantiles={quantiles}")
