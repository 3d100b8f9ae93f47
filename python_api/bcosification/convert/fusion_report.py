"""What block fusion did, for people: which modules changed, which were left and why, which chains run as one op."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["FusionReport"]


@dataclass
class FusionReport:
    """What `fuse` or `fuse_blocks` did.

    Attributes:
        fused: (name, class before, class after) of every module that changed; the root's name is "".
        left: (name, class, reason) of every module that looks like one to fuse but was left as it is.
        chains: (convolution, BatchNorm) by their names, of all that run as one op, with residual and ReLU where such
            follow; those of modules that were fused before, too.
        apart: names of the BatchNorms that run in a pass of their own, behind whatever it is.
    """

    fused: list[tuple[str, str, str]] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)
    chains: list[tuple[str, str]] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)

    def extend(self, other: FusionReport) -> None:
        """Add what another report of the same model says; its chains, which are all there are, replace these."""
        self.fused += other.fused
        self.left += other.left
        self.chains, self.apart = other.chains, other.apart

    def of_chains(self) -> list[str]:
        """How many BatchNorms run as one op with the convolution before them, in a line; none without BatchNorms."""
        if not self.chains and not self.apart:
            return []
        line = f"{len(self.chains)} of {len(self.chains) + len(self.apart)} BatchNorms run as one op with the "
        line += "convolution before them"
        if self.apart:
            more = f" and {len(self.apart) - 3} more" if len(self.apart) > 3 else ""
            line += f"; apart: {', '.join(self.apart[:3])}{more}"
        return [line]

    def __str__(self) -> str:
        counts = Counter(row[1:] for row in self.fused)
        lines = [f"{count} x {before} -> {after}" for (before, after), count in counts.items()]
        lines += self.of_chains()
        if self.left:
            lines.append("left as they are:")
            lines += [f"  {name or '(root)'}: {kind} ({reason})" for name, kind, reason in self.left]
        return "\n".join(lines) or "nothing to fuse"
