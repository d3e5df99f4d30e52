"""Options of `quantize`, checked without importing torch."""

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
        Field(description="rtn (no calibration), gptq or awq."),
        Flag(metavar="method", methods=("quantizers",)),
    ] = "gptq"
    grid: Annotated[
        Grid,
        Word(str, Grid.parse),
        Field(
            description="int4-g128 (a scale per 128 inputs), int8 (weights only), w8a8 or fp8 "
            "(weights and inputs)."
        ),
        Flag(metavar="grid", completes="grids"),
    ] = written("int4-g128")
    option: MethodOptions = written(())
    skip: Skip = ()
    format: Annotated[
        Literal["compressed-tensors", "dense"],
        Field(description="Store codes and scales, or (dense) the rounded numbers."),
        Flag(),
    ] = "compressed-tensors"
    device: Device = "auto"
    dtype: Dtype = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse options that conflict."""
        known = methods.names("quantizers")
        if self.method not in known:
            hint = did_you_mean(self.method, known)
            raise UsageError(f"there is no method {self.method!r}", hint, code="no-method")
        methods.check("quantizers", self.method, self.option)
        self.check_rows(self.method)
        return self

    @property
    def needs_rows(self) -> bool:
        """Whether the method needs calibration."""
        return not methods.describe("quantizers", self.method).data_free
