"""The small networks around the diffusion model: a picture tower, the judge of looks, a tiny CLIP, the tokenizer."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from tune_a_video.standin.world import LOOKS

WIDTH = 64  # of text states and of the shared embedding
START, END = "<|startoftext|>", "<|endoftext|>"


class PictureTower(nn.Module):
    """A small convolutional network, (B, 3, 16, 16) to (B, `outputs`).

    Args:
        outputs: size of the vector.
        width: multiplies the channels 24, 32, 48, 64, 64.
    """

    def __init__(self, outputs: int, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for channels, stride in ((24, 1), (32, 2), (48, 1), (64, 2), (64, 1)):
            after = max(4, round(channels * width))
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(2 * before, outputs)

    def forward(self, pictures: Tensor) -> Tensor:
        """Vectors of pictures, -1 to 1."""
        features = self.trunk(pictures).flatten(2)
        return self.head(torch.cat([features.amax(2), features.mean(2)], dim=1))


class Judge(nn.Module):
    """Reads the three looks off a picture.

    Args:
        width: see `PictureTower`.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.tower = PictureTower(sum(LOOKS), width)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Scores of pictures (B, 3, 16, 16), -1 to 1: (B, 9), (B, 4), (B, 9)."""
        return self.tower(pictures).split(LOOKS, dim=1)

    @torch.no_grad()
    def looks(self, pictures: Tensor) -> Tensor:
        """The most likely looks, (..., 3, 16, 16) to (..., 3) int64."""
        flat = pictures.reshape(-1, *pictures.shape[-3:])
        found = torch.stack([scores.argmax(1) for scores in self(flat)], dim=1)
        return found.view(*pictures.shape[:-3], len(LOOKS))


def text_config(tokenizer: CLIPTokenizer, layers: int = 2) -> CLIPTextConfig:
    """The text encoder's configuration. CLIP pools at the end token, so its id has to be the tokenizer's."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class TinyCLIP(nn.Module):
    """Pictures and captions in one space, as CLIP has them; `tune_a_video.metrics.scores` takes it for one.

    Args:
        text: the text tower with its projection.
        tokenizer: of captions.
        width: of the picture tower.
    """

    def __init__(self, text: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, width: float = 1.0) -> None:
        super().__init__()
        self.text, self.tokenizer, self.width = text, tokenizer, width
        self.pictures = PictureTower(WIDTH, width)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))  # CLIP's own start is too steep for 18 captions

    def picture_vectors(self, pictures: Tensor) -> Tensor:
        """(B, 3, 16, 16), -1 to 1, to (B, 64), not normalised."""
        return self.pictures(pictures)

    def text_vectors(self, prompts: list[str]) -> Tensor:
        """Prompts to (B, 64), not normalised."""
        ids = token_ids(self.tokenizer, prompts).to(self.logit_scale.device)
        return self.text(input_ids=ids).text_embeds

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Frames (f, 3, 16, 16) in [0, 1] to (f, 64)."""
        with torch.no_grad():
            return self.picture_vectors(2 * frames - 1)

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Prompts to (n, 64)."""
        with torch.no_grad():
            return self.text_vectors(prompts)


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Prompts to (B, L) int64, padded and cut to the tokenizer's length."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(prompts, max_length=tokenizer.model_max_length, **options).input_ids


def make_tokenizer(sentences: list[str], length: int = 10) -> CLIPTokenizer:
    """CLIP's tokenizer in which every word of these sentences is one token.

    The merges are learned here, because the trainer of `tokenizers` numbers tokens anew in every run, and a text
    encoder without its tokenizer's numbers is worthless.

    Args:
        sentences: words in lower case, with blanks between them. Every byte is in the vocabulary, so that other texts
            have tokens too.
        length: tokens of a prompt with start and end.
    """
    from tokenizers import pre_tokenizers

    merges = _learn_merges(Counter(word for sentence in sentences for word in sentence.split()))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [START, END, *alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def _learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word is whole; of equals the first in the alphabet."""
    spelled = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = {word: _merged(parts, best) for word, parts in spelled.items()}


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out
