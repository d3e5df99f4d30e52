"""What `quantize` is asked to do, checked without torch so that a wrong word answers at once."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sparsekit import registry as methods
from sparsekit.errors import UsageError, did_you_mean
from sparsekit.pipeline.options import (
    Device,
    Dtype,
    Flag,
    MethodOptions,
    ReadsRows,
    Skip,
    Word,
    written,
)
from sparsekit.weights.grids import Grid


class QuantizeConfig(ReadsRows):
    """The options of `quantize`."""

    method: Annotated[
        str,
        Field(description="rtn (no data), gptq or awq."),
        Flag(metavar="method", methods=("quantizers",)),
    ] = "gptq"
    grid: Annotated[
        Grid,
        Word(str, Grid.parse),
        Field(
            description="int4-g128 (a scale for 128 inputs), int8 (weights only), w8a8 or fp8 "
            "(inputs too)."
        ),
        Flag(metavar="grid", completes="grids"),
    ] = written("int4-g128")
    option: MethodOptions = written(())
    skip: Skip = ()
    format: Annotated[
        Literal["compressed-tensors", "dense"],
        Field(description="Codes and scales, or (dense) the numbers that they stand for."),
        Flag(),
    ] = "compressed-tensors"
    device: Device = "auto"
    dtype: Dtype = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what does not go together."""
        known = methods.names("quantizers")
        if self.method not in known:
            raise UsageError(f"no method {self.method!r}", did_you_mean(self.method, known))
        methods.check("quantizers", self.method, self.option)
        self.check_rows(self.method)
        return self

    @property
    def needs_rows(self) -> bool:
        """Whether the method reads calibration."""
        return not methods.describe("quantizers", self.method).data_free
