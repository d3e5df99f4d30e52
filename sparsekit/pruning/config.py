"""Options of `prune`, checked without importing torch."""

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
    """The fraction in `5%`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    share = Fraction(match[1]) / 100 if match else Fraction(0)
    if not 0 < share <= 1:
        message = f"--rank {text!r} is not a percentage of up to 100%"
        raise UsageError(message, "write it as 5%", code="not-a-percentage")
    return share


class PruneConfig(ReadsRows):
    """The options of `prune`."""

    method: Annotated[
        str | None,
        Field(
            description="Default: wanda (fast, needs little memory, the usual baseline; see "
            "'sparsekit methods' for better ones)."
        ),
        Flag(metavar="method", methods=("pruners", "refiners")),
    ] = None
    pattern: Annotated[
        Pattern | None,
        Word(str | None, Pattern.parse),
        Field(
            description="N:M (keep N of M inputs), 50% (of each row) or 50%/tensor. Default: 2:4; "
            "with --dense, that of the sparse model."
        ),
        Flag(metavar="pattern", completes="patterns"),
    ] = None
    option: MethodOptions = written(())
    preset: Annotated[
        str | None,
        Field(description="Named set of options of the method, e.g. published."),
        Flag(metavar="preset", completes="presets"),
    ] = None
    initial: Annotated[
        str | None,
        Field(description="Method that a refining method starts from."),
        Flag(metavar="method", methods=("pruners",)),
    ] = None
    refine: Annotated[
        str | None,
        Field(description="Refine the result of the method, e.g. with dsnot."),
        Flag(metavar="method", methods=("refiners",)),
    ] = None
    dense: Annotated[
        str | None,
        Field(description="Dense model of an already sparse MODEL, to refine its mask."),
        Flag(metavar="model", model=True),
    ] = None
    skip: Skip = ()
    reconstruct: Annotated[
        Literal["none", "cg"],
        Field(description="cg: least squares for the kept weights, by conjugate gradients."),
        Flag(),
    ] = "none"
    propagate: Annotated[
        bool | None,
        Field(
            description="Calibrate each block on the outputs of the pruned blocks before it, or of "
            "the dense ones. Default: as in the method's source."
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
        Field(
            description="lowrank: add a low-rank matrix that compensates for the pruned weights."
        ),
        Flag(),
    ] = "none"
    rank: Annotated[
        Fraction | None,
        Word(str | None, _rank),
        Field(
            description="Rank of --compensate lowrank, relative to the smaller side. Default: 5%."
        ),
        Flag(metavar="percent"),
    ] = None
    format: Annotated[
        Literal["dense", "factored"],
        Field(description="factored: store factors only, which is smaller."),
        Flag(),
    ] = "dense"
    budget: Annotated[
        float | None,
        Word(str | None, seconds("--budget")),
        Field(description="Time limit, e.g. 10m, for armor."),
        Flag(metavar="time"),
    ] = None
    then: Annotated[
        Grid | None,
        Word(str | None, Grid.parse),
        Field(
            description="Also quantize the kept weights, in the same pass, with GPTQ's rule, e.g. "
            "to int4-g128."
        ),
        Flag(metavar="grid", completes="grids"),
    ] = None
    device: Device = "auto"
    dtype: Dtype = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse options that conflict."""
        self._check_methods()
        self._check_options()
        if self.rank is not None and self.compensate == "none":
            message = "--rank has no effect without --compensate lowrank"
            raise UsageError(message, code="no-effect")
        self.check_rows(self.title, "propagate")
        return self

    @property
    def needs_rows(self) -> bool:
        """Whether this run needs calibration."""
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
        """The rank of the compensation relative to the smaller side; 0 without compensation."""
        return Fraction(0) if self.compensate == "none" else self.rank or Fraction(5, 100)

    @property
    def refiner(self) -> str | None:
        """Name of the refiner."""
        return self.method if self.method in methods.names("refiners") else self.refine

    @property
    def pruner(self) -> str | None:
        """Name of the method that makes the first mask; None when the model has a mask."""
        if self.dense is not None:
            return None
        if self.refiner is not None and self.refiner == self.method:
            return self.initial or methods.describe("refiners", self.refiner).initial
        return self.method or "wanda"

    @property
    def title(self) -> str:
        """The methods in words, e.g. `dsnot from wanda`."""
        if self.refiner is None:
            return str(self.pruner)
        return f"{self.refiner} from {self.pruner or 'the given mask'}"

    def options_of(self, kind: Literal["pruners", "refiners"]) -> dict[str, str]:
        """The options of the refiner or of the pruner, without the prefix that names the method.

        An option without a prefix belongs to the refiner, if the refiner has it.
        """
        refiner = self._known("refiners")
        options = {}
        for key, value in self.option.items():
            method, _, name = key.rpartition(".")
            of = "refiners" if name in refiner else "pruners"
            if method:
                of = "refiners" if method == self.refiner else "pruners"
            if of == kind:
                options[name] = value
        return options

    def _known(self, kind: Literal["pruners", "refiners"]) -> set[str]:
        """Names of the options of the pruner or of the refiner."""
        method = self.pruner if kind == "pruners" else self.refiner
        return (
            {option.name for option in methods.describe(kind, method).options} if method else set()
        )

    def _check_methods(self) -> None:
        refiners = methods.names("refiners")
        everything = [*methods.names("pruners"), *refiners]
        if self.method is not None and self.method not in everything:
            hint = did_you_mean(self.method, everything)
            raise UsageError(f"there is no method {self.method!r}", hint, code="no-method")
        if self.refine is not None:
            one_of("--refine", self.refine, refiners)
            if self.refiner != self.refine:
                raise UsageError(
                    f"--method {self.method} and --refine {self.refine} are both refinements",
                    f"write --method {self.refine} --initial PRUNER",
                    code="conflicting-options",
                )
        if self.initial is not None:
            one_of("--initial", self.initial, methods.names("pruners"))
            if self.method not in refiners:
                raise UsageError(
                    "--initial has no effect without a refining method",
                    f"pass --method {' or '.join(refiners)}",
                    code="no-effect",
                )
        if self.dense is not None:
            if self.refiner is None:
                message, hint = "--dense needs a refinement", "pass --refine dsnot"
                raise UsageError(message, hint, code="missing-option")
            if self.allocate != "none":
                message = "--allocate has no effect on the mask of a sparse model"
                raise UsageError(message, "leave it out", code="no-effect")
            pruner = self.initial or (self.method if self.method != self.refiner else None)
            if pruner:
                raise UsageError(
                    f"--dense uses the mask of the sparse model, {pruner} would make a new one",
                    "leave out one of the two",
                    code="conflicting-options",
                )
        refiner = methods.describe("refiners", self.refiner) if self.refiner else None
        if self.budget is not None and not (refiner and refiner.unlimited):
            message = f"--budget has no effect on {self.title}"
            raise UsageError(message, "use it with --method armor", code="no-effect")
        if self.refiner is None and self.preset is not None:
            message = "--preset has no effect without a refinement"
            raise UsageError(message, "pass --refine dsnot", code="no-effect")

    def _check_options(self) -> None:
        """Refuse options that no method of the run has, and ambiguous ones."""
        taking = [name for name in (self.refiner, self.pruner) if name is not None]
        shared = self._known("refiners") & self._known("pruners")
        known = self._known("refiners") | self._known("pruners")
        for key in self.option:
            method, dot, name = key.rpartition(".")
            if dot and method not in taking:
                raise UsageError(
                    f"option {key!r}: {method!r} is not a method of this run",
                    f"this run has {' and '.join(taking)}",
                    code="no-option",
                )
            if not method and name in shared:
                both = f"{self.refiner}.{name} or {self.pruner}.{name}"
                message = f"{' and '.join(taking)} both have an option {name!r}"
                raise UsageError(message, f"write {both}", code="ambiguous-option")
            if dot and name in self.option:
                message = f"option {name!r} is given twice"
                raise UsageError(message, "leave out one", code="given-twice")
            if not method and name not in known and len(taking) > 1:
                raise UsageError(
                    f"neither {self.refiner} nor {self.pruner} has an option {name!r}",
                    did_you_mean(name, known),
                    code="no-option",
                )
        if self.refiner is not None:
            methods.check("refiners", self.refiner, self.options_of("refiners"), self.preset)
        if self.pruner is not None:
            methods.check("pruners", self.pruner, self.options_of("pruners"))
        elif left := self.options_of("pruners"):
            methods.check("refiners", str(self.refiner), left)
