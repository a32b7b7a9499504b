"""The command `lobra`: a table of commands, each imported only when it runs, and the one place where errors are shown.

A command's module ends its `--help` with an example by click's `epilog="\\b\\nExample:\\n  lobra ..."`.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import click

from lobra_jax import __version__
from planner.errors import UserError

XLA_LOG_LEVEL = ("TF_CPP_MIN_LOG_LEVEL", "2")
"""Errors only, unless the variable is set: XLA warns of what is no concern of a user, such as that a program compiles
for long or has an array larger than others, in up to thousands of lines. JAX's own choice is 1, warnings too."""

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandEntry:
    """Where a command lives ("module:object") and the line that `lobra --help` shows for it."""

    target: str
    help: str


COMMANDS: Mapping[str, CommandEntry] = {
    "demo": CommandEntry(
        target="lobra_jax.commands.demo:demo",
        help="Run everything below on built-in tasks and simulated devices.",
    ),
    "tokenize": CommandEntry(
        target="lobra_jax.commands.tokenize:tokenize",
        help="Turn text into the token cache and print length statistics.",
    ),
    "profile": CommandEntry(
        target="profiling.cli:profile",
        help="Measure parallel configs on these devices into a cost table.",
    ),
    "plan": CommandEntry(
        target="lobra_jax.commands.plan:plan",
        help="Choose the replicas that finish a step soonest and write a plan.",
    ),
    "explain": CommandEntry(
        target="planner.cli:explain",
        help="Say why a plan has these replicas and what limits its step.",
    ),
    "simulate": CommandEntry(
        target="planner.cli:simulate",
        help="Dispatch sampled batches on a plan without devices.",
    ),
    "train": CommandEntry(
        target="lobra_jax.commands.train:train",
        help="Train every task's adapter jointly on the planned replicas.",
    ),
    "trace": CommandEntry(
        target="profiling.trace.cli:trace",
        help="Say where the time of traced steps went.",
    ),
    "export": CommandEntry(
        target="lobra_jax.commands.export:export",
        help="Write one task's adapter as PEFT reads it, or the merged model.",
    ),
    "bench": CommandEntry(
        target="profiling.bench.cli:bench",
        help="Measure speed and memory on these devices.",
    ),
}
"""Every command, in the order of a first use."""


class LazyGroup(click.Group):
    """Commands from a table: listing them imports none of their modules; mistakes end as one line and a status."""

    def __init__(self, *args: Any, entries: Mapping[str, CommandEntry], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.entries:
            return None
        module, _, attribute = self.entries[cmd_name].target.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self.entries.items()])

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """As click's, but every user's mistake ends as one line on stderr and exit status 2."""
        os.environ.setdefault(*XLA_LOG_LEVEL)  # before a command's module imports JAX
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        try:
            result = super().main(*args, standalone_mode=False, **kwargs)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(EXIT_USER_ERROR)
        except click.UsageError as error:
            hint = "" if error.ctx is None else f"; see {error.ctx.command_path} --help"
            _fail(f"{error.format_message().rstrip('.')}{hint}", error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), EXIT_USER_ERROR)
        except UserError as error:
            _fail(str(error), EXIT_USER_ERROR)
        except click.Abort:
            _fail("interrupted", EXIT_INTERRUPTED)
        sys.exit(result if isinstance(result, int) else 0)


def _fail(message: str, status: int) -> NoReturn:
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(status)


@click.group(
    cls=LazyGroup,
    entries=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExample:\n  lobra demo --out demo_out\n  lobra COMMAND --help",
)
@click.version_option(__version__, prog_name="lobra", message="%(prog)s %(version)s")
def main() -> None:
    """Train many LoRA adapters jointly over one frozen model, on replicas of unlike shape."""
