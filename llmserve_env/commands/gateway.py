"""`llmserve gateway`: a proxy before vLLM servers that limits, orders and routes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from llmserve_env.schema import ServeAction

if TYPE_CHECKING:
    from llmserve_env.backend import WindowRecord

_SCRAPE_S = 0.5
_STALE_S = 3.0


def gateway(
    upstream: Annotated[list[str], tyro.conf.UseAppendAction],
    action: Annotated[ServeAction, tyro.conf.arg(name="")] = ServeAction(),  # noqa: B008 - immutable
    *,
    host: str = "127.0.0.1",
    port: int = 8200,
    tenants: Path | None = None,
    window_s: float = 10.0,
    max_waiting: int = 1000,
    max_body_mb: float = 8.0,
    queue_timeout_s: float = 60.0,
    idle_timeout_s: float = 300.0,
) -> None:
    """Serve OpenAI's interface for completions and chats before one vLLM server or several.

    Prints a line for each window in which something happened. Ends with Ctrl-C or SIGTERM.

    Args:
        upstream: URL of a server, with ,tier=FP16|INT8|INT4 and ,speculation=DEPTH what it was started with,
            and with ,key=KEY its API key; once for each server.
        action: the configuration.
        host: address to listen on.
        port: to listen on; 0 for a free one.
        tenants: TOML file of who may call (default: everybody, as one tenant).
        window_s: time that a line tells of (s).
        max_waiting: requests in the queue, at most.
        max_body_mb: size of a request, at most (MB).
        queue_timeout_s: a request that waited so long is refused (s).
        idle_timeout_s: a request whose upstream or client did nothing for so long is ended (s).

    Raises:
        InputError: an upstream, the tenants' file, a bound or the address cannot be used.
    """
    from llmserve_env.errors import InputError

    try:
        import aiohttp  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise InputError(f"the {error.name} package is missing: install llmserve-env[server]") from error
    import asyncio
    import logging
    import signal
    import sys
    import time

    from llmserve_env.live.gateway import Gateway
    from llmserve_env.live.proxy import Proxy
    from llmserve_env.live.telemetry import Telemetry
    from llmserve_env.live.tenants import Tenants, load_tenants
    from llmserve_env.live.upstreams import Upstream, parse_upstream
    from llmserve_env.sockets import listen

    for name, value in (("window_s", window_s), ("max_body_mb", max_body_mb)):
        if not value > 0:
            raise InputError(f"expected more than 0, found {value}", field=name)
    known = Tenants() if tenants is None else load_tenants(tenants)
    upstreams = [parse_upstream(each) for each in upstream]
    telemetry = Telemetry([each.url for each in upstreams], interval_s=_SCRAPE_S, stale_after_s=_STALE_S)
    replicas = dict(zip(upstreams, telemetry.replicas, strict=True))

    def kv_usage(of: Upstream) -> float | None:
        replica = replicas[of]
        if replica.last is None or replica.stale(time.monotonic()):
            return None
        return replica.last.gauges.get("kv_occupancy")

    here = Gateway(
        upstreams,
        known.all,
        action,
        max_waiting=max_waiting,
        queue_timeout_s=queue_timeout_s,
        idle_timeout_s=idle_timeout_s,
        kv_usage=kv_usage,
    )
    proxy = Proxy(here, known, max_body_bytes=int(max_body_mb * 1e6))
    listening = listen(host, port)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    # uvicorn raises the signal again when it is done, which is the end that was asked for.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))

    class Server(uvicorn.Server):
        async def startup(self, sockets: object = None) -> None:
            await super().startup(sockets=sockets)  # type: ignore[arg-type]
            print("listening on http://{}:{}".format(*listening.getsockname()[:2]), flush=True)
            self.telling = asyncio.create_task(tell())

    async def tell() -> None:
        async with telemetry:
            await asyncio.sleep(2 * _SCRAPE_S)
            for field, reason in here.not_applied.items():
                print(f"not applied: {field}: {reason}", flush=True)
            while True:
                await asyncio.sleep(window_s)
                record = here.window()
                if record.arrived or record.in_flight or record.completed or record.failed:
                    print(_line(record), flush=True)

    # No access log: it is a line of work for every request.
    config = uvicorn.Config(
        proxy,
        log_level="warning",
        access_log=False,
        ws="none",
        proxy_headers=False,
        server_header=False,  # the upstream's pass
        date_header=False,
        timeout_graceful_shutdown=30,
    )
    Server(config).run(sockets=[listening])


def _line(record: WindowRecord) -> str:
    p99_ms = "-" if record.ttft_histogram.sum() == 0 else f"{1e3 * record.p99_ttft_s:.0f} ms"
    return (
        f"{record.end_s:.0f} s: {record.arrived} arrived, {record.completed} completed, "
        f"{record.failed} failed ({record.refused} refused), {record.running} at upstreams, "
        f"{record.waiting} waiting, {record.output_tokens} tokens, p99 TTFT {p99_ms}"
    )
