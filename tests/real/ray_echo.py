"""A Serve application in the place of a model: takes the LLM builder's own arguments, answers at once who it is.

Imported by Ray's Python. It has a model's replicas, bundles and places, so that scheduling, routing, health and the
ways of dying are Ray's own; only the half minute of loading vLLM is missing.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse


@ray.remote(num_cpus=0, num_gpus=1)  # the replica itself has taken its bundle's CPU
def cards_of_a_worker() -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]


class Echo:
    def __init__(self, model: str, workers: int) -> None:
        self.model, self.workers = model, workers

    async def __call__(self, request: Request) -> Response:
        if request.url.path == "/v1/stream":
            return StreamingResponse(self.pieces(Path(request.query_params["until"])), media_type="text/event-stream")
        if request.url.path == "/v1/cards":
            return JSONResponse({"pid": os.getpid(), "cards": await self.cards()})
        return JSONResponse({"pid": os.getpid(), "model": self.model})

    async def cards(self) -> list[str]:
        """What each worker of this replica would see, as vLLM's workers are placed."""
        group = get_current_placement_group()
        strategies = [PlacementGroupSchedulingStrategy(group, i) for i in range(self.workers)]
        return list(
            await asyncio.gather(*(cards_of_a_worker.options(scheduling_strategy=s).remote() for s in strategies))
        )

    async def pieces(self, until: Path) -> AsyncIterator[str]:
        """The second piece comes when whoever reads has made that file, so it had the first one by then."""
        yield "data: first\n\n"
        while not until.exists():
            await asyncio.sleep(0.05)
        yield "data: second\n\n"


def build(arguments: dict[str, Any]) -> Any:
    (config,) = arguments["llm_configs"]
    group = config["placement_group_config"]
    made = serve.deployment(Echo).options(
        **config["deployment_config"],
        placement_group_bundles=group["bundles"],
        placement_group_strategy=group["strategy"],
    )
    return made.bind(config["model_loading_config"]["model_id"], len(group["bundles"]))
