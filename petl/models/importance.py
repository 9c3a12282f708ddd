"""Scores of channels over a data set, from the pass that the paper's second step needs (section 2.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from petl.models.channels import REDUCTIONS, ScoreSum, channel_products, select_channels
from petl.models.sites import Backbone, BlockSites, NoSite, Place

TOKENS = ("all", "cls", "patch")
SELECTORS = ("taylor", "salience", "random", "magnitude", "bottom", "fisher", "activation")


class ZeroScores(ValueError):
    """A pass gave scores of zero in a whole block; the message says why that happens."""


@dataclass
class Scores:
    """How much every channel of every block matters.

    values: by part (`""`, or `q` and `v` at the site `qv`), T_l `(C_l,)` of every block in float64.
    site: where they were measured.
    origin: what they came from (score, reduction, tokens, images, ...).
    """

    values: dict[str, list[Tensor]]
    site: str
    origin: dict[str, Any] = field(default_factory=dict)

    def select(self, k: int | float, allocation: str = "per_layer", *, smallest: bool = False) -> list[Any]:
        """What `petl.TTC(channels=...)` takes: indices of every block, or mappings of `q` and `v`."""
        parts = {
            part: select_channels(values, k, allocation=allocation, smallest=smallest)
            for part, values in self.values.items()
        }
        if "" in parts:
            return [index.tolist() for index in parts[""]]
        return [
            {part: index.tolist() for part, index in zip(parts, block, strict=True)}
            for block in zip(*parts.values(), strict=True)
        ]

    def normalised(self) -> dict[str, list[Tensor]]:
        """Every block's scores over their L2 norm, as `global` allocation compares them."""
        return {part: [v / v.norm().clamp_min(1e-300) for v in values] for part, values in self.values.items()}


# ------------------------------------------------------------------ passes over images
def channel_scores(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    site: str = "attn",
    reduction: str = "abs_of_sum",
    tokens: str = "all",
    device: torch.device | str | None = None,
    num_images: int | None = None,
) -> Scores:
    """Taylor scores: what the removal of a channel would do to the summed cross-entropy, to first order.

    No gradient of any weight is built: the graph begins behind the first block's input.

    Args:
        model: with its head, in the state whose channels are asked about (stage 1, for the paper).
        batches: of `(image, label)`, or mappings with these keys; `image` `(B, 3, H, W)`, `label` `(B,)`.
        site: `attn`, `mlp`, `block` or `qv`; see `petl.SCT`.
        reduction: `abs_of_sum`, `sum_of_abs`, `squared` (Fisher information of a gate per channel) or `signed`.
        tokens: `all`, `cls` (those before the patches) or `patch`.
        device: where the pass runs; None: where the model is.
        num_images: so many of the first images; None: all.

    Raises:
        ZeroScores: a block's scores are all zero, or the head is.
        ValueError: a wrong setting, or no image.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction '{reduction}' is none of {list(REDUCTIONS)}")
    passed = all_channel_scores(model, batches, site=site, tokens=tokens, device=device, num_images=num_images)
    return passed[reduction]


def all_channel_scores(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    site: str = "attn",
    tokens: str = "all",
    device: torch.device | str | None = None,
    num_images: int | None = None,
) -> dict[str, Scores]:
    """As `channel_scores`, in all four reductions from one pass."""
    with _scoring(model, site, tokens, device) as scored:
        sums: dict[str, list[ScoreSum]] = {part: [ScoreSum() for _ in scored.backbone.blocks] for part in scored.parts}
        for image, label in limited(batches, num_images):
            features, logits = scored.forward(image, gradients=True)
            loss = nn.functional.cross_entropy(logits.float(), label.to(logits.device), reduction="sum")
            flat = [h for block in features for h in block.values()]
            gradients = torch.autograd.grad(loss, flat, allow_unused=True)
            places = [(part, index) for index, block in enumerate(features) for part in block]
            for (part, index), h, gradient in zip(places, flat, gradients, strict=True):
                gradient = torch.zeros_like(h) if gradient is None else gradient
                sums[part][index].add(*channel_products(scored.kept(h), scored.kept(gradient)))
        _check_scores(scored, sums, tokens)
        origin = {"score": "taylor", "tokens": tokens, "images": sums[scored.parts[0]][0].images}
    return {
        reduction: Scores(
            {part: [total.score(reduction).cpu() for total in blocks] for part, blocks in sums.items()},
            site,
            {**origin, "reduction": reduction},
        )
        for reduction in REDUCTIONS
    }


def salience(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    site: str = "attn",
    by_class: bool = True,
    device: torch.device | str | None = None,
    num_images: int | None = None,
) -> Scores:
    """SCT's activation norms: for every class present, the L2 norm of a channel over its images and patch tokens.

    The score is the mean over these classes. Where the modules sit on the MLP's output (`mlp`), SCT measures the output
    of the block; so does this.

    Args:
        model: SCT takes the network as it was pre-trained.
        batches, site, device, num_images: see `channel_scores`.
        by_class: without classes, the norm over all images (`activation`).
    """
    measured = {"mlp": "block"}.get(site, site)
    squares: dict[str, list[dict[int, Tensor]]] = {}
    images = 0
    with _scoring(model, measured, "patch", device) as scored, torch.no_grad():
        for image, label in limited(batches, num_images):
            features, _ = scored.forward(image, gradients=False)
            images += len(image)
            for index, block in enumerate(features):
                for part, h in block.items():
                    per_image = scored.kept(h).double().square().flatten(1, -2).sum(1)
                    blocks = squares.setdefault(part, [{} for _ in scored.backbone.blocks])
                    for row, kind in zip(per_image, label.tolist(), strict=True):
                        group = kind if by_class else 0
                        blocks[index][group] = blocks[index].get(group, 0) + row
    if not images:
        raise ValueError("no image was scored")
    values = {
        part: [torch.stack([v.sqrt() for v in groups.values()]).mean(0).cpu() for groups in blocks]
        for part, blocks in squares.items()
    }
    return Scores(values, site, {"score": "salience" if by_class else "activation", "images": images})


def weight_magnitude(model: nn.Module, site: str = "attn") -> Scores:
    """L2 norms of the rows of the layer that writes the site: proj (`attn`), fc2 (`mlp`, `block`) or qkv (`qv`)."""
    backbone = Backbone.of(getattr(model, "backbone", model))
    writers = {"attn": "proj", "mlp": "fc2", "block": "fc2", "qv": "qkv"}
    values: dict[str, list[Tensor]] = {}
    for block in backbone.blocks:
        weight = backbone.site(block, writers[site]).module.weight.detach()
        norms = weight.double().flatten(1).norm(dim=1).cpu()
        for part, value in _parts(norms, site).items():
            values.setdefault(part, []).append(value)
    return Scores(values, site, {"score": "magnitude"})


def random_scores(model: nn.Module, site: str = "attn", seed: int = 0) -> Scores:
    """Uniform numbers of a generator of its own, so that any K of them are a random choice."""
    backbone = Backbone.of(getattr(model, "backbone", model))
    generator = torch.Generator().manual_seed(seed)
    parts = ("q", "v") if site == "qv" else ("",)
    values = {
        part: [torch.rand(block.dim, generator=generator, dtype=torch.float64) for block in backbone.blocks]
        for part in parts
    }
    return Scores(values, site, {"score": "random", "seed": seed})


# ------------------------------------------------------------------ how a pass sees its site
@dataclass
class _Scoring:
    model: nn.Module
    backbone: Backbone
    site: str
    tokens: str
    device: torch.device
    parts: tuple[str, ...]
    seen: list[dict[str, Tensor]]

    def forward(self, image: Tensor, *, gradients: bool) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Features at the site of every block, channels last or as the block has them, and the logits."""
        self.seen.clear()
        with torch.set_grad_enabled(gradients):
            logits = self.model(image.to(self.device))
        return list(self.seen), logits

    def kept(self, h: Tensor) -> Tensor:
        """The tokens that count, with the channels last."""
        block = self.backbone.blocks[0]
        axis = (block.block if self.site == "block" else block.mlp).axis
        if axis == 1:
            h = h.movedim(1, -1)
        if self.tokens == "all" or h.ndim != 3:
            return h
        prefix = self.backbone.prefix_tokens
        return h[:, :prefix] if self.tokens == "cls" else h[:, prefix:]


@contextlib.contextmanager
def _scoring(model: nn.Module, site: str, tokens: str, device: torch.device | str | None) -> Iterator[_Scoring]:
    """The model in evaluation mode, without gradients of weights, with an ear at every block's site; then as before."""
    if tokens not in TOKENS:
        raise ValueError(f"tokens='{tokens}' is none of {list(TOKENS)}")
    backbone = Backbone.of(getattr(model, "backbone", model))
    if tokens != "all" and not hasattr(backbone.model, "num_prefix_tokens"):
        if site != "block" and tokens == "cls":
            raise NoSite(f"{type(backbone.model).__name__} has no class token")
        tokens = "all"
    where = torch.device(device) if device is not None else next(model.parameters()).device
    parts = ("q", "v") if site == "qv" else ("",)
    scored = _Scoring(model, backbone, site, tokens, where, parts, [])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    handles = [_listen(backbone, block, site, scored.seen) for block in backbone.blocks]
    handles.append(backbone.blocks[0].block.module.register_forward_pre_hook(_begin, prepend=True))
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        model.to(where).eval()
        yield scored
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


def _begin(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The leaf of the graph: what the first block is given."""
    return (args[0].detach().requires_grad_(torch.is_grad_enabled()), *args[1:])


def _listen(backbone: Backbone, block: BlockSites, site: str, seen: list[dict[str, Tensor]]) -> Any:
    """A hook that keeps the site's tensor, itself and not a copy, so that gradients with respect to it exist."""
    if site == "attn":  # what the MLP's norm is given is the stream behind the attention, at the same time its residual
        place = backbone.site(block, "norm2")
        return place.module.register_forward_pre_hook(lambda module, args: seen.append({"": args[0]}))
    if site == "qv":

        def split(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            query, key, value = output.chunk(3, dim=-1)
            seen.append({"q": query, "v": value})
            return torch.cat([query, key, value], dim=-1)

        return backbone.site(block, "qkv").module.register_forward_hook(split)
    if site not in ("mlp", "block"):
        raise ValueError(f"site='{site}' is none of ['attn', 'mlp', 'qv', 'block']")
    place: Place = backbone.site(block, site)
    return place.module.register_forward_hook(lambda module, args, output: seen.append({"": output}))


def _parts(rows: Tensor, site: str) -> dict[str, Tensor]:
    if site != "qv":
        return {"": rows}
    query, _, value = rows.chunk(3)
    return {"q": query, "v": value}


def _check_scores(scored: _Scoring, sums: Mapping[str, Sequence[ScoreSum]], tokens: str) -> None:
    totals = [block for blocks in sums.values() for block in blocks]
    if not totals[0].images:
        raise ValueError("no image was scored")
    silent = [i % len(scored.backbone.blocks) for i, total in enumerate(totals) if not total.score("sum_of_abs").any()]
    if not silent:
        return
    head = getattr(scored.backbone.model, "get_classifier", lambda: None)()
    if any(isinstance(m, nn.Linear) and not m.weight.any() for m in getattr(head, "modules", lambda: ())()):
        raise ZeroScores(
            "the head's weights are all zero, so that no gradient reaches any channel: score a network whose head was "
            "trained (stage 1, or a linear probe)"
        )
    last = len(scored.backbone.blocks) - 1
    if tokens == "patch" and last in silent:
        raise ZeroScores(
            f"tokens=patch: in the last block ({last}) only the class token reaches the head, so that the gradient of "
            "every patch token is zero there; use tokens=all"
        )
    raise ZeroScores(f"all scores of blocks {sorted(set(silent))} are zero: no gradient reaches them")


def limited(batches: Iterable[Any], num_images: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of images and labels from batches of either form, no more than `num_images` images in all."""
    left = num_images
    for batch in batches:
        image, label = (batch["image"], batch["label"]) if isinstance(batch, Mapping) else batch[:2]
        if left is not None:
            image, label = image[:left], label[:left]
            left -= len(image)
        if len(image):
            yield image, label
        if left == 0:
            return
