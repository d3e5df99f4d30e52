"""What `recover` is asked to do, checked without torch so that a wrong word answers at once."""

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
# In the place of a method: the one that was found best. In that of a schedule: the method's.
AUTO = "auto"
# Shares of the steps in which the learning rate rises, and in which `flat` falls to 0.
WARM_UP, TAIL = 0.04, 0.1
# What `cosine` ends at, as a share of the largest rate.
COSINE_END = 0.1
# Tokens of a row: one that has a next one.
SHORTEST = 2


def _dtype(word: str) -> str:
    if word in ("bfloat16", "float16"):
        raise UsageError(
            f"--dtype {word}: steps of training are smaller than the resolution of 16-bit weights, "
            "and would be lost",
            "leave it out, or multiply in 16 bits beside weights of 32: --mixed-precision bf16",
        )
    one_of("--dtype", word, ("auto", "float32"))
    return word


class RecoverConfig(Options):
    """The options of `recover`."""

    method: Annotated[
        str,
        Field(description="auto, fixed, ast or cast; auto is what was found best, ast."),
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
            description="How many to train on, rounded up to whole steps, as 200K or 20M; or give "
            "--max-time."
        ),
        Flag(metavar="count"),
    ] = None
    max_time: Annotated[
        float | None,
        Word(str | None, seconds("--max-time")),
        Field(description="Time that the run may take, as 30m; plans the steps."),
        Flag(metavar="time"),
    ] = None
    teacher: Annotated[
        str | None,
        Field(description="The dense model. Default: what MODEL was made from, or MODEL itself."),
        Flag(metavar="model", model=True),
    ] = None
    pattern: Annotated[
        Pattern | None,
        Word(str | None, Pattern.parse),
        Field(description="As in prune. Default: that of MODEL, 2:4 for a dense one."),
        Flag(metavar="pattern", completes="patterns"),
    ] = None
    option: MethodOptions = written(())
    skip: Skip = ()
    metric: Annotated[
        Literal["magnitude", "activation"],
        Field(
            description="What is kept: the largest by magnitude, or by activation (|w| times its "
            "input)."
        ),
        Flag(),
    ] = "magnitude"
    batch: Annotated[
        int, Field(ge=1, description="Rows in one forward pass."), Flag(panel=TRAINING)
    ] = 2
    length: Annotated[int, Field(description="Tokens in a row."), Flag(panel=TRAINING)] = 512
    accumulate: Annotated[
        int, Field(ge=1, description="Forward passes in one step."), Flag(panel=TRAINING)
    ] = 1
    lr: Annotated[
        float | None,
        Field(description="Largest learning rate. Default: by method and size."),
        Flag(panel=TRAINING),
    ] = None
    schedule: Annotated[
        Schedule, Field(description="auto: the method's."), Flag(panel=TRAINING)
    ] = AUTO
    kl_weight: Annotated[
        float | None,
        Field(description="Share of the loss that is KL from the teacher. Default: by size."),
        Flag(panel=TRAINING),
    ] = None
    temperature: Annotated[
        float, Field(description="Of the softmax in that KL."), Flag(panel=TRAINING)
    ] = 1.0
    teacher_top: Annotated[
        int | None,
        Field(
            ge=1, description="Keep this many largest probabilities of the teacher on disk, as 64."
        ),
        Flag(panel=TRAINING),
    ] = None
    slorb: Annotated[
        int | None,
        Field(ge=1, description="Train low-rank branches too, one row for so many inputs, as 16."),
        Flag(),
    ] = None
    format: Annotated[
        Literal["dense", "factored"],
        Field(description="factored: factors only, which is smaller."),
        Flag(),
    ] = "dense"
    save_every: Annotated[
        int | None,
        Field(ge=1, description="Steps between saved states. Default: ten minutes."),
        Flag(panel=SAVING),
    ] = None
    eval_every: Annotated[
        int | None,
        Field(ge=1, description="Steps between perplexities of the sparse model."),
        Flag(panel=SAVING),
    ] = None
    eval_text: Annotated[
        str | None,
        Field(description="Text for them. Default: the held-out part of builtin."),
        Flag(panel=SAVING, metavar="source", completes="windows"),
    ] = None
    seed: Annotated[
        int, Field(description="Seed of everything that is drawn."), Flag(panel=TRAINING)
    ] = 0
    device: Device = "auto"
    dtype: Annotated[
        Literal["auto", "float32"],
        Word(str, _dtype),
        Field(description="Type of weights in training."),
        Flag(panel=WHERE),
    ] = "auto"
    mixed_precision: Annotated[
        Literal["no", "bf16"],
        Field(description="bf16: multiply in bfloat16, keep weights in float32."),
        Flag(panel=WHERE),
    ] = "no"

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what does not go together."""
        known = [*methods.names("recoverers"), AUTO]
        if self.method not in known:
            raise UsageError(f"no method {self.method!r}", did_you_mean(self.method, known))
        if self.method != AUTO:
            methods.check("recoverers", self.method, self.option)
        elif self.option:
            raise UsageError(
                f"option {next(iter(self.option))!r} does not go with --method {AUTO}",
                "name the method that has it",
            )
        self.corpus(0).check()
        if self.eval_text is not None:
            check_source(self.eval_text)
            if self.eval_text == "self":
                raise UsageError("--eval-text takes no text of the model itself", "as builtin")
            if self.eval_every is None:
                raise UsageError("--eval-text has no effect without --eval-every")
        self._check_numbers()
        if self.format == "factored" and self.slorb is None:
            raise UsageError("--format factored has no effect without --slorb", "leave it out")
        return self

    def _check_numbers(self) -> None:
        if (self.tokens is None) == (self.max_time is None):
            raise UsageError(
                "recover needs to know how long: either --tokens or --max-time"
                + (", not both" if self.tokens is not None else ""),
                "as --tokens 20M, or --max-time 30m",
            )
        if self.data == "self" and self.tokens is None:
            raise UsageError(
                "--data self needs to know how much to sample", "give --tokens, not --max-time"
            )
        if self.tokens is not None and self.tokens < self.step_tokens:
            raise UsageError(
                f"--tokens {self.tokens} is less than one step of {self.step_tokens}",
                "give more tokens, or a smaller --batch, --length or --accumulate",
            )
        if self.lr is not None and not 0 < self.lr < 1:
            raise UsageError(f"--lr must be between 0 and 1, not {self.lr:g}", "1e-4 is usual")
        if self.kl_weight is not None and not 0 <= self.kl_weight <= 1:
            raise UsageError(f"--kl-weight must be between 0 and 1, not {self.kl_weight:g}")
        if self.kl_weight == 0 and self.teacher_top is not None:
            raise UsageError("--teacher-top has no effect with --kl-weight 0", "leave it out")
        if self.kl_weight == 0 and self.teacher and self.slorb is None and self.data != "self":
            raise UsageError("--teacher has no effect with --kl-weight 0", "leave it out")
        if not 0 < self.temperature < 100:
            raise UsageError(f"--temperature must be between 0 and 100, not {self.temperature:g}")

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.length * self.accumulate

    def steps(self) -> int:
        """How many steps the tokens make."""
        return ceil((self.tokens or 0) / self.step_tokens)

    def corpus(self, tokens: int | None) -> Corpus:
        """The rows, of at most so many tokens."""
        return Corpus(source=self.data, length=self.length, tokens=tokens, seed=self.seed)


def rate_at(schedule: Schedule, step: int, steps: int) -> float:
    """The learning rate of a step as a share of the largest.

    All but `constant` rise for the first 4 % of the steps. `flat` falls to 0 in the last 10 %,
    `cosine` to 10 % and `linear` to 0 over the whole.

    Raises:
        ValueError: `auto`, which stands for another one.
    """
    if schedule == AUTO:
        raise ValueError("no schedule was chosen")
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
