import importlib
import json
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from lobra_jax import __version__
from lobra_jax.cli import COMMANDS, CommandEntry, LazyGroup, main
from planner.errors import UserError

MODULE = "lobra_cli_test_commands"


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> LazyGroup:
    """A group with one good command, one that a user broke, one that we broke and one that is interrupted."""

    @click.command()
    @click.option("--num", type=int, default=1)
    def good(num: int) -> None:
        click.echo(f"num {num}")

    @click.command()
    def mistaken() -> None:
        raise UserError("bad value", file="run.yaml", key="tasks[0].rank", value=0, expected="an integer\n >= 1")

    @click.command()
    def broken() -> None:
        raise AssertionError("ours")

    @click.command()
    def interrupted() -> None:
        raise KeyboardInterrupt

    @click.command()
    @click.pass_context
    def unhappy(ctx: click.Context) -> None:
        ctx.exit(5)

    commands = {"good": good, "mistaken": mistaken, "broken": broken, "interrupted": interrupted, "unhappy": unhappy}
    module = type(sys)(MODULE)
    for name, command in commands.items():
        setattr(module, name, command)
    monkeypatch.setitem(sys.modules, MODULE, module)
    entries = {name: CommandEntry(target=f"{MODULE}:{name}", help=f"The {name} one.") for name in commands}
    entries["absent"] = CommandEntry(target="no_such_module:absent", help="Its module does not import.")
    return LazyGroup("main", entries=entries)


def test_help_lists_every_command_and_imports_none_of_them() -> None:
    program = (
        "import sys, json\n"
        "from lobra_jax.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: status = end.code\n"
        "print(json.dumps([status, sorted(sys.modules)]))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    text, _, last = output.rstrip().rpartition("\n")
    status, modules = json.loads(last)
    assert status == 0
    for name, entry in COMMANDS.items():
        assert any(line.startswith(f"  {name} ") and entry.help[:30] in line for line in text.splitlines())
        assert entry.target.partition(":")[0] not in modules
    assert not {"jax", "numba", "scipy", "pyscipopt", "matplotlib", "tokenizers", "numpy"} & set(modules)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_an_example(name: str) -> None:
    module, _, attribute = COMMANDS[name].target.partition(":")
    command = getattr(importlib.import_module(module), attribute)
    result = CliRunner().invoke(main, [name, "--help"], prog_name="lobra")
    assert result.exit_code == 0, result.output
    assert command.name == name
    assert "Example" in result.output
    assert f"  lobra {name}" in result.output.split("Example", 1)[1]


def test_version_is_printed() -> None:
    result = CliRunner().invoke(main, ["--version"], prog_name="lobra")
    assert (result.exit_code, result.output) == (0, f"lobra {__version__}\n")


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "lobra_jax", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"lobra {__version__}\n"


@pytest.mark.parametrize(("given", "level"), [(None, "2"), ("0", "0")])
def test_xla_says_only_what_went_wrong_unless_it_is_asked_for_more(group, monkeypatch, given, level) -> None:
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    if given is None:
        monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    else:
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", given)
    assert CliRunner().invoke(group, ["good"]).exit_code == 0
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == level


def test_a_users_mistake_is_one_line_on_stderr_and_status_2(group: LazyGroup) -> None:
    result = CliRunner().invoke(group, ["mistaken"])
    assert result.exit_code == 2
    assert result.stderr == "error: run.yaml: tasks[0].rank: bad value (got 0); expected an integer >= 1\n"
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["good", "--nun", "3"], "--nun"),
        (["good", "--num", "three"], "'three' is not a valid integer"),
        (["goof"], "'goof'"),
        (["--unknown"], "--unknown"),
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(group: LazyGroup, arguments: list[str], fragment: str) -> None:
    result = CliRunner().invoke(group, arguments, prog_name="lobra")
    assert result.exit_code == 2
    assert fragment in result.stderr
    assert result.stderr.startswith("error: ")
    assert "lobra" in result.stderr  # where to find help
    assert result.stderr.count("\n") == 1


def test_an_interrupt_ends_with_the_shells_status(group: LazyGroup) -> None:
    result = CliRunner().invoke(group, ["interrupted"])
    assert result.exit_code == 130
    assert result.stderr.strip() == "error: interrupted"


def test_our_own_faults_are_not_dressed_up_as_the_users(group: LazyGroup) -> None:
    result = CliRunner().invoke(group, ["broken"])
    assert isinstance(result.exception, AssertionError)


def test_a_good_command_runs_and_a_chosen_status_is_kept(group: LazyGroup) -> None:
    good = CliRunner().invoke(group, ["good", "--num", "4"])
    assert (good.exit_code, good.stdout) == (0, "num 4\n")
    assert CliRunner().invoke(group, ["unhappy"]).exit_code == 5


def test_a_command_whose_module_is_missing_fails_loudly(group: LazyGroup) -> None:
    assert isinstance(CliRunner().invoke(group, ["absent"]).exception, ModuleNotFoundError)
