"""Generators of requests with published parameters."""

from __future__ import annotations

from llmserve_env.workloads.generators.clients import Clients
from llmserve_env.workloads.generators.diurnal import Diurnal
from llmserve_env.workloads.generators.generate import generate
from llmserve_env.workloads.generators.generator import ArrivalProcess, Generator
from llmserve_env.workloads.generators.mmpp import MMPP
from llmserve_env.workloads.generators.onoff import OnOff
from llmserve_env.workloads.generators.renewal import Gamma, Poisson, Weibull
from llmserve_env.workloads.generators.servegen import ServeGenClients
from llmserve_env.workloads.generators.sessions import Sessions

__all__ = [
    "MMPP",
    "ArrivalProcess",
    "Clients",
    "Diurnal",
    "Gamma",
    "Generator",
    "OnOff",
    "Poisson",
    "ServeGenClients",
    "Sessions",
    "Weibull",
    "generate",
]
