"""A paper's central statement in miniature: ``claim.yaml``, checked word by word, and the rule that decides it.

A paper with more than one statement has a ``claim_NAME.yaml`` for each further one.

A comparison holds when the lower end of ``mean difference - 2 standard errors`` (paired over seeds, n - 1) lies above
its threshold: 0 for "better", ``by`` for "better by", ``-within`` for "not worse by more than", log(``factor``) for "at
least so many times". One rule for all four, so that noise argues against every claim in the same way; with the default
threshold it says that the difference exceeds twice its standard error. Student's 95 % interval is kept beside it,
because two standard errors of three seeds are less than they sound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from core.config.fingerprint import digest
from core.config.kinds import Whole
from core.profile.figures import MeasureSettings
from core.tables.paired import Paired
from core.tables.table_file import Overrides, Reader, table_id

CLAIM = "claim"
_Direction = Literal["higher", "lower"]
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class ClaimRow:
    """One thing that is trained: a label, what part it plays, and its experiment."""

    label: str
    role: Literal["ours", "baseline", "ablation", "control"]
    experiment: str
    overrides: Overrides = ()


@dataclass(frozen=True)
class Comparison:
    """`better` against `than`; `kind` and `margin` say by how much, `metric` and `direction` in what."""

    better: str
    than: str
    metric: str
    direction: _Direction
    kind: str = "by"
    margin: float = 0.0

    @property
    def threshold(self) -> float:
        """What the lower bound of the mean difference has to exceed."""
        return {"by": self.margin, "within": -self.margin, "factor": math.log(self.margin or 1.0)}[self.kind]

    @property
    def words(self) -> str:
        """The comparison as a phrase."""
        if self.kind == "within":
            return f"{self.better} within {self.margin:g} of {self.than}"
        if self.kind == "factor":
            return f"{self.better} at least {self.margin:g} times {self.than}"
        return f"{self.better} better than {self.than}" + (f" by {self.margin:g}" if self.margin else "")

    def judge(self, better: Mapping[Any, float], than: Mapping[Any, float]) -> tuple[Paired, str]:
        """The paired differences, turned so that more is better, and the verdict.

        Args:
            better: value by seed (or by measuring round); the key None stands for an exact figure.
            than: the same of the other row.

        Returns:
            Differences (of logarithms for a factor), and holds, does not hold, or undecided with fewer than two pairs.
        """
        sign = 1.0 if self.direction == "higher" else -1.0
        measure = math.log if self.kind == "factor" else float
        pairs = Paired.of(
            {key: sign * measure(value) for key, value in better.items()},
            {key: sign * measure(value) for key, value in than.items()},
        )
        if pairs.mean is not None and None in better and None in than:
            lower = pairs.mean  # exact figures have no error
        elif pairs.bounds is not None:
            lower = pairs.bounds[0]
        else:
            return pairs, OPEN
        return pairs, HOLDS if lower > self.threshold else FAILS


@dataclass(frozen=True)
class Claim:
    """A whole claim file; see `load_claim`."""

    path: Path
    id: str
    statement: str
    metric: str
    direction: _Direction
    seeds: tuple[Whole, ...]
    rows: tuple[ClaimRow, ...]
    comparisons: tuple[Comparison, ...]
    setting: tuple[str, ...] = ()
    report: tuple[str, ...] = ()
    profile: MeasureSettings = field(default_factory=MeasureSettings)

    @property
    def paper(self) -> str:
        """The paper's package."""
        return self.id.partition("/")[0]

    def definition(self) -> dict[str, Any]:
        """What the claim says, as plain data."""
        plain = {key: value for key, value in asdict(self).items() if key not in ("path", "id")}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    def hash(self) -> str:
        """Changes with anything in the definition that can change a verdict."""
        return digest({k: v for k, v in self.definition().items() if k not in ("statement", "setting")})


def is_claim(path: Path) -> bool:
    """Whether a file in ``tables/`` is a claim: ``claim.yaml`` or ``claim_NAME.yaml``; all others are tables."""
    return path.stem == CLAIM or path.stem.startswith(f"{CLAIM}_")


def load_claim(path: str | Path) -> Claim:
    """Reads and checks a claim file.

    ::

        statement: Semantic tokens keep the full model's accuracy at less than half of its cost.
        metric: accuracy/top1             # name in result.json
        direction: higher                 # higher | lower
        seeds: [0, 1, 2]
        rows:
          - {label: STViT, role: ours, experiment: stvit/claim}
          - {label: random tokens, role: control, experiment: stvit/claim, overrides: [model.network.pool=random]}
        comparisons:
          - {better: STViT, than: random tokens}                         # by more than 2 standard errors
          - {better: STViT, than: full ViT, within: 1.0}                 # not worse by more than 1 (metric's unit)
          - {better: STViT, than: full ViT, metric: macs, direction: lower, factor: 2}
        setting: [what is trained on what, and since when it is fixed]   # lines printed below
        report: [macs, throughput]        # also printed: figures of core.profile.figures, or metrics
        profile: {batch: 64, repeats: 15, threads: 1}

    `by`, `within` and `factor` exclude each other; without any, `by: 0` is meant.

    Raises:
        ConfigError: anything else; names file, place and nearest valid word.
    """
    path = Path(path)
    reader = Reader(path)
    data = reader.load()
    names = [one.name for one in fields(Claim) if one.name not in ("path", "id")]
    reader.keys(data, "", names, required=("comparisons",))
    pairs = data.pop("comparisons")
    claim = reader.fill(Claim, data, "", path=path, id=table_id(path), comparisons=())
    if len(set(claim.seeds)) != len(claim.seeds) or len(claim.seeds) < 2:
        raise reader.error("seeds", "at least two different seeds are needed for a standard error (three are usual)")
    labels = [row.label for row in claim.rows]
    for index, label in enumerate(labels):
        if label in labels[:index]:
            raise reader.error(f"rows[{index}]", f"an earlier row is called '{label}' too")
    comparisons = [
        _comparison(reader, reader.mapping(entry, f"comparisons[{i}]"), f"comparisons[{i}]", claim)
        for i, entry in enumerate(reader.value(pairs, tuple[Any, ...], "comparisons"))
    ]
    if not comparisons:
        raise reader.error("comparisons", "a claim compares something")
    return replace(claim, comparisons=tuple(comparisons))


def _comparison(reader: Reader, entry: Mapping[str, Any], where: str, claim: Claim) -> Comparison:
    kinds = ("by", "within", "factor")
    reader.keys(entry, where, ("better", "than", "metric", "direction", *kinds), required=("better", "than"))
    for side in ("better", "than"):
        reader.known(str(entry[side]), f"{where}.{side}", [row.label for row in claim.rows], "row")
    if entry["better"] == entry["than"]:
        raise reader.error(where, "a row is compared with itself")
    given = [kind for kind in kinds if entry.get(kind) is not None]
    if len(given) > 1:
        raise reader.error(where, f"{' and '.join(given)} exclude each other")
    kind = given[0] if given else "by"
    margin = float(reader.value(entry[kind], float, f"{where}.{kind}")) if given else 0.0
    if margin < 0 or (kind == "factor" and margin == 0):
        raise reader.error(f"{where}.{kind}", f"{margin:g} has to be positive")
    if "metric" in entry and "direction" not in entry and entry["metric"] != claim.metric:
        raise reader.error(where, f"direction (higher | lower) of '{entry['metric']}' is missing")
    said = {key: entry.get(key, getattr(claim, key)) for key in ("metric", "direction")}
    sides = {side: str(entry[side]) for side in ("better", "than")}
    return reader.fill(Comparison, said | sides, where, kind=kind, margin=margin)


def overall(verdicts: Sequence[str]) -> str:
    """A claim holds when all its comparisons do."""
    if FAILS in verdicts:
        return FAILS
    return OPEN if OPEN in verdicts else HOLDS
