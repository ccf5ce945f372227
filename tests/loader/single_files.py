"""The weights of tiny checkpoints under the names that the authors of a model publish them with.

Written from the authors' code, not from our tables: diffusers' converters check what is written.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]

_FLUX = (
    (r"time_text_embed\.timestep_embedder", "time_in"),
    (r"time_text_embed\.guidance_embedder", "guidance_in"),
    (r"time_text_embed\.text_embedder", "vector_in"),
    (r"time_guidance_embed\.timestep_embedder", "time_in"),
    (r"time_guidance_embed\.guidance_embedder", "guidance_in"),
    (r"_stream_modulation(_img|_txt|)\.linear", r"_stream_modulation\1.lin"),
    (r"(_in)\.linear_1", r"\1.in_layer"),
    (r"(_in)\.linear_2", r"\1.out_layer"),
    (r"^context_embedder", "txt_in"),
    (r"^x_embedder", "img_in"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    (r"^single_transformer_blocks\.(\d+)\.", r"single_blocks.\1."),
    (r"^transformer_blocks\.(\d+)\.", r"double_blocks.\1."),
    (r"(single_blocks\.\d+)\.norm\.linear", r"\1.modulation.lin"),
    (r"(single_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"(single_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    (r"(single_blocks\.\d+)\.(proj_out|attn\.to_out)\.", r"\1.linear2."),
    (r"(single_blocks\.\d+)\.(qkv|attn\.to_qkv_mlp_proj)\.", r"\1.linear1."),
    (r"norm1\.linear", "img_mod.lin"),
    (r"norm1_context\.linear", "txt_mod.lin"),
    (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
    (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
    (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
    (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
    (r"attn\.to_out\.0", "img_attn.proj"),
    (r"attn\.to_add_out", "txt_attn.proj"),
    (r"\.ff\.(net\.0\.proj|linear_in)", ".img_mlp.0"),
    (r"\.ff\.(net\.2|linear_out)", ".img_mlp.2"),
    (r"\.ff_context\.(net\.0\.proj|linear_in)", ".txt_mlp.0"),
    (r"\.ff_context\.(net\.2|linear_out)", ".txt_mlp.2"),
)
_WAN = (
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"scale_shift_table", "modulation"),
    (r"\.norm2\.", ".norm3."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"\.ffn\.net\.0\.proj", ".ffn.0"),
    (r"\.ffn\.net\.2", ".ffn.2"),
)
_Z_IMAGE = (
    (r"^all_final_layer\.2-1\.", "final_layer."),
    (r"^all_x_embedder\.2-1\.", "x_embedder."),
    (r"\.attention\.to_out\.0\.", ".attention.out."),
    (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
)

_SD3 = (
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"^transformer_blocks\.(\d+)\.", r"joint_blocks.\1."),
    (r"\.norm1\.linear", ".x_block.adaLN_modulation.1"),
    (r"\.norm1_context\.linear", ".context_block.adaLN_modulation.1"),
    (r"\.context_qkv", ".context_block.attn.qkv"),
    (r"\.attn(2?)\.norm_([qk])\.", r".x_block.attn\1.ln_\2."),
    (r"\.attn\.norm_added_([qk])\.", r".context_block.attn.ln_\1."),
    (r"\.attn\.to_add_out", ".context_block.attn.proj"),
    (r"\.attn(2?)\.to_out\.0", r".x_block.attn\1.proj"),
    (r"(joint_blocks\.\d+)\.attn(2?)\.qkv", r"\1.x_block.attn\2.qkv"),
    (r"\.ff\.net\.0\.proj", ".x_block.mlp.fc1"),
    (r"\.ff\.net\.2", ".x_block.mlp.fc2"),
    (r"\.ff_context\.net\.0\.proj", ".context_block.mlp.fc1"),
    (r"\.ff_context\.net\.2", ".context_block.mlp.fc2"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
)


def _renamed(weights: Mapping[str, Tensor], table: tuple[tuple[str, str], ...]) -> Weights:
    result = {}
    for key, value in weights.items():
        for pattern, new in table:
            key = re.sub(pattern, new, key)
        result[key] = value
    return result


def _fused(weights: Mapping[str, Tensor], parts: tuple[str, ...], whole: str) -> Weights:
    """With the projections of each attention in one matrix."""
    result = dict(weights)
    for key in weights:
        owner, found, leaf = key.partition(parts[0] + ".")
        if found and owner.endswith("."):
            names = [f"{owner}{part}.{leaf}" for part in parts]
            if all(name in result for name in names):
                result[f"{owner}{whole}.{leaf}"] = torch.cat([result.pop(name) for name in names])
    return result


def _shift_first(weights: Weights, *layers: str) -> Weights:
    """diffusers has the scale first where a layer gives these two."""
    result = dict(weights)
    for key in (f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")):
        if key in result:
            scale, shift = result[key].chunk(2)
            result[key] = torch.cat((shift, scale))
    return result


def flux(weights: Mapping[str, Tensor]) -> Weights:
    result = _fused(
        weights, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.qkv"
    )
    single = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    result = _fused(result, single, "qkv")
    result = _fused(result, single[:3], "img_attn.qkv")
    return _renamed(_shift_first(result, "norm_out.linear"), _FLUX)


def sd3(weights: Mapping[str, Tensor]) -> Weights:
    added = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    result = _fused(weights, added, "context_qkv")
    for attention in ("attn", "attn2"):
        parts = (f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v")
        result = _fused(result, parts, f"{attention}.qkv")
    blocks = [int(key.split(".")[1]) for key in result if key.startswith("transformer_blocks.")]
    last = f"transformer_blocks.{max(blocks)}.norm1_context.linear"
    return _renamed(_shift_first(result, "norm_out.linear", last), _SD3)


def wan(weights: Mapping[str, Tensor]) -> Weights:
    return _renamed(weights, _WAN)


def z_image(weights: Mapping[str, Tensor]) -> Weights:
    parts = ("attention.to_q", "attention.to_k", "attention.to_v")
    return _renamed(_fused(weights, parts, "attention.qkv"), _Z_IMAGE)


def qwen_image(weights: Mapping[str, Tensor]) -> Weights:
    """Published under diffusers' own names."""
    return dict(weights)


def converter(family: str, width: int) -> Callable[[Weights], Weights]:
    """How diffusers reads such a file."""
    from diffusers.loaders import single_file_utils as theirs

    if family == "flux":  # the width of the published model is written into its text
        source = inspect.getsource(theirs.convert_flux_transformer_checkpoint_to_diffusers)
        names: dict[str, Any] = dict(vars(theirs))
        exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), names)
        return names["convert_flux_transformer_checkpoint_to_diffusers"]  # type: ignore[no-any-return]
    return {  # type: ignore[no-any-return]
        "wan": theirs.convert_wan_transformer_to_diffusers,
        "flux2": theirs.convert_flux2_transformer_checkpoint_to_diffusers,
        "z_image": theirs.convert_z_image_transformer_checkpoint_to_diffusers,
        "sd3": theirs.convert_sd3_transformer_checkpoint_to_diffusers,
        "qwen_image": dict,
    }[family]


WRITERS = {
    "flux": flux,
    "flux2": flux,
    "sd3": sd3,
    "wan": wan,
    "z_image": z_image,
    "qwen_image": qwen_image,
}
