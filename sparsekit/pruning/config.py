"""What `prune` is asked to do, checked without torch so that a wrong word answers at once."""

import re
from fractions import Fraction
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sparsekit import registry as methods
from sparsekit.errors import UsageError, did_you_mean
from sparsekit.pipeline.options import (
    CALIBRATION,
    Device,
    Dtype,
    Flag,
    MethodOptions,
    ReadsRows,
    Skip,
    Word,
    one_of,
    seconds,
    written,
)
from sparsekit.weights.grids import Grid
from sparsekit.weights.patterns import Pattern


def _rank(text: str) -> Fraction:
    """The share of a side that `5%` stands for."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    share = Fraction(match[1]) / 100 if match else Fraction(0)
    if not 0 < share <= 1:
        raise UsageError(f"--rank {text!r} is no share of a side", "write it as 5%")
    return share


class PruneConfig(ReadsRows):
    """The options of `prune`."""

    method: Annotated[
        str | None,
        Field(description="See 'sparsekit methods'. Default: wanda."),
        Flag(metavar="method", methods=("pruners", "refiners")),
    ] = None
    pattern: Annotated[
        Pattern | None,
        Word(str | None, Pattern.parse),
        Field(
            description="N:M (N kept of M inputs), 50% (of each row) or 50%/tensor. Default: 2:4; "
            "with --dense, that of the sparse model."
        ),
        Flag(metavar="pattern", completes="patterns"),
    ] = None
    option: MethodOptions = written(())
    preset: Annotated[
        str | None,
        Field(description="A named set of options of the method, as published."),
        Flag(metavar="preset", completes="presets"),
    ] = None
    initial: Annotated[
        str | None,
        Field(description="The method that a refining method begins with."),
        Flag(metavar="method", methods=("pruners",)),
    ] = None
    refine: Annotated[
        str | None,
        Field(description="A refinement of what the method makes, as dsnot."),
        Flag(metavar="method", methods=("refiners",)),
    ] = None
    dense: Annotated[
        str | None,
        Field(description="The dense model of a MODEL that is sparse already, to refine its mask."),
        Flag(metavar="model", model=True),
    ] = None
    skip: Skip = ()
    reconstruct: Annotated[
        Literal["none", "cg"],
        Field(description="cg: least squares on the mask that the method chose."),
        Flag(),
    ] = "none"
    propagate: Annotated[
        bool | None,
        Field(
            description="Calibrate on the outputs of the pruned blocks before, or of the dense "
            "ones. Default: as the method's source does."
        ),
        Flag(panel=CALIBRATION, spelling=("--propagate/--no-propagate",)),
    ] = None
    allocate: Annotated[
        Literal["none", "owl"],
        Field(description="owl: blocks with many outliers keep more weights."),
        Flag(),
    ] = "none"
    compensate: Annotated[
        Literal["none", "lowrank"],
        Field(description="lowrank: a low-rank matrix makes up for what is lost."),
        Flag(),
    ] = "none"
    rank: Annotated[
        Fraction | None,
        Word(str | None, _rank),
        Field(
            description="Rank of --compensate lowrank, as a share of the smaller side. Default: 5%."
        ),
        Flag(metavar="percent"),
    ] = None
    format: Annotated[
        Literal["dense", "factored"],
        Field(description="factored: factors only, which is smaller."),
        Flag(),
    ] = "dense"
    budget: Annotated[
        float | None,
        Word(str | None, seconds("--budget")),
        Field(description="Time that the run may take, as 10m: armor does its best within it."),
        Flag(metavar="time"),
    ] = None
    then: Annotated[
        Grid | None,
        Word(str | None, Grid.parse),
        Field(
            description="Put what is kept on a grid in the same pass, as int4-g128, by GPTQ's rule."
        ),
        Flag(metavar="grid", completes="grids"),
    ] = None
    device: Device = "auto"
    dtype: Dtype = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what does not go together."""
        self._check_methods()
        self._check_options()
        if self.rank is not None and self.compensate == "none":
            raise UsageError("--rank has no effect without --compensate lowrank")
        self.check_rows(self.title, "propagate")
        return self

    @property
    def needs_rows(self) -> bool:
        """Whether a method of this run reads calibration."""
        return (
            self.then is not None
            or self.reconstruct != "none"
            or self.compensate != "none"
            or self.allocate != "none"
            or self.refiner is not None
            or not methods.describe("pruners", str(self.pruner)).data_free
        )

    @property
    def share(self) -> Fraction:
        """The rank of the compensation as a share of the smaller side; 0 without one."""
        return Fraction(0) if self.compensate == "none" else self.rank or Fraction(5, 100)

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
        for key, value in self.option.items():
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
        if self.budget is not None and not (told and told.unlimited):
            raise UsageError(f"--budget has no effect on {self.title}", "armor takes one")
        if self.refiner is None and self.preset is not None:
            raise UsageError("--preset has no effect without a refinement", "pass --refine dsnot")

    def _check_options(self) -> None:
        """Refuse options that no method of the run has, or that could be those of two."""
        taking = [name for name in (self.refiner, self.pruner) if name is not None]
        shared = self._known("refiners") & self._known("pruners")
        known = self._known("refiners") | self._known("pruners")
        for key in self.option:
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
            if dot and name in self.option:
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
