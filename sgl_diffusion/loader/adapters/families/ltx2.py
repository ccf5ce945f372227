"""LTX-2: names of Lightricks' code for the embedders; those of the blocks are diffusers' own."""

from __future__ import annotations

from sgl_diffusion.loader.adapters.names import Family, table

# A timestep embedder of the original code, and its module in diffusers.
_TIMES = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
_TIME_LAYERS = ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")

_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2")
_CROSS = ("audio_to_video_attn", "video_to_audio_attn")

LTX2 = Family(
    "LTX-2",
    (
        *table({"patchify_proj": "proj_in", "audio_patchify_proj": "audio_proj_in"}),
        *table(
            {f"{k}.{layer}": f"{v}.{layer}" for k, v in _TIMES.items() for layer in _TIME_LAYERS}
        ),
    ),
    own=(
        "proj_out",
        "audio_proj_out",
        *(f"{n}caption_projection.linear_{i}" for n in ("", "audio_") for i in (1, 2)),
        *(
            f"transformer_blocks.{{i}}.{attention}.to_{part}"
            for attention in (*_ATTENTIONS, *_CROSS)
            for part in ("q", "k", "v", "out.0")
        ),
        *(
            f"transformer_blocks.{{i}}.{n}ff.net.{end}"
            for n in ("", "audio_")
            for end in ("0.proj", "2")
        ),
    ),
    native="Lightricks",
)
