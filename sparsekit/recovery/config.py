"""Options of `recover`, checked without importing torch."""

from math import ceil, cos, pi
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from sparsekit import registry as methods
from sparsekit.errors import UsageError, did_you_mean
from sparsekit.pipeline.options import (
    WHERE,
    Device,
    Flag,
    MethodOptions,
    Options,
    Skip,
    Word,
    count,
    one_of,
    seconds,
    written,
)
from sparsekit.text.sources import check_source
from sparsekit.text.training_rows import Corpus
from sparsekit.weights.patterns import Pattern

TRAINING, SAVING = "Training", "Saving and evaluating"
Schedule = Literal["auto", "flat", "cosine", "linear", "constant"]
SCHEDULES = get_args(Schedule)
# As a method: the best one in our measurements. As a schedule: that of the method.
AUTO = "auto"
# Shares of the steps in which the learning rate warms up, and in which `flat` falls to 0.
WARM_UP, TAIL = 0.04, 0.1
# Final value of `cosine`, relative to the largest rate.
COSINE_END = 0.1
# Fewest tokens in a row: one with a next token.
SHORTEST = 2


def _dtype(word: str) -> str:
    if word in ("bfloat16", "float16"):
        raise UsageError(
            f"--dtype {word}: training steps are smaller than the resolution of 16-bit weights and "
            "would be lost",
            "leave it out, or keep float32 weights and compute in 16 bits: --mixed-precision bf16",
            code="not-a-choice",
        )
    one_of("--dtype", word, ("auto", "float32"))
    return word


class RecoverConfig(Options):
    """The options of `recover`."""

    method: Annotated[
        str,
        Field(
            description="auto, fixed, ast or cast; auto picks ast, the best in our measurements."
        ),
        Flag(metavar="method", methods=("recoverers",), before=(AUTO,)),
    ] = AUTO
    data: Annotated[
        str,
        Field(
            description="Text to train on: builtin, self (sampled from the teacher), c4, "
            "wikitext2, a .txt, .jsonl, .json.gz or .parquet file, or token rows in a .safetensors "
            "file."
        ),
        Flag(metavar="source", completes="sources"),
    ] = "builtin"
    tokens: Annotated[
        int | None,
        Word(str | int | None, count),
        Field(
            description="Tokens to train on, rounded up to whole steps, e.g. 200K or 20M; or pass "
            "--max-time."
        ),
        Flag(metavar="count"),
    ] = None
    max_time: Annotated[
        float | None,
        Word(str | None, seconds("--max-time")),
        Field(description="Time limit, e.g. 30m; determines the number of steps."),
        Flag(metavar="time"),
    ] = None
    teacher: Annotated[
        str | None,
        Field(description="Dense model. Default: the one MODEL was made from, or MODEL itself."),
        Flag(metavar="model", model=True),
    ] = None
    pattern: Annotated[
        Pattern | None,
        Word(str | None, Pattern.parse),
        Field(description="As in prune. Default: the pattern of MODEL, or 2:4 for a dense model."),
        Flag(metavar="pattern", completes="patterns"),
    ] = None
    option: MethodOptions = written(())
    skip: Skip = ()
    metric: Annotated[
        Literal["magnitude", "activation"],
        Field(
            description="Weights to keep: the largest by magnitude, or by activation (|w| times "
            "input norm)."
        ),
        Flag(),
    ] = "magnitude"
    batch: Annotated[
        int, Field(ge=1, description="Rows per forward pass."), Flag(panel=TRAINING)
    ] = 2
    length: Annotated[int, Field(description="Tokens per row."), Flag(panel=TRAINING)] = 512
    accumulate: Annotated[
        int, Field(ge=1, description="Forward passes per step."), Flag(panel=TRAINING)
    ] = 1
    lr: Annotated[
        float | None,
        Field(description="Largest learning rate. Default: by method and model size."),
        Flag(panel=TRAINING),
    ] = None
    schedule: Annotated[
        Schedule,
        Field(description="Learning-rate schedule; auto: that of the method."),
        Flag(panel=TRAINING),
    ] = AUTO
    kl_weight: Annotated[
        float | None,
        Field(
            description="Weight of KL to the teacher in the loss, 0 to 1. Default: by model size."
        ),
        Flag(panel=TRAINING),
    ] = None
    temperature: Annotated[
        float, Field(description="Softmax temperature of the KL."), Flag(panel=TRAINING)
    ] = 1.0
    teacher_top: Annotated[
        int | None,
        Field(
            ge=1,
            description="Cache only the N largest probabilities per token of the teacher, e.g. 64.",
        ),
        Flag(panel=TRAINING),
    ] = None
    slorb: Annotated[
        int | None,
        Field(ge=1, description="Also train SLoRB branches; inputs per branch row, e.g. 16."),
        Flag(),
    ] = None
    format: Annotated[
        Literal["dense", "factored"],
        Field(description="factored: store factors only, which is smaller."),
        Flag(),
    ] = "dense"
    save_every: Annotated[
        int | None,
        Field(ge=1, description="Steps between saved states. Default: every ten minutes."),
        Flag(panel=SAVING),
    ] = None
    eval_every: Annotated[
        int | None,
        Field(ge=1, description="Steps between evaluations of perplexity."),
        Flag(panel=SAVING),
    ] = None
    eval_text: Annotated[
        str | None,
        Field(description="Text to evaluate on. Default: the held-out part of builtin."),
        Flag(panel=SAVING, metavar="source", completes="windows"),
    ] = None
    seed: Annotated[int, Field(description="Seed of all random choices."), Flag(panel=TRAINING)] = 0
    device: Device = "auto"
    dtype: Annotated[
        Literal["auto", "float32"],
        Word(str, _dtype),
        Field(description="Dtype of weights in training."),
        Flag(panel=WHERE),
    ] = "auto"
    mixed_precision: Annotated[
        Literal["no", "bf16"],
        Field(description="bf16 autocast with float32 weights; no turns it off."),
        Flag(panel=WHERE),
    ] = "no"

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse options that conflict."""
        known = [*methods.names("recoverers"), AUTO]
        if self.method not in known:
            hint = did_you_mean(self.method, known)
            raise UsageError(f"there is no method {self.method!r}", hint, code="no-method")
        if self.method != AUTO:
            methods.check("recoverers", self.method, self.option)
        elif self.option:
            raise UsageError(
                f"option {next(iter(self.option))!r} cannot be combined with --method {AUTO}",
                "name the method that has it",
                code="conflicting-options",
            )
        self.corpus(0).check()
        if self.eval_text is not None:
            check_source(self.eval_text)
            if self.eval_text == "self":
                message = "--eval-text cannot be sampled from the model (self)"
                raise UsageError(message, "choose another text, e.g. builtin", code="not-a-choice")
            if self.eval_every is None:
                message = "--eval-text has no effect without --eval-every"
                raise UsageError(message, code="no-effect")
        self._check_numbers()
        if self.format == "factored" and self.slorb is None:
            message = "--format factored has no effect without --slorb"
            raise UsageError(message, "leave it out", code="no-effect")
        return self

    def _check_numbers(self) -> None:
        if (self.tokens is None) == (self.max_time is None):
            raise UsageError(
                "recover needs either --tokens or --max-time"
                + (", not both" if self.tokens is not None else ""),
                "e.g. --tokens 20M, or --max-time 30m",
                code="tokens-or-max-time",
            )
        if self.data == "self" and self.tokens is None:
            message = "--data self needs a number of tokens to sample"
            raise UsageError(message, "pass --tokens, not --max-time", code="missing-option")
        if self.tokens is not None and self.tokens < self.step_tokens:
            raise UsageError(
                f"--tokens {self.tokens} is less than one step of {self.step_tokens}",
                "pass more tokens, or a smaller --batch, --length or --accumulate",
                code="too-few-tokens",
            )
        if self.lr is not None and not 0 < self.lr < 1:
            message = f"--lr must be between 0 and 1, not {self.lr:g}"
            raise UsageError(message, "1e-4 is usual", code="out-of-range")
        if self.kl_weight is not None and not 0 <= self.kl_weight <= 1:
            message = f"--kl-weight must be between 0 and 1, not {self.kl_weight:g}"
            raise UsageError(message, code="out-of-range")
        if self.kl_weight == 0 and self.teacher_top is not None:
            message = "--teacher-top has no effect with --kl-weight 0"
            raise UsageError(message, "leave it out", code="no-effect")
        if self.kl_weight == 0 and self.teacher and self.slorb is None and self.data != "self":
            message = "--teacher has no effect with --kl-weight 0"
            raise UsageError(message, "leave it out", code="no-effect")
        if not 0 < self.temperature < 100:
            message = f"--temperature must be between 0 and 100, not {self.temperature:g}"
            raise UsageError(message, code="out-of-range")

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.length * self.accumulate

    def steps(self) -> int:
        """Number of steps that the tokens make."""
        return ceil((self.tokens or 0) / self.step_tokens)

    def corpus(self, tokens: int | None) -> Corpus:
        """The training text, of at most `tokens` tokens."""
        return Corpus(source=self.data, length=self.length, tokens=tokens, seed=self.seed)


def rate_at(schedule: Schedule, step: int, steps: int) -> float:
    """The learning rate of a step, relative to the largest.

    All schedules but `constant` warm up in the first 4 % of the steps. `flat` falls to 0 in the
    last 10 %; `cosine` falls to 10 % and `linear` to 0 over the whole run.

    Raises:
        ValueError: The schedule is `auto`.
    """
    if schedule == AUTO:
        raise ValueError("auto must be replaced by the schedule of the method")
    if schedule == "constant":
        return 1.0
    rising = max(1, round(WARM_UP * steps))
    rise = min(1.0, (step + 1) / rising)
    left = (steps - step) / steps
    if schedule == "flat":
        return min(rise, left / TAIL)
    if schedule == "linear":
        return min(rise, left)
    return rise * (COSINE_END + (1 - COSINE_END) * (1 + cos(pi * (1 - left))) / 2)
