"""Commands made from the options of a verb, with help in groups."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from sparsekit.cli import complete
from sparsekit.cli.console import VERB
from sparsekit.cli.options import RUNNING, named
from sparsekit.pipeline.options import GUESSES, WHAT, WHERE, Options, choices_of, flag_of, word_type

Config = TypeVar("Config", bound=Options)
# typer bundles click, whose exceptions it does not name.
ClickUsageError: Any = typer.BadParameter.__base__


# Characters of a summary, which the help wraps.
SUMMARY = 200


class Command(TyperCommand):
    """A command whose help shows its options by panel, and whose errors name it."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options by panel."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            panel = getattr(parameter, "rich_help_panel", None) or RUNNING
            panel = "Arguments" if parameter.param_type_name == "argument" else panel
            if record is not None:
                panels.setdefault(panel, []).append(record)
        ranks = {"Arguments": 0, WHAT: 1, WHERE: 3, RUNNING: 4}
        for title, records in sorted(panels.items(), key=lambda panel: ranks.get(panel[0], 2)):
            with formatter.section(title):
                formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; for a flag of other tools, suggest the flag of sparsekit."""
        try:
            return super().parse_args(ctx, args)
        except ClickUsageError as error:
            guess = getattr(error, "option_name", None) or ""
            option, value = GUESSES.get(guess.lstrip("-"), ("", ""))
            if any(parameter.name == option for parameter in self.params):
                error.message = f"{error.message}; use --{option} {value}"
                error.possibilities = None
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        token = VERB.set(ctx.command_path.partition(" ")[2])
        try:
            return super().invoke(ctx)
        finally:
            VERB.reset(token)


class Group(TyperGroup):
    """Commands whose help shows whole summaries."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands with their whole summaries."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(n, command.get_short_help_str(SUMMARY)) for n, command in commands]
            )

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands in the order of their definition."""
        return list(self.commands)


def takes(
    config: type[Options],
    *,
    only: Sequence[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that replaces the `**words` of a command with the options of a verb as flags.

    Args:
        config: Options. The body receives the given ones as written.
        only: Names of the options that the command has; empty: all.
        defaults: Defaults that differ from those of the verb.
    """
    names = [name for name in config.model_fields if not only or name in only]

    def wrap(body: Callable[..., None]) -> Callable[..., None]:
        written = inspect.signature(body, eval_str=True).parameters.values()
        fixed = [p.replace(kind=p.KEYWORD_ONLY) for p in written if p.kind is not p.VAR_KEYWORD]
        required = [p for p in fixed if p.default is p.empty]
        optional = [p for p in fixed if p.default is not p.empty]
        context = inspect.Parameter(
            "context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context
        )
        flags = [_parameter(config, name, defaults) for name in names]

        def command(context: typer.Context, **values: Any) -> None:
            given = {n for n in names if n in defaults or _is_given(context, n)}
            body(**{k: v for k, v in values.items() if k not in names or k in given})

        command.__name__, command.__doc__ = body.__name__, body.__doc__
        command.__module__ = body.__module__
        parameters = [context, *required, *flags, *optional]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return wrap


def read(config: type[Config], words: Mapping[str, Any]) -> Config:
    """Parse the options of a command line.

    Raises:
        UsageError: An option is invalid.
        DataError: An option names a file or model that does not exist.
    """
    models = {name: named(word) for name, word in words.items() if flag_of(config, name).model}
    return config(**{**words, **models})


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _parameter(config: type[Options], name: str, defaults: Mapping[str, Any]) -> inspect.Parameter:
    """Parameter from which typer makes the flag of an option."""
    field, flag = config.model_fields[name], flag_of(config, name)
    first, optional = _first(word_type(config, name))
    choices = choices_of(field.annotation) if get_origin(field.annotation) is Literal else ()
    metavar = f"<{flag.metavar}>" if flag.metavar else None
    metavar = f"[{'|'.join(choices)}]" if choices else metavar
    option = typer.Option(
        *flag.spelling,
        help=field.description,
        metavar=metavar,
        autocompletion=_completion(config, name, choices),
        rich_help_panel=flag.panel,
    )
    default = defaults.get(name, field.default)
    default = list(default) if isinstance(default, tuple) else default
    kind = {int: int, float: float, bool: bool}.get(first, str)
    if isinstance(default, list):
        kind = list[str]
    annotation = Annotated[kind | None if optional else kind, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _first(written: Any) -> tuple[Any, bool]:
    """Type of an option on the command line, and whether it is optional."""
    if get_origin(written) is Literal or not get_args(written):
        return written, False
    kinds = get_args(written)
    return kinds[0], type(None) in kinds


def _completion(config: type[Options], name: str, choices: Sequence[str]) -> Any:
    """Shell completion of an option; None: none."""
    flag = flag_of(config, name)
    if choices:
        return complete.words(*choices)
    if flag.methods:
        return complete.names(*flag.methods, before=flag.before)
    return getattr(complete, flag.completes) if flag.completes else None
