"""What `recover` is asked to do, checked without torch so that a wrong word answers at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, cos, pi
from typing import Literal, get_args

from sparsekit import registry as methods
from sparsekit.errors import UsageError, did_you_mean
from sparsekit.pipeline.options import DEVICES, MethodOptions, count, one_of, parsed, seconds
from sparsekit.text.sources import check_source
from sparsekit.text.training_rows import Corpus
from sparsekit.weights.patterns import Pattern

Metric = Literal["magnitude", "activation"]
Precision = Literal["no", "bf16"]
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


@dataclass(frozen=True, kw_only=True)
class RecoverConfig:
    """The options of `recover`; the command's flags have the same names and defaults."""

    method: str = AUTO
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of the method, as text."""
    data: str = "builtin"
    """Where the text to train on comes from."""
    teacher: str | None = None
    """The dense model; None: the one that the model's history names, or the model itself."""
    tokens: int | None = None
    """How many tokens are trained on, rounded up to whole steps."""
    max_time: float | None = None
    """Seconds that the run may take; the number of steps is planned from the measured speed."""
    pattern: str | None = None
    """None: that of the model's history, `2:4` for a dense model."""
    skip: Sequence[str] = ()
    """Globs of weights that stay dense."""
    metric: Metric = "magnitude"
    """What makes an entry large: |w|, or |w| times the norm of its input in the first batches."""
    batch: int = 2
    """Rows in one forward pass."""
    length: int = 512
    """Tokens in a row."""
    accumulate: int = 1
    """Forward passes in one step."""
    lr: float | None = None
    """The largest learning rate; None: the method's choice by the size of the model."""
    schedule: Schedule = "auto"
    share: float | None = None
    """Share of the divergence from the teacher in the loss; None: by the size of the model."""
    temperature: float = 1.0
    teacher_top: int | None = None
    """How many of the teacher's largest probabilities of each token the loss looks at; they are
    kept on disk. None: it looks at all of them, which are computed again each time."""
    slorb: int | None = None
    """Inputs of a span of the low-rank branches beside the sparse weights; None: no branches."""
    format: Literal["dense", "factored"] = "dense"
    """Whether a weight with a branch is written as their sum too, or as factors only."""
    save_every: int | None = None
    """Steps between two saved states; None: about ten minutes."""
    eval_every: int | None = None
    """Steps between two evaluations; None: none."""
    eval_text: str | None = None
    """What is evaluated on; None: the held-out part of `builtin`."""
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    mixed_precision: Precision = "no"
    """`bf16`: forward and backward passes multiply in bfloat16; weights, gradients and moments stay
    float32."""

    def check(self) -> None:
        """Refuse what is wrong whatever the model is.

        Raises:
            UsageError: An unknown method, option, schedule, pattern or device, or a number out of
                range.
            DataError: The data cannot be used.
        """
        known = [*methods.names("recoverers"), AUTO]
        if self.method not in known:
            raise UsageError(f"no method {self.method!r}", did_you_mean(self.method, known))
        if self.method != AUTO:
            methods.check("recoverers", self.method, self.options)
        elif self.options:
            raise UsageError(
                f"option {next(iter(self.options))!r} does not go with --method {AUTO}",
                "name the method that has it",
            )
        if self.schedule not in SCHEDULES:
            raise UsageError(
                f"no schedule {self.schedule!r}", did_you_mean(self.schedule, SCHEDULES)
            )
        if self.pattern is not None:
            Pattern.parse(self.pattern)
        one_of("--metric", self.metric, get_args(Metric))
        self.corpus(0).check()
        if self.eval_text is not None:
            check_source(self.eval_text)
            if self.eval_text == "self":
                raise UsageError("--eval-text takes no text of the model itself", "as builtin")
            if self.eval_every is None:
                raise UsageError("--eval-text has no effect without --eval-every")
        self._check_numbers()
        one_of("--format", self.format, ("dense", "factored"))
        if self.format == "factored" and self.slorb is None:
            raise UsageError("--format factored has no effect without --slorb", "leave it out")
        one_of("--device", self.device, DEVICES)
        if self.dtype in ("bfloat16", "float16"):
            raise UsageError(
                f"--dtype {self.dtype}: steps of training are smaller than the resolution of "
                "16-bit weights, and would be lost",
                "leave it out, or multiply in 16 bits beside weights of 32: --mixed-precision bf16",
            )
        one_of("--dtype", self.dtype, ("auto", "float32"))
        one_of("--mixed-precision", self.mixed_precision, get_args(Precision))

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
        counts = ("tokens", "batch", "accumulate", "teacher_top", "slorb")
        for name in (*counts, "save_every", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.tokens is not None and self.tokens < self.step_tokens:
            raise UsageError(
                f"--tokens {self.tokens} is less than one step of {self.step_tokens}",
                "give more tokens, or a smaller --batch, --length or --accumulate",
            )
        if self.lr is not None and not 0 < self.lr < 1:
            raise UsageError(f"--lr must be between 0 and 1, not {self.lr:g}", "1e-4 is usual")
        if self.share is not None and not 0 <= self.share <= 1:
            raise UsageError(f"--share must be between 0 and 1, not {self.share:g}")
        if self.share == 0 and self.teacher_top is not None:
            raise UsageError("--teacher-top has no effect with --share 0", "leave it out")
        if self.share == 0 and self.teacher and self.slorb is None and self.data != "self":
            raise UsageError("--teacher has no effect with --share 0", "leave it out")
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


def recover_config(
    *,
    method: str = "auto",
    data: str = "builtin",
    tokens: str | int | None = None,
    max_time: str | None = None,
    teacher: str | None = None,
    pattern: str | None = None,
    option: MethodOptions = (),
    skip: Sequence[str] = (),
    metric: str = "magnitude",
    batch: int = 2,
    length: int = 512,
    accumulate: int = 1,
    lr: float | None = None,
    schedule: str = "auto",
    share: float | None = None,
    temperature: float = 1.0,
    teacher_top: int | None = None,
    slorb: int | None = None,
    format: str = "dense",
    save_every: int | None = None,
    eval_every: int | None = None,
    eval_text: str | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    mixed_precision: str = "no",
) -> RecoverConfig:
    """The checked configuration that the words of `recover` spell.

    Raises:
        UsageError: A word is not one that can be used, or has no effect.
        DataError: The data cannot be used.
    """
    config = RecoverConfig(
        method=method,
        options=parsed(option),
        data=data,
        teacher=teacher,
        tokens=None if tokens is None else count(str(tokens)),
        max_time=None if max_time is None else seconds(max_time, "--max-time"),
        pattern=pattern,
        skip=skip,
        metric=metric,  # type: ignore[arg-type]  (check() refuses other words)
        batch=batch,
        length=length,
        accumulate=accumulate,
        lr=lr,
        schedule=schedule,  # type: ignore[arg-type]  (the same)
        share=share,
        temperature=temperature,
        teacher_top=teacher_top,
        slorb=slorb,
        format=format,  # type: ignore[arg-type]  (the same)
        save_every=save_every,
        eval_every=eval_every,
        eval_text=eval_text,
        seed=seed,
        device=device,
        dtype=dtype,
        mixed_precision=mixed_precision,  # type: ignore[arg-type]  (the same)
    )
    config.check()
    return config
