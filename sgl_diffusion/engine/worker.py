"""The diffusion worker: what the stage process drives.

It loads the pipeline that a recipe opens, turns messages into jobs, and answers with frames. The
work itself is done by a runner: step by step for native pipelines, whole for the diffusers
fallback.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import msgspec
import torch

from sgl_diffusion import ops
from sgl_diffusion.base.blank import blank_pictures
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.device import pick_device, unused_gpu
from sgl_diffusion.base.errors import OutOfMemoryError, RequestError, SglError
from sgl_diffusion.base.footprint import Footprint, check_memory
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.params import ModelCard, ResolvedParams, SamplingParams
from sgl_diffusion.base.startup import spent_on
from sgl_diffusion.engine import profile
from sgl_diffusion.engine.bounds import Bounds
from sgl_diffusion.engine.compiled import CompiledBlocks, check_compile
from sgl_diffusion.engine.failures import explain, is_out_of_memory
from sgl_diffusion.engine.footprint.budget import Budget
from sgl_diffusion.engine.footprint.usage import Usage
from sgl_diffusion.engine.graphs.passes import chosen_graphs
from sgl_diffusion.engine.job import Job
from sgl_diffusion.engine.lora.control import LoraControl, lora_control
from sgl_diffusion.engine.parallel.ranks import Ranks
from sgl_diffusion.engine.pipeline import OpenPipeline, Pipeline
from sgl_diffusion.engine.steps import StepRunner
from sgl_diffusion.engine.threads import step_lanes
from sgl_diffusion.engine.tiles import Tiles
from sgl_diffusion.engine.transformers import transformers
from sgl_diffusion.engine.whole import WholeRunner
from sgl_diffusion.ops import dispatch, library
from sgl_diffusion.orchestrator.messages import Metric, Payload
from sgl_diffusion.orchestrator.stage import Outbox

log = get_logger(__name__)

_WARM_UP = "warm-up"
_STATM = Path("/proc/self/statm")


class DiffusionWorker:
    """Implements `orchestrator.stage.Worker`."""

    def __init__(
        self,
        open_pipeline: OpenPipeline,
        options: EngineOptions,
        outbox: Outbox,
        lora_state: Path | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`lora_state` is the file that keeps the adapters in use for the next worker; `ranks` are
        there if several processes run this model together."""
        self._ranks = ranks
        self._open = open_pipeline
        self._lora_state = lora_state
        self._options = options
        self._outbox = outbox
        self._runner: StepRunner | WholeRunner | None = None
        self._loras: LoraControl | None = None
        self._load_error: SglError | None = None
        self._card: ModelCard | None = None
        self._usage: Usage | None = None
        self._compiled: CompiledBlocks | None = None

    def load(self) -> Payload:
        # Read here, so that a wrong SGLD_OPS or SGLD_LIBRARY ends the start and not the first job.
        dispatch.named()
        library.absent()
        device = pick_device(self._options.device)
        if text := unused_gpu(self._options.device):
            log.warning(text)
        budget, footprint = Budget(self._options, device), None
        try:
            pipeline = self._open(self._outbox.loading)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                "The model does not fit into the memory of the device.",
                hint="Use a smaller model, or lower precisions: --dit-precision bf16.",
            ) from error
        graphs = chosen_graphs(self._options, pipeline)
        check_compile(self._options, pipeline)
        branches = None if self._ranks is None else self._ranks.spread(pipeline)
        if isinstance(pipeline, Pipeline):
            if self._ranks is None:
                with spent_on("memory"):
                    footprint = budget.footprint(pipeline, self._outbox.loading)
            if self._options.enable_torch_compile:
                self._compiled = CompiledBlocks(transformers(pipeline))
            bounds = Bounds(
                rows=self._options.max_batch_rows,
                jobs=self._options.max_running_jobs,
                prompt_bytes=int(self._options.prompt_cache_memory * 2**30),
                overlap=self._options.overlap,
                packing=self._options.packing,
                graphs=graphs,
                graph_bytes=int(self._options.cuda_graph_memory * 2**30),
                lanes=1 if self._ranks is not None else step_lanes(self._options, pipeline),
            )
            self._runner = StepRunner(
                pipeline,
                bounds,
                self._outbox,
                self._finish,
                self._fail,
                branches,
                self._tiles(pipeline, footprint),
            )
            if self._compiled is not None:
                self._outbox.loading("compiling the blocks")
                with spent_on("compile"):
                    self._compiled.warm_up(pipeline)
            with spent_on("warm-up"):
                self._warm_up(pipeline.card)
            self._runner.sizes.room.footprint = footprint
        else:
            self._runner = WholeRunner(pipeline, self._outbox, self._finish, self._fail)
        with spent_on("adapters"):
            self._loras = lora_control(
                pipeline, self._runner, self._options, self._lora_state, self._outbox.loading
            )
        card = dataclasses.replace(
            pipeline.card,
            lora_targets=self._loras.targets,
            # Whether a step can be reused is decided within a pass, on one rank's tokens.
            step_cache=pipeline.card.step_cache and self._ranks is None,
            footprint=footprint,
        )
        self._card, self._usage = card, Usage(device, footprint)
        return {**dataclasses.asdict(card), "loras": self._loras.report()}

    def _tiles(self, pipeline: Pipeline, footprint: Footprint | None) -> Tiles | None:
        edge = self._options.vae_tile_size if footprint is None else footprint.tile_edge
        if edge == 0:
            return None
        if self._ranks is None:
            return Tiles(pipeline.decode, edge)
        return Tiles(pipeline.decode, edge, self._ranks.everyone)

    def _warm_up(self, card: ModelCard) -> None:
        """The smallest picture in one step: what cannot work here fails now, not in every job, and
        the first job does not pay for what libraries do once."""
        self._outbox.loading("warming up")
        edge = card.size_multiple
        wish = SamplingParams(prompt="warm-up", width=edge, height=edge, num_inference_steps=1)
        with blank_pictures(card.min_images) as images:
            wish = dataclasses.replace(wish, images=images)
            self._active.add(Job(_WARM_UP, card.resolve(wish, video=False)))
            while self._active.step():
                pass
        self._active.counters.clear()
        if self._compiled is not None:
            self._compiled.counters.clear()
        if self._load_error is not None:
            raise self._load_error

    def submit(self, job_id: str, payload: Payload) -> None:
        try:
            params = msgspec.convert(payload["params"], ResolvedParams)
        except (KeyError, msgspec.ValidationError):
            error = RequestError("The job's parameters do not fit this version of the engine.")
            self._outbox.failed(job_id, error)
            return
        job = Job(job_id, params)
        try:
            # Of a job from before: the server that took it in may have had more memory.
            if self._card is not None:
                check_memory(self._card, params)
            job.blend = self._adapters.blend(params.loras)
            job.epoch = self._adapters.epoch
        except Exception as error:
            self._outbox.failed(job_id, explain(error, job))
            return
        if self._usage is not None:
            self._usage.begin(job)
        self._active.add(job)

    def cancel(self, job_id: str) -> None:
        self._active.drop(job_id)
        self._peak(job_id)

    def control(self, action: str, payload: Payload) -> Payload:
        if isinstance(self._runner, StepRunner):
            self._runner.settle()
        if action in profile.ACTIONS:
            return profile.run_profile(self._active.trace, action)
        if self._adapters.knows(action):
            return self._adapters.run(action, payload)
        raise RequestError(f"This worker has no control action {action!r}.", code="not_supported")

    def step(self) -> bool:
        return self._active.step()

    def running(self) -> int:
        return 0 if self._runner is None else self._runner.running()

    def metrics(self) -> list[Metric]:
        calls = [
            Metric(
                name="op_calls_total",
                value=count,
                labels={"op": op, "implementation": implementation},
            )
            for (op, implementation), count in ops.counts().items()
        ]
        resident = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        calls.append(Metric(name="worker_resident_bytes", value=resident, kind="gauge"))
        if torch.cuda.is_initialized():
            peak = torch.cuda.max_memory_allocated()
            calls.append(Metric(name="vram_peak_bytes", value=peak, kind="gauge"))
        if self._usage is not None:
            calls += self._usage.metrics()
        if self._compiled is not None:
            calls += self._compiled.counters.metrics()
        return calls + self._active.counters.metrics()

    @property
    def steps(self) -> StepRunner:
        """The runner of a native pipeline, unit by unit, for ranks that work together."""
        assert isinstance(self._runner, StepRunner), "only native pipelines run on many ranks"
        return self._runner

    @property
    def _adapters(self) -> LoraControl:
        assert self._loras is not None, "the worker is not loaded"
        return self._loras

    @property
    def _active(self) -> StepRunner | WholeRunner:
        assert self._runner is not None, "the worker is not loaded"
        return self._runner

    def _finish(self, job: Job, clips: list[torch.Tensor]) -> None:
        if job.id != _WARM_UP:
            reused = sum(row.reused for row in job.rows)
            meta = {
                "seconds": job.seconds,
                "reused_steps": reused,
                "peak_memory": self._peak(job.id),
            }
            self._outbox.output(job.id, meta, list(clips))

    def _peak(self, job_id: str) -> int:
        """The most bytes this process took while the job ran, which is over; 0 if it never did."""
        return 0 if self._usage is None else self._usage.end(job_id)

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        """These jobs end here; the others and the worker go on."""
        for job in jobs:
            self._active.drop(job.id)
            self._peak(job.id)
            if job.id == _WARM_UP:
                self._load_error = explain(error, job)
            else:
                self._outbox.failed(job.id, explain(error, job))
        if not isinstance(error, SglError):
            log.error("job %s failed", ", ".join(job.id for job in jobs), exc_info=error)
