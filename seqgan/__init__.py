"""SeQ-GAN: rethinking the objectives of vector-quantized tokenizers for image synthesis (Gu et al., CVPR 2024).

    from seqgan import ARSampler, ar_base, conv_tokenizer

Names are loaded when they are first used: the networks alone need neither the engine nor data.
"""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
