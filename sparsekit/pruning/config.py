"""What `prune` is asked to do, checked without torch so that a wrong word answers at once."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from sparsekit import registry as methods
from sparsekit.errors import UsageError, did_you_mean
from sparsekit.pipeline.options import (
    DEVICES,
    DTYPES,
    MethodOptions,
    named_rows,
    one_of,
    parsed,
    seconds,
    with_rows,
)
from sparsekit.text.calibration import Calibration
from sparsekit.weights.grids import Grid
from sparsekit.weights.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """The options of `prune`; the command's flags have the same names and defaults."""

    method: str | None = None
    """A pruner, or a refiner with its initial pruner; None: `wanda`, or no pruner with `dense`."""
    pattern: str | None = None
    """None: `2:4`, or with `dense` what the history of the sparse model says."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of the method and of what it begins with, as text; `alps.damping` names which."""
    preset: str | None = None
    """A named set of options of the refiner."""
    initial: str | None = None
    """The pruner that a refiner given as `method` begins with; None: its own choice."""
    refine: str | None = None
    """A refiner that goes over what the method made."""
    dense: str | None = None
    """The dense model that a model that is sparse already comes from; only refined, then."""
    calibration: Calibration | None = None
    """None: the default rows for a method that needs them, none for one that does not."""
    skip: Sequence[str] = ()
    """Globs of weights to leave dense, matched against the name or any run of its parts."""
    reconstruct: Literal["none", "cg"] = "none"
    """`cg` solves for the weights on the mask that the method chose."""
    compensate: Literal["none", "lowrank"] = "none"
    """`lowrank` adds a low-rank matrix, kept as factors, that makes up for what is lost."""
    rank: str | None = None
    """Its rank, as a share of the smaller side of each weight; None: 5%."""
    allocate: Literal["none", "owl"] = "none"
    """`owl` lets blocks with many outliers keep more of their weights than others."""
    propagate: bool | None = None
    """Whether inputs come from the pruned blocks before; None: as the method's source does."""
    format: Literal["dense", "factored"] = "dense"
    """Whether a weight with factors is written as their product too, or as factors only."""
    budget: float | None = None
    """Seconds that the run may take, for a method that works in rounds."""
    then: str | None = None
    """The grid that kept weights are put on in the same pass, as `int4-g128`; None: none."""
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """Refuse what is wrong whatever the model is.

        Raises:
            UsageError: An unknown method, option, pattern, device or dtype.
            DataError: The calibration source cannot be used.
        """
        self._check_methods()
        self._check_options()
        if self.pattern is not None:
            Pattern.parse(self.pattern)
        if self.calibration:
            self.calibration.check()
        one_of("--reconstruct", self.reconstruct, ("none", "cg"))
        one_of("--allocate", self.allocate, ("none", "owl"))
        one_of("--compensate", self.compensate, ("none", "lowrank"))
        if self.rank is not None and self.compensate == "none":
            raise UsageError("--rank has no effect without --compensate lowrank")
        if self.share > 1 or (self.rank is not None and not self.share):
            raise UsageError(f"--rank {self.rank!r} is no share of a side", "write it as 5%")
        one_of("--format", self.format, ("dense", "factored"))
        one_of("--device", self.device, DEVICES)
        one_of("--dtype", self.dtype, DTYPES)
        if self.then is not None:
            Grid.parse(self.then)

    @property
    def rows(self) -> Calibration | None:
        """The calibration that this run reads."""
        needed = (
            self.then is not None
            or self.reconstruct != "none"
            or self.compensate != "none"
            or self.allocate != "none"
            or self.refiner is not None
            or (self.pruner and not methods.describe("pruners", self.pruner).data_free)
        )
        return self.calibration or (Calibration() if needed else None)

    @property
    def share(self) -> Fraction:
        """The rank of the compensation as a share of the smaller side; 0 without one."""
        if self.compensate == "none":
            return Fraction(0)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)%", self.rank or "5%")
        return Fraction(match[1]) / 100 if match else Fraction(0)

    @property
    def refiner(self) -> str | None:
        """The refiner's name."""
        return self.method if self.method in methods.names("refiners") else self.refine

    @property
    def pruner(self) -> str | None:
        """The name of the method that makes the first mask; None when the model has one."""
        if self.dense is not None:
            return None
        if self.refiner is not None and self.refiner == self.method:
            return self.initial or methods.describe("refiners", self.refiner).initial
        return self.method or "wanda"

    @property
    def title(self) -> str:
        """The methods in words, as `dsnot from wanda`."""
        if self.refiner is None:
            return str(self.pruner)
        return f"{self.refiner} from {self.pruner or 'the given mask'}"

    def options_of(self, kind: Literal["pruners", "refiners"]) -> dict[str, str]:
        """The options of the refiner or of the pruner, without the method before their names.

        An option that names no method is the refiner's, if it has such a one.
        """
        refiner = self._known("refiners")
        found = {}
        for key, value in self.options.items():
            method, _, name = key.rpartition(".")
            of = "refiners" if name in refiner else "pruners"
            if method:
                of = "refiners" if method == self.refiner else "pruners"
            if of == kind:
                found[name] = value
        return found

    def _known(self, kind: Literal["pruners", "refiners"]) -> set[str]:
        """The names of the options that the pruner, or the refiner, has."""
        method = self.pruner if kind == "pruners" else self.refiner
        return (
            {option.name for option in methods.describe(kind, method).options} if method else set()
        )

    def _check_methods(self) -> None:
        refiners = methods.names("refiners")
        everything = [*methods.names("pruners"), *refiners]
        if self.method is not None and self.method not in everything:
            raise UsageError(f"no method {self.method!r}", did_you_mean(self.method, everything))
        if self.refine is not None:
            one_of("--refine", self.refine, refiners)
            if self.refiner != self.refine:
                raise UsageError(
                    f"--method {self.method} is a refinement itself",
                    f"write --method {self.refine} --initial PRUNER, or one of the two",
                )
        if self.initial is not None:
            one_of("--initial", self.initial, methods.names("pruners"))
            if self.method not in refiners:
                raise UsageError(
                    "--initial has no effect without a method that begins with another",
                    f"--method {' or '.join(refiners)}",
                )
        if self.dense is not None:
            if self.refiner is None:
                raise UsageError("--dense needs a refinement", "pass --refine dsnot")
            if self.allocate != "none":
                raise UsageError("--allocate has no effect on a given mask", "leave it out")
            given = self.initial or (self.method if self.method != self.refiner else None)
            if given:
                raise UsageError(
                    f"--dense takes the mask of the sparse model, and {given} would make another",
                    "leave out one of the two",
                )
        told = methods.describe("refiners", self.refiner) if self.refiner else None
        if self.budget is not None and not (told and told.rounds):
            raise UsageError(f"--budget has no effect on {self.title}", "armor takes one")
        if self.refiner is None and self.preset is not None:
            raise UsageError("--preset has no effect without a refinement", "pass --refine dsnot")

    def _check_options(self) -> None:
        """Refuse options that no method of the run has, or that could be those of two."""
        taking = [name for name in (self.refiner, self.pruner) if name is not None]
        shared = self._known("refiners") & self._known("pruners")
        known = self._known("refiners") | self._known("pruners")
        for key in self.options:
            method, dot, name = key.rpartition(".")
            if dot and method not in taking:
                raise UsageError(
                    f"option {key!r}: {method!r} is no method of this run",
                    f"this run has {' and '.join(taking)}",
                )
            if not method and name in shared:
                both = f"{self.refiner}.{name} or {self.pruner}.{name}"
                raise UsageError(
                    f"{' and '.join(taking)} both have an option {name!r}", f"write {both}"
                )
            if dot and name in self.options:
                raise UsageError(f"option {name!r} is given twice", "leave out one")
            if not method and name not in known and len(taking) > 1:
                raise UsageError(
                    f"neither {self.refiner} nor {self.pruner} has an option {name!r}",
                    did_you_mean(name, known),
                )
        if self.refiner is not None:
            methods.check("refiners", self.refiner, self.options_of("refiners"), self.preset)
        if self.pruner is not None:
            methods.check("pruners", self.pruner, self.options_of("pruners"))
        elif left := self.options_of("pruners"):
            methods.check("refiners", str(self.refiner), left)


def prune_config(
    *,
    method: str | None = None,
    pattern: str | None = None,
    option: MethodOptions = (),
    preset: str | None = None,
    initial: str | None = None,
    refine: str | None = None,
    dense: str | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    skip: Sequence[str] = (),
    reconstruct: str = "none",
    propagate: bool | None = None,
    allocate: str = "none",
    compensate: str = "none",
    rank: str | None = None,
    format: str = "dense",
    budget: str | None = None,
    then: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> PruneConfig:
    """The checked configuration that the words of `prune` spell.

    Raises:
        UsageError: A word is not one that can be used, or has no effect.
        DataError: The calibration source cannot be used.
    """
    config = PruneConfig(
        method=method,
        pattern=pattern,
        options=parsed(option),
        preset=preset,
        initial=initial,
        refine=refine,
        dense=dense,
        calibration=named_rows(calibration, samples, length, seed),
        skip=skip,
        reconstruct=reconstruct,  # type: ignore[arg-type]  (check() refuses other words)
        propagate=propagate,
        allocate=allocate,  # type: ignore[arg-type]  (the same)
        compensate=compensate,  # type: ignore[arg-type]  (the same)
        rank=rank,
        budget=None if budget is None else seconds(budget),
        then=then,
        format=format,  # type: ignore[arg-type]  (the same)
        device=device,
        dtype=dtype,
    )
    flags = "--samples, --length, --seed and --propagate"
    given = not (samples is length is propagate is None and seed == 0)
    return with_rows(config, samples, length, seed, flags if given else "", config.title)
