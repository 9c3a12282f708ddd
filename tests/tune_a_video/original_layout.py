"""Weights of the random Stable Diffusion under the names of an original single file."""

import re

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(name, layers, attention_up):
    """The original name; blocks count through, `layers` residual blocks and a sampler each on the way down."""
    for ours, theirs in ENDS.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    if name.startswith("mid_block."):
        kind, number, rest = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name).groups()
        place = 2 * int(number) if kind == "resnets" else 1
        return f"middle_block.{place}.{inner(kind, rest)}"
    way, block, kind, number, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name).groups()
    block, number = int(block), int(number)
    if way == "down":
        start = 1 + block * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{start + layers}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{start + number}.{int(kind == 'attentions')}.{inner(kind, rest)}"
    start = block * (layers + 1)
    if kind == "upsamplers":
        return f"output_blocks.{start + layers}.{1 + attention_up[block]}.{rest}"
    return f"output_blocks.{start + number}.{int(kind == 'attentions')}.{inner(kind, rest)}"


def inner(kind, rest):
    if kind != "resnets":
        return rest
    head, _, tail = rest.partition(".")
    return f"{RESNET[head]}.{tail}"


def vae_name(name, levels):
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    for ours, theirs in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)


def original_state(pipe):
    """Tensors of a `StableDiffusionPipeline` by their original names."""
    config = pipe.unet.config
    attention_up = ["CrossAttn" in kind for kind in config.up_block_types]
    state = {}
    for name, value in pipe.unet.state_dict().items():
        state[f"model.diffusion_model.{unet_name(name, config.layers_per_block, attention_up)}"] = value
    for name, value in pipe.vae.state_dict().items():
        if "attentions" in name and name.endswith("weight") and "group_norm" not in name:
            value = value[:, :, None, None]
        state[f"first_stage_model.{vae_name(name, len(pipe.vae.config.block_out_channels))}"] = value
    for name, value in pipe.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    return {name: value.clone().contiguous() for name, value in state.items()}
