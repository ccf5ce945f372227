"""Options of the commands: frozen dataclasses, one field per option.

A field made with `option` carries its help text and choices; flags, configuration files and the
docs are derived from the fields.
"""

from __future__ import annotations

from dataclasses import dataclass

from sgl_diffusion.base.lora import MERGE_MODES
from sgl_diffusion.base.options import option

ATTENTION_BACKENDS = ("auto", "flash", "native", "triton", "sdpa")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What a worker needs to load and run a model."""

    model_path: str | None = option(
        None, "Folder in diffusers format or hub id; without it the small model inside the package."
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub repository.")
    variant: str | None = option(
        None, "Weights to take where a repository holds several, such as fp16."
    )
    transformer_path: str | None = option(
        None, "File or folder with other weights for the model's transformer."
    )
    transformer_2_path: str | None = option(None, "The same for its second expert.")
    backend: str = option(
        "auto",
        "Our own runtime, or the whole diffusers pipeline.",
        choices=("auto", "native", "diffusers"),
    )
    device: str = option("auto", "Where the model runs.", choices=("auto", "cpu", "cuda"))
    num_gpus: int = option(1, "Devices for the model; on a CPU, processes.", least=1)
    dp_size: int = option(
        1, "Replicas of the model, each with its share of the devices and its own jobs.", least=1
    )
    nnodes: int = option(1, "Machines that run one model together.", least=1)
    node_rank: int = option(
        0, "Which of them this is; 0 answers requests, the others follow it.", least=0
    )
    dist_init_addr: str | None = option(
        None, "HOST:PORT of machine 0 where the others find it; a private network only."
    )
    ulysses_degree: int | None = option(
        None, "Ranks that share the heads of attention; without it chosen.", least=1
    )
    ring_degree: int | None = option(
        None, "Ranks that pass keys round in attention; without it chosen.", least=1
    )
    cfg_parallel_size: int | None = option(
        None, "2 computes the branches of guidance side by side; without it chosen.", least=1
    )
    text_encoder_cpu_offload: bool = option(
        False, "Bring the text encoder block by block for each prompt (docs/memory.md)."
    )
    vae_cpu_offload: bool = option(False, "The same for the VAE, in each use.")
    dit_layerwise_offload: bool = option(
        False, "The same for the transformer, in each step: one block computes, the next comes."
    )
    pin_cpu_memory: bool = option(False, "Pin the memory of what is kept on the host for a GPU.")
    dit_precision: str = option("auto", "Precision of the transformer.", choices=PRECISIONS)
    quantization: str = option(
        "none",
        "Weights of the transformer's blocks in one byte (docs/memory.md).",
        choices=("none", "fp8", "int8"),
    )
    vae_precision: str = option("auto", "Precision of the VAE.", choices=PRECISIONS)
    text_encoder_precision: str = option(
        "auto", "Precision of the text encoder.", choices=PRECISIONS
    )
    attention_backend: str = option("auto", "Attention implementation.", choices=ATTENTION_BACKENDS)
    max_batch_rows: int = option(8, "Most pictures or clips denoised in one forward pass.", least=1)
    max_running_jobs: int = option(
        0, "Most jobs worked on at a time; 0: as many as there are.", least=0
    )
    packing: bool = option(True, "Pictures of different sizes may share denoise steps.")
    overlap: bool = option(True, "Encode prompts and decode pictures beside the denoise steps.")
    enable_torch_compile: bool = option(
        False, "Compile the transformer's blocks at the start (docs/serving.md)."
    )
    cuda_graphs: str = option(
        "auto",
        "Denoise steps as CUDA graphs: where a GPU waits for the host (auto), always, or never.",
        choices=("auto", "on", "off"),
    )
    cuda_graph_memory: float = option(1.0, "GiB that they may take.", least=0)
    vae_tile_size: int = option(
        0,
        "Pixels along the edge of the tiles that pictures are decoded in, such as 512; 0: whole.",
        least=0,
    )
    prompt_cache_memory: float = option(0.5, "GiB that encoded prompts may take.", least=0)
    memory_budget: str | None = option(
        None,
        "Memory that the model and its jobs may take: 8g, 6000m, or a share of what is free "
        "such as 0.5. Without it nearly all that is free.",
    )
    lora_path: tuple[str, ...] = option(
        (), "Adapter (LoRA) to begin with: a .safetensors file, a folder or a hub id. Repeatable."
    )
    lora_nickname: tuple[str, ...] = option((), "Its nickname; default: default. Repeatable.")
    lora_scale: tuple[float, ...] = option((), "Its strength; default: 1. Repeatable.")
    lora_alpha: tuple[float, ...] = option((), "Replaces the alpha of its file. Repeatable.")
    lora_weight_name: tuple[str, ...] = option(
        (), "The file to take where a folder or repository holds several. Repeatable."
    )
    lora_revision: tuple[str, ...] = option((), "Its branch, tag or commit on the hub. Repeatable.")
    lora_merge_mode: str = option(
        "auto",
        "Adapters to begin with: merged into the weights, or computed in every step (dynamic).",
        choices=MERGE_MODES,
    )
    max_lora_memory: float = option(4.0, "GiB that loaded adapters may take.", least=0)
    data_dir: str | None = option(None, "Folder of all state: jobs, files, models made here.")
    log_level: str = option("info", "debug, info, warning or error.")


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """How much may wait, for how long, and what is kept of it."""

    max_queue: int = option(
        128, "Most unfinished image requests at a time; more are refused with 429.", least=1
    )
    max_queued_videos: int = option(
        64, "Most videos that wait; more are refused with 429.", least=1
    )
    max_images_per_key: int = option(8, "Most unfinished image requests of one API key.", least=1)
    max_videos_per_key: int = option(16, "Most unfinished videos of one API key.", least=1)
    request_timeout: float = option(
        550.0, "Seconds after which a waiting image request fails.", least=1
    )
    video_timeout: float = option(
        7200.0, "Seconds a video may take from its turn to its end.", least=1
    )
    worker_timeout: float = option(
        120.0, "Seconds of silence after which a worker is replaced; at least three steps.", least=1
    )
    drain_timeout: float = option(25.0, "Seconds running jobs get to finish at shutdown.", least=0)
    retention_hours: float = option(72.0, "Hours for which finished jobs are kept.", least=0)
    max_disk_gb: float = option(50.0, "GB of kept files; the oldest go first.", least=0)
    min_free_gb: float = option(2.0, "GB of free disk below which no job is taken.", least=0)


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Who may call the server, and what it fetches for them."""

    api_key_file: str | None = option(
        None, "File with one API key per line; SGLD_API_KEY gives one, too."
    )
    admin_key_file: str | None = option(
        None, "File with keys for adapters, weights, profiles; SGLD_ADMIN_KEY gives one, too."
    )
    insecure_no_auth: bool = option(
        False, "Listen beyond this machine without a key: only behind a proxy that checks one."
    )
    public_metrics: bool = option(False, "Answer /metrics without a key.")
    allowed_hosts: str = option("", "Further names of this server, separated by commas.")
    cors_origins: str = option("", "Web origins that may call the server, separated by commas.")
    media_urls: str = option(
        "public",
        "URLs of pictures in requests: any public host, only --allow-media-host, or none.",
        choices=("public", "listed", "off"),
    )
    allow_media_host: str = option(
        "", "Hosts (NAME or NAME:PORT) that may be private, separated by commas."
    )
    allowed_media_path: str = option(
        "", "Folders whose files a request may name, separated by commas."
    )
    lenient: bool = option(False, "Ignore unknown fields; a header of the answer names them.")
    log_prompts: bool = option(False, "Log prompts as text, not as hash and length.")


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """What one request or connection may cost the server."""

    max_json_mb: int = option(64, "Largest JSON body in MB.", least=1)
    max_form_mb: int = option(600, "Largest multipart body in MB.", least=1)
    max_files: int = option(20, "Most files in a form.", least=0)
    max_fields: int = option(100, "Most text fields in a form.", least=1)
    max_field_kb: int = option(1024, "Largest text field in kB; data URLs do not count.", least=1)
    max_json_depth: int = option(64, "Deepest nesting of JSON.", least=1)
    max_json_items: int = option(10_000, "Most items of a JSON list or object.", least=1)
    max_image_mb: int = option(50, "Largest picture in a request in MB.", least=1)
    max_image_megapixels: int = option(40, "Most million pixels of such a picture.", least=1)
    max_images: int = option(16, "Most pictures in a request.", least=1)
    max_video_mb: int = option(512, "Largest video in a request in MB.", least=1)
    max_header_kb: int = option(64, "Most kB of request line and headers.", least=1)
    max_headers: int = option(100, "Most headers of a request.", least=1)
    header_timeout: float = option(60.0, "Seconds a client has to send its headers.", least=0.1)
    body_timeout: float = option(10.0, "Seconds a body may pause.", least=0.1)
    keep_alive: int = option(5, "Seconds an unused connection stays open.", least=0)
    max_connections: int = option(512, "Most connections at a time.", least=1)


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineOptions, AccessOptions, LimitOptions, JobOptions):
    """`sglang serve`."""

    allowed_lora_path: tuple[str, ...] = option(
        (), "Folder that callers without the admin key may load adapters from. Repeatable."
    )
    lora_timeout: float = option(
        600.0,
        "Seconds a change of adapters waits for running jobs, and a download may take.",
        least=0,
    )
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(30000, "Port to listen on.")
    served_model_name: str | None = option(None, "Name of the model in /v1/models.")
    public_base_url: str | None = option(None, "Prefix of the URLs in answers.")
    database_url: str | None = option(
        None, "PostgreSQL for a job table that several servers share: postgresql://..."
    )
    node_name: str | None = option(
        None, "Name of this server among them; default: that of the machine."
    )
    s3_bucket: str | None = option(None, "S3 bucket that results are copied to.")
    s3_endpoint_url: str | None = option(None, "S3 service; without it Amazon's.")
    s3_region: str | None = option(None, "Region of the bucket.")
    s3_prefix: str = option("", "What the names of objects begin with, such as results/.")
    s3_url_seconds: int = option(
        0, "Seconds for which URLs of objects are signed; 0 gives plain ones.", least=0
    )
    metadata: bool = option(True, "Write the settings into the files.")
