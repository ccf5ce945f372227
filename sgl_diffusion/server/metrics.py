"""GET /metrics: what the workers, the coordinator and the job table count, as Prometheus text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from starlette.responses import Response

from sgl_diffusion.server.context import Context
from sgl_diffusion.server.metric_help import HELP

if TYPE_CHECKING:
    from sgl_diffusion.orchestrator.messages import Metric

router = APIRouter()

_PREFIX = "sgld_"


class _Samples(Collector):
    def __init__(self, samples: list[Metric]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Family]:
        families: dict[str, Family] = {}
        for sample in self._samples:
            name = f"{_PREFIX}{sample.name}"
            stem, kind = _family(name, sample.kind)
            if stem not in families:
                families[stem] = Family(stem, _help(stem), kind)
            families[stem].add_sample(name, sample.labels, sample.value)
        for stem in sorted(families):
            yield families[stem]


def _family(name: str, kind: str) -> tuple[str, str]:
    """Prometheus' name and type of the family: `x_sum` and `x_count` are one summary `x`."""
    if kind == "histogram":
        return name.rpartition("_")[0], kind
    if name.endswith("_total") and kind == "counter":
        return name.removesuffix("_total"), "counter"
    for part in ("_sum", "_count"):
        if name.endswith(part):
            return name.removesuffix(part), "summary"
    return name, kind if kind == "gauge" else "unknown"


def _help(stem: str) -> str:
    name = stem.removeprefix(_PREFIX)
    return (HELP.get(name) or HELP.get(f"{name}_total") or ("", stem))[1]


def render(samples: Iterable[Metric]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Samples(list(samples)))
    return generate_latest(registry)


@router.get("/metrics")
async def metrics(context: Context) -> Response:
    return Response(render(context.samples()), media_type=CONTENT_TYPE_LATEST)
