"""An AutoencoderKL that is the identity on pictures: latent diffusion's code path, without a trained autoencoder."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

#: Value of the two constant channels. The larger it is beside pixels, the more exact is the identity.
_CONSTANT = 100.0


@torch.no_grad()
def identity_vae(scaling_factor: float = 0.8, size: int = 16) -> AutoencoderKL:
    """The autoencoder with latents z = x, of three channels and the pictures' size; exact to 2e-4 on [-1, 1].

    Each colour travels as the pair +x, -x through convolutions that copy, and residual blocks without a branch. The
    only thing left that could change it is the last norm and SiLU of either half: two channels of constants +K, -K,
    much larger than any pixel, fix the norm's statistics at mean 0 and deviation K/2, which its weight undoes, and
    SiLU(v) - SiLU(-v) = v.

    Args:
        scaling_factor: what pipelines multiply latents with.
        size: side of the pictures, for the config.

    Returns:
        The model, in evaluation mode. Its posterior has next to no variance: samples are the mode.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=1,
        sample_size=size,
        scaling_factor=scaling_factor,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    for parameter in vae.parameters():
        parameter.zero_()
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.GroupNorm) and name.endswith("conv_norm_out"):
            module.weight.fill_(_CONSTANT / 2)
    for half in (vae.encoder, vae.decoder):
        for colour in range(3):
            half.conv_in.weight[2 * colour, colour, 1, 1] = 1
            half.conv_in.weight[2 * colour + 1, colour, 1, 1] = -1
            half.conv_out.weight[colour, 2 * colour, 1, 1] = 1
            half.conv_out.weight[colour, 2 * colour + 1, 1, 1] = -1
        half.conv_in.bias[6], half.conv_in.bias[7] = _CONSTANT, -_CONSTANT
    vae.encoder.conv_out.bias[3:] = -30  # log-variance
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        convolution.weight[:, :, 0, 0] = torch.eye(len(convolution.weight))
    return vae.eval()
