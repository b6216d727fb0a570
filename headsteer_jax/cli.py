"""The command line: the commands, their flags, and what ends the program.

Exit codes: 0; 2 after one line that says what is wrong; 75 when SIGTERM stopped it, and the same command goes on.
"""

import argparse
import functools
import importlib.resources
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headsteer_jax.config import Config, load_config
from headsteer_jax.config.files import describe_field, flatten, render_reference
from headsteer_jax.errors import HeadSteerError
from headsteer_jax.runtime import preemption

DEFAULT_CONFIG = "double_digits"
ABOUT = """Train a gated vision transformer, learn its concepts with a sparse autoencoder, steer its heads, report.

commands:
  run      train, learn concepts, steer and report; start here
  export   write a run's model or autoencoders for timm, SAELens or overcomplete
  page     write a run's pages again, or a results page for the documentation
  config   show, explain or check a config, or write the reference of all fields

headsteer COMMAND --help explains a command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and end the program with its exit code."""
    code = run_command_line(sys.argv[1:] if arguments is None else arguments)
    if not code:
        return
    if "headsteer_jax.runtime.hosts" in sys.modules:
        sys.modules["headsteer_jax.runtime.hosts"].wait_before_exit()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: libraries' threads and exit handlers would bury the line under their own tracebacks


def run_command_line(arguments: Sequence[str]) -> int:
    """Run one command; every mistake of the user's is one line. Returns the exit code."""
    preemption.install_handler()
    _silence_libraries()
    try:
        name, *rest = arguments or ["--help"]
        if name in ("-h", "--help"):
            print(f"usage: headsteer COMMAND [flags]\n\n{ABOUT}")
        elif name == "--version":
            from headsteer_jax import __version__

            print(__version__)
        elif name in COMMANDS:
            COMMANDS[name](rest)
        else:
            raise HeadSteerError(f"{name}: no such command; allowed are {', '.join(COMMANDS)}")
    except HeadSteerError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except preemption.Preempted:
        print(preemption.STOPPED_MESSAGE, file=sys.stderr)
        return preemption.EXIT_CODE
    except Exception:
        traceback.print_exc()
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _silence_libraries() -> None:
    """Keep libraries from printing errors that are raised here and become one line.

    Orbax logs every save, and a failed one once for each array; its threads print what they raise.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    default = sys.excepthook
    sys.excepthook = lambda *error: default(*error) if threading.current_thread() is threading.main_thread() else None


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are."""

    def __init__(self, command: str, about: str, epilog: str = "", usage: str | None = None) -> None:
        super().__init__(
            prog=f"headsteer {command}", usage=usage, allow_abbrev=False, description=about, epilog=epilog,
            formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=100),
        )  # fmt: skip

    def error(self, message: str) -> Any:
        raise HeadSteerError(f"{message}; {self.prog} --help lists what there is")

    def parse_with_overrides(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
        """Parse flags, and overrides of config fields: dotted path -> text.

        Raises:
          HeadSteerError: an unknown flag.
        """
        flags, rest = self.parse_known_args(arguments)
        overrides = {}
        for argument in rest:
            name, equals, value = argument.partition("=")
            if not name.startswith("--config.") or not equals:
                raise HeadSteerError(
                    f"{argument}: no such flag; fields are set by --config.FIELD=VALUE (see {self.prog} --help)"
                )
            overrides[name.removeprefix("--config.")] = value
        return flags, overrides


def command_run(arguments: Sequence[str]) -> None:
    """Headsteer run: the stages of an experiment."""
    parser = Parser(
        "run", "Train a gated vision transformer, learn its concepts, steer its heads, report.",
        "A config's fields: headsteer config --explain=FIELD, or docs/reference/configuration.md",
        "headsteer run [flags] [--config.FIELD=VALUE ...]",
    )  # fmt: skip
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="a shipped config's name, or a file (%(default)s)")
    parser.add_argument("--config.FIELD", metavar="VALUE", dest="_field", help="set any field of the config")
    parser.add_argument("--workdir", metavar="DIR", help="where everything is written (runs/NAME)")
    parser.add_argument("--stages", metavar="A,B", help="of train, sae, grid, steer, layers, report (all but grid)")
    parser.add_argument("--seed", help="short for --config.seed")
    parser.add_argument("--overwrite", action="store_true", help="make stages again whose config changed")
    parser.add_argument("--profile", action="store_true", help="short for --config.machine.profile=true")
    parser.add_argument(
        "--distributed", default="", metavar="auto|HOST:PORT,N,I", help="join a cluster as process I of N"
    )
    parser.add_argument("--distributed-timeout", type=int, default=300, metavar="SECONDS", help="for all to join (300)")
    flags, overrides = parser.parse_with_overrides(arguments)
    if flags.seed is not None:
        overrides = {"seed": flags.seed} | overrides
    if flags.profile:
        overrides["machine.profile"] = "true"
    config = load_config(find_config(flags.config), overrides)
    workdir = flags.workdir or str(Path("runs") / Path(flags.config).stem)
    sys.path.append(os.getcwd())  # a strategy `module:function` may lie beside the command

    from headsteer_jax.runtime import hosts  # JAX is imported only once the flags are known to be right
    from headsteer_jax.stages import STAGES, run_stages

    default = [name for name, stage in STAGES.items() if stage.by_default]
    names = default if flags.stages is None else flags.stages.split(",")
    for name in names:
        if name not in STAGES:
            raise HeadSteerError(
                f"--stages={flags.stages}: there is no stage {name!r}; allowed are {', '.join(STAGES)}"
            )
    _start(flags.distributed, flags.distributed_timeout)
    same = {f"--{name}": json.dumps(value) for name, value in vars(flags).items() if not name.startswith("distributed")}
    hosts.check_equal(same)
    run_stages(config, _workdir(workdir), tuple(names), flags.overwrite)
    report = _workdir(workdir) / "report.html"
    if hosts.is_first_process() and report.exists():
        print(report)


def command_export(arguments: Sequence[str]) -> None:
    """Headsteer export: a run's model or autoencoders for other libraries."""
    parser = Parser(
        "export", "Write a finished run's model or autoencoders in the format of another library.",
        "targets:\n"
        "  timm:FILE.safetensors  the backbone and classifier under timm's names, without the gates\n"
        "  saelens:DIR            an SAELens directory for each autoencoder: DIR/seed_0, ...\n"
        "  overcomplete:DIR       an overcomplete state_dict for each: DIR/seed_0.safetensors, ...",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="the run's directory")
    parser.add_argument("targets", metavar="TARGET", nargs="+", help="LIBRARY:PATH, see below")
    flags = parser.parse_args(list(arguments))

    from headsteer_jax.data.sources import load_dataset
    from headsteer_jax.deploy.export import export_autoencoders, export_timm, parse_target
    from headsteer_jax.runs import check_done, read_config
    from headsteer_jax.sae.store import read_autoencoders
    from headsteer_jax.train.loop import load_trained

    targets = [parse_target(target) for target in flags.targets]
    workdir = _workdir(flags.run)
    config = read_config(workdir)
    for library, _ in targets:
        check_done(config, workdir, "train" if library == "timm" else "sae", "headsteer export")
    _start()
    dataset = load_dataset(config.data, config.seed, config.machine.image_memory)
    trained = load_trained(config, dataset, workdir / "train")
    for library, path in targets:
        if library == "timm":
            export_timm(trained, path)
        else:
            export_autoencoders(trained, read_autoencoders(workdir, trained)[0], library, path, workdir.name)
        print(path)


def command_page(arguments: Sequence[str]) -> None:
    """Headsteer page: a run's pages from what its stages saved."""
    parser = Parser("page", "Write the pages of a finished run again, from what its stages saved.")
    parser.add_argument("run", metavar="RUN", help="the run's directory")
    parser.add_argument("--output", metavar="DIR", help="where report.html, latents.html and figures/ go (the run's)")
    parser.add_argument("--results", metavar="PAGE.md", help="write a results page for the documentation instead")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="with --results: the config that the run began with")
    flags = parser.parse_args(list(arguments))

    from etils import epath

    from headsteer_jax.data.sources import load_dataset
    from headsteer_jax.report.page import write_pages
    from headsteer_jax.report.results import write_results
    from headsteer_jax.runs import check_done, read_config

    workdir = _workdir(flags.run)
    config = read_config(workdir)
    check_done(config, workdir, "report", "headsteer page")
    if flags.results:
        write_results(workdir, epath.Path(flags.results), flags.config, load_config(find_config(flags.config)))
        print(flags.results)
        return
    _start()
    dataset = load_dataset(config.data, config.seed, config.machine.image_memory)
    output = epath.Path(flags.output) if flags.output else workdir.path
    write_pages(config, dataset, workdir, output)
    print(output / "report.html")


def command_config(arguments: Sequence[str]) -> None:
    """Headsteer config: show, explain, check, or write the reference."""
    parser = Parser("config", "Show a config with its overrides, one field a line; or explain, check, or write a page.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="a shipped config's name, or a file (%(default)s)")
    parser.add_argument("--config.FIELD", metavar="VALUE", dest="_field", help="set any field of the config")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--explain", metavar="FIELD", help="what a field, or every field of a section, means")
    what.add_argument("--check", action="store_true", help="say whether the config is right, and nothing else")
    what.add_argument("--reference", metavar="PAGE.md", help="write a page with every field")
    flags, overrides = parser.parse_with_overrides(arguments)
    if flags.explain:
        print(describe_field(flags.explain))
        return
    if flags.reference:
        from headsteer_jax.runtime.files import write_text

        write_text(flags.reference, render_reference() + "\n")
        print(flags.reference)
        return
    config = load_config(find_config(flags.config), overrides)
    _check_names(config)
    if flags.check:
        print(f"{flags.config}: right")
        return
    for path, value in flatten(config).items():
        print(f"{path} = {json.dumps(value)}")


COMMANDS = {"run": command_run, "export": command_export, "page": command_page, "config": command_config}


def find_config(name: str) -> Path:
    """Find a config: a file as it is given, else one that ships with the package, by its name.

    Raises:
      HeadSteerError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = _shipped_configs()
    stem = Path(name).name.removesuffix(".py")
    if stem in shipped and name in (stem, f"{stem}.py", f"configs/{stem}.py"):
        return shipped[stem]
    raise HeadSteerError(f"--config={name}: no such file; the configs that ship are {', '.join(sorted(shipped))}")


def _shipped_configs() -> dict[str, Path]:
    """Configs by name: of the wheel, or of the clone that this package lies in."""
    package = Path(str(importlib.resources.files("headsteer_jax")))
    directories = (package / "configs", package.parent / "configs")
    files = [file for directory in directories for file in directory.glob("*.py") if file.stem != "__init__"]
    return {file.stem: file for file in reversed(files)}


def _check_names(config: Config) -> None:
    """Check what the config's own checks cannot know: names of data sources and strategies."""
    from headsteer_jax.data.sources import check_source
    from headsteer_jax.steer.strategies import find_strategy

    sys.path.append(os.getcwd())
    check_source(config.data)
    for name in config.steer.strategies:
        find_strategy(name)


def _workdir(path: str) -> Any:
    from etils import epath

    from headsteer_jax.runtime.files import Workdir

    return Workdir(epath.Path(path))


def _start(distributed: str = "", timeout: int = 300) -> None:
    """Join the cluster if there is one, keep compiled programs, and show the log."""
    from headsteer_jax.runtime import hosts
    from headsteer_jax.runtime.compiled import keep_compiled_programs
    from headsteer_jax.runtime.progress import show_log

    hosts.start(distributed, timeout)
    keep_compiled_programs()
    show_log()
