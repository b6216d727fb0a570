"""The command line: its commands and their flags, and how the program ends.

The exit code is 0 on success, 2 after one line that says what is wrong, 75 if SIGTERM stopped the program (the same
command then continues), 130 if Ctrl-C did, and 1 after an unexpected error, with a traceback, or if a run of a study
failed.
"""

import argparse
import functools
import importlib
import importlib.resources
import io
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

from headsteer_jax.config import Config, load_config
from headsteer_jax.config.files import describe_field, flatten, render_reference
from headsteer_jax.config.paths import expand_path
from headsteer_jax.errors import HeadSteerError, explain_errors
from headsteer_jax.runtime import preemption

DEFAULT_CONFIG = "double_digits"
CONFIG_HELP = "a shipped config's name, or a file (default: %(default)s)"
RUN_HELP = "the run's directory, or hf://owner/name"
HELP = """Train a gated vision transformer, find concepts with a sparse autoencoder, steer its heads, and report.

commands:
  run      train, learn concepts, steer and report (start here)
  study    run an experiment with several training seeds, and report on all of them
  export   write a run's model or autoencoders for timm, SAELens or overcomplete
  deploy   write a smaller model for the classes you see, as safetensors, StableHLO and ONNX
  predict  answer for image files with a run or a deployed model: class, heads, latents, steering
  page     write a run's pages again, or a results page for the documentation
  push     write a run to the Hugging Face hub, from where load_run("hf://owner/name") reads it
  config   show, explain or check a config, or write the reference of all fields
  compile  compile a run's programs for a TPU that is not there: time, memory, cost

headsteer COMMAND --help explains a command; headsteer --version prints the version."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and end the program with its exit code."""
    code = run_command_line(sys.argv[1:] if arguments is None else arguments)
    if not code:
        return
    if "headsteer_jax.runtime.hosts" in sys.modules:
        sys.modules["headsteer_jax.runtime.hosts"].wait_before_exit()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a normal exit would let libraries' threads and exit handlers bury the line under tracebacks


def run_command_line(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; an error outside the program is one line on standard error."""
    preemption.install_handler()
    _silence_libraries()
    for stream in (sys.stdout, sys.stderr):  # a path or class name that the terminal cannot show is shown escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        name, *command_arguments = arguments or ["--help"]
        if name in ("-h", "--help"):
            print(f"usage: headsteer COMMAND [flags]\n\n{HELP}")
        elif name == "--version":
            from headsteer_jax import __version__

            print(__version__)
        elif name in COMMANDS:
            with explain_errors(f"headsteer {name}"):
                return COMMANDS[name](command_arguments) or 0
        else:
            raise HeadSteerError(f"{name}: no such command; choose from {', '.join(COMMANDS)}")
    except HeadSteerError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except preemption.Preempted:
        print(preemption.STOPPED_MESSAGE, file=sys.stderr)
        return preemption.EXIT_CODE
    except BrokenPipeError:  # what read the output, `head` for instance, has ended
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 128 + signal.SIGPIPE
    except Exception:
        traceback.print_exc()
        return 1
    except KeyboardInterrupt:
        resumes = (
            ": the same command continues from the last checkpoint"
            if arguments and arguments[0] in ("run", "study")
            else ""
        )
        print(f"interrupted{resumes}", file=sys.stderr)
        return 130
    return 0


def _silence_libraries() -> None:
    """Keep libraries from printing errors that are also raised here, where they become one line.

    Orbax logs every save, and a failed save once for each array; its threads print what they raise.
    """
    if not sys.stderr.isatty():  # it is read when huggingface_hub is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("absl", "asyncio", "matplotlib", "gcsfs", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    default = sys.excepthook
    sys.excepthook = lambda *error: default(*error) if threading.current_thread() is threading.main_thread() else None


class Parser(argparse.ArgumentParser):
    """A parser of one command's flags that raises HeadSteerError instead of ending the program."""

    def __init__(self, command: str, description: str, epilog: str = "", usage: str | None = None) -> None:
        super().__init__(
            prog=f"headsteer {command}", usage=usage, allow_abbrev=False, description=description, epilog=epilog,
            formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=100),
        )  # fmt: skip

    def error(self, message: str) -> Any:
        """Raise argparse's message as a HeadSteerError."""
        raise HeadSteerError(f"{message}; {self.prog} --help lists the flags")

    def parse_with_overrides(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
        """Parse a command's flags and its overrides of config fields.

        Returns:
          The flags, and the overrides as dotted path -> text.

        Raises:
          HeadSteerError: there is no such flag, or its value is not valid.
        """
        flags, unparsed = self.parse_known_args(arguments)
        overrides = {} if flags.placeholder is None else {"FIELD": flags.placeholder}  # the help's own placeholder
        for argument in unparsed:
            name, equals, value = argument.partition("=")
            if not name.startswith("--config.") or not equals:
                raise HeadSteerError(
                    f"{argument}: no such flag; fields are set by --config.FIELD=VALUE (see {self.prog} --help)"
                )
            overrides[name.removeprefix("--config.")] = value
        return flags, overrides


def command_run(arguments: Sequence[str]) -> None:
    """Run the stages of an experiment: `headsteer run`."""
    parser = Parser(
        "run", "Train a gated vision transformer, learn its concepts, steer its heads, and write a report.",
        "headsteer config --explain=FIELD explains a field; docs/reference/configuration.md lists all fields.",
        "headsteer run [flags] [--config.FIELD=VALUE ...]",
    )  # fmt: skip
    parser.add_argument("--config", default=DEFAULT_CONFIG, help=CONFIG_HELP)
    parser.add_argument("--config.FIELD", metavar="VALUE", dest="placeholder", help="set any field of the config")
    parser.add_argument("--workdir", metavar="DIR", help="where everything is written (default: runs/NAME)")
    parser.add_argument(
        "--stages",
        metavar="A,B",
        help="some of train, sae, grid, steer, layers, front, report (default: all but grid, front)",
    )
    parser.add_argument("--seed", help="short for --config.seed")
    parser.add_argument("--overwrite", action="store_true", help="compute stages again whose settings or data changed")
    parser.add_argument("--profile", action="store_true", help="short for --config.machine.profile=true")
    help_logger = "short for --config.machine.logger: wandb logs to Weights & Biases beside TensorBoard"
    parser.add_argument("--logger", choices=("tensorboard", "wandb"), help=help_logger)
    parser.add_argument(
        "--distributed", default="", metavar="auto|HOST:PORT,N,I", help="join a cluster, as process I of N"
    )
    parser.add_argument(
        "--distributed-timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long to wait until all processes have joined (default: %(default)s)",
    )
    flags, overrides = parser.parse_with_overrides(arguments)
    if flags.seed is not None:
        overrides = {"seed": flags.seed} | overrides
    if flags.profile:
        overrides["machine.profile"] = "true"
    if flags.logger is not None:
        overrides = {"machine.logger": flags.logger} | overrides
    config = load_config(find_config(flags.config), overrides)
    expand_path(config.machine.activation_cache, "config.machine.activation_cache")  # it is needed only later
    _import_from_here()
    _import_jax()
    _import_matplotlib()

    from headsteer_jax.runtime import hosts  # JAX is imported only once the flags are known to be right
    from headsteer_jax.runtime.buckets import open_workdir
    from headsteer_jax.stages import parse_stages, run_stages

    names = parse_stages(flags.stages)
    workdir = open_workdir(flags.workdir or str(Path("runs") / Path(flags.config).stem), "--workdir")
    hosts.start(flags.distributed, flags.distributed_timeout)
    _start()
    per_process = ("distributed", "distributed_timeout")
    hosts.check_equal(
        {f"--{name}": json.dumps(value) for name, value in vars(flags).items() if name not in per_process}
    )
    run_stages(config, workdir, names, flags.overwrite)
    report = workdir / "report.html"
    if hosts.is_first_process() and report.exists():
        print(report)


def command_study(arguments: Sequence[str]) -> int:
    """Run an experiment with several training seeds and report on all of them: `headsteer study`.

    Returns:
      The exit code: 1 if a run failed.
    """
    parser = Parser(
        "study", "Run an experiment with several training seeds, each in a process of its own, and report on all.",
        "The runs are in DIR/seed_0 and so on; with a grid, in DIR/FIELD=VALUE/seed_0. Finished runs are kept, and\n"
        "interrupted ones continue. All of them have the data of the config's own seed.",
        "headsteer study CONFIG --seeds=0-4 [flags] [--config.FIELD=VALUE ...]",
    )  # fmt: skip
    parser.add_argument("config", metavar="CONFIG", help="a shipped config's name, or a file")
    parser.add_argument("--seeds", required=True, metavar="0-4", help="training seeds: a range or a list")
    parser.add_argument("--config.FIELD", metavar="VALUE", dest="placeholder", help="set any field of the config")
    help_grid = "the values of a field (a;b for lists); repeated: every combination"
    parser.add_argument("--grid", action="append", default=[], metavar="FIELD=A,B", help=help_grid)
    parser.add_argument("--stages", metavar="A,B", help="the stages of each run, as of headsteer run")
    parser.add_argument("--workdir", metavar="DIR", help="where everything is written (default: studies/NAME)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="compute stages again whose settings or data changed")
    flags, overrides = parser.parse_with_overrides(arguments)
    if not 1 <= flags.jobs <= 256:
        raise HeadSteerError(f"--jobs={flags.jobs}: must be 1 to 256")
    path = find_config(flags.config, "CONFIG")
    _import_from_here()
    _import_jax()
    _import_matplotlib()
    import jax

    from headsteer_jax.runtime import hosts
    from headsteer_jax.runtime.buckets import open_workdir
    from headsteer_jax.runtime.jobs import divide_accelerators
    from headsteer_jax.runtime.progress import show_log
    from headsteer_jax.stages import parse_stages
    from headsteer_jax.study import Request, parse_grid, parse_seeds, run_study

    request = Request(
        flags.config, path, overrides, parse_seeds(flags.seeds), parse_grid(flags.grid),
        parse_stages(flags.stages), flags.overwrite,
    )  # fmt: skip
    if variable := hosts.find_cluster():
        raise HeadSteerError(
            f"{variable}: a study is started by one process alone; start it once, or unset the variable"
        )
    workdir = open_workdir(flags.workdir or str(Path("studies") / Path(flags.config).stem), "--workdir")
    environments = divide_accelerators(flags.jobs)
    jax.config.update("jax_platforms", "cpu")  # the accelerators are the runs'
    show_log()
    failed = run_study(request, workdir.path, environments)
    if failed:
        remedy = "the same command tries them again; first delete damaged files, if any are named above"
        print(f"{len(failed)} runs failed: {', '.join(failed)}; {remedy}", file=sys.stderr)
    if (page := workdir / "study.html").exists():
        print(page)
    return int(bool(failed))


def command_export(arguments: Sequence[str]) -> None:
    """Write a run's model or autoencoders for other libraries: `headsteer export`."""
    parser = Parser(
        "export", "Write a finished run's model or autoencoders in the format of another library.",
        "targets:\n"
        "  timm:FILE.safetensors  the backbone and classifier under timm's names, without the gates\n"
        "  saelens:DIR            an SAELens directory for each autoencoder: DIR/seed_0, ...\n"
        "  overcomplete:DIR       an overcomplete state_dict for each: DIR/seed_0.safetensors, ...",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("targets", metavar="TARGET", nargs="+", help="LIBRARY:PATH, see below")
    parser.add_argument("--overwrite", action="store_true", help="replace files that HeadSteer did not write")
    flags = parser.parse_args(list(arguments))
    _import_jax()
    _import_matplotlib()

    from headsteer_jax.deploy.export import (
        check_directories,
        check_target,
        export_autoencoders,
        export_timm,
        parse_target,
    )
    from headsteer_jax.runs import check_done, count_classes, locate_run, read_config
    from headsteer_jax.sae.store import read_autoencoders
    from headsteer_jax.train.loop import load_trained

    targets = [parse_target(target) for target in flags.targets]
    workdir = locate_run(flags.run, "RUN")
    config = read_config(workdir)
    for library, _ in targets:
        check_done(config, workdir, "train" if library == "timm" else "sae", "headsteer export")
    for library, path in targets:
        check_directories(library, path)
        if not flags.overwrite:
            check_target(library, path)
    _start()
    trained = load_trained(config, count_classes(workdir), workdir / "train")
    # everything is read before anything is written
    autoencoders = read_autoencoders(workdir, trained)[0] if any(name != "timm" for name, _ in targets) else None
    for library, path in targets:
        if autoencoders is None or library == "timm":
            export_timm(trained, path)
        else:
            export_autoencoders(trained, autoencoders, library, path, workdir.name)
        print(path)


def command_deploy(arguments: Sequence[str]) -> None:
    """Write a smaller, a gated or a steered model for some classes of a run: `headsteer deploy`."""
    parser = Parser(
        "deploy", "Write a model for some classes of a finished run: smaller, or gated with --dynamic or --steer.",
        "A list of names may also be a JSON list. docs/how-to/deploy.md explains what is written.",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--classes", metavar="A,B,...", help="the classes (with --dynamic or --steer: default all)")
    share: dict[str, Any] = {"type": float, "metavar": "SHARE"}
    help_loss = "cut as far as validation accuracy falls by at most this much (default: 0.01)"
    parser.add_argument("--max-loss", help=help_loss, **share)
    parser.add_argument(
        "--budget", help="instead: cut to this share of the dense model's multiply-accumulates", **share
    )
    help_distil = "then train for so many steps, with the dense model as teacher"
    parser.add_argument("--distil", type=int, metavar="STEPS", help=help_distil)
    parser.add_argument("--dynamic", action="store_true", help="deploy the gated model, with its gates")
    parser.add_argument("--steer", metavar="STRATEGY", help="deploy the gated model, steered towards the classes")
    parser.add_argument("--alpha", type=float, help="with --steer: the steering strength")
    parser.add_argument("--output", metavar="DIR", help="where to write (default: deployed/RUN)")
    parser.add_argument(
        "--compare",
        metavar="DIR",
        nargs="+",
        action="extend",
        help="deployed models of the same classes, measured beside this one",
    )
    parser.add_argument("--data", metavar="PATH", help="the new path of the data, if they have moved since the run")
    flags = parser.parse_args(list(arguments))
    _import_jax()
    _import_matplotlib()

    from headsteer_jax.deploy.request import read_request
    from headsteer_jax.runs import locate_run

    request = read_request(flags)
    workdir = locate_run(flags.run, "RUN")

    from headsteer_jax.deployment import check_request, deploy_run

    output = Path(expand_path(flags.output or str(Path("deployed") / workdir.name), "--output", buckets=False))
    labels = check_request(workdir, request, output)
    _start()
    deploy_run(workdir, request, labels, output, flags.data)
    print(output)


def command_predict(arguments: Sequence[str]) -> None:
    """Predict the classes of image files with a run's model or a deployed one: `headsteer predict`."""
    parser = Parser(
        "predict", "Predict the classes of image files with the gated model of a run, or with a model that headsteer "
        "deploy wrote.\nOf a run it also says which heads ran and which latents are strongest.",
        "docs/how-to/predict.md explains the table and the JSON.",
    )  # fmt: skip
    parser.add_argument(
        "model", metavar="MODEL", help="the directory of a run or of a deployed model, or hf://owner/name"
    )
    help_images = "image files, directories that hold some, or - for paths on standard input, one a line"
    parser.add_argument("images", metavar="IMAGE", nargs="+", help=help_images)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of a table")
    help_steer = "of a run: steer it too; without a class, by the one that it predicts"
    parser.add_argument("--steer", metavar="STRATEGY[:CLASS]", help=help_steer)
    parser.add_argument("--alpha", type=float, help="with --steer: the steering strength")
    parser.add_argument("--data", metavar="PATH", help="with --steer: the data's new path, if they have moved")
    flags = parser.parse_args(list(arguments))
    _import_from_here()
    _import_jax()

    from headsteer_jax.data.image_files import list_images
    from headsteer_jax.deploy.store import find_kind
    from headsteer_jax.runs import locate_run

    directory = locate_run(flags.model, "MODEL")
    predict = _prepare_run(directory, flags) if find_kind(directory.path) == "run" else _prepare_deployed(flags)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # the bytes of paths, as the arguments' are decoded, whatever encoding the terminal has
        sys.stdin.reconfigure(encoding=sys.getfilesystemencoding(), errors=sys.getfilesystemencodeerrors())
    files = list_images(flags.images, sys.stdin)
    if len(files) == 1 and files[0].error and not flags.json:
        raise HeadSteerError(files[0].error)
    _start()
    unread = 0
    for error, lines in predict(files):
        unread += bool(error)
        if error and not flags.json:
            print(f"warning: {error}", file=sys.stderr)
        else:
            print(*lines, sep="\n")
    if unread == len(files):
        raise HeadSteerError("no image could be read")
    if unread:
        raise HeadSteerError(f"{unread} of {len(files)} images could not be read; the others are answered above")


# image files -> of each, why it cannot be read, and the lines that are printed
PredictFiles = Callable[[Sequence[Any]], Iterator[tuple[str, list[str]]]]


def _format_json(record: Mapping[str, Any]) -> str:
    """Format a record as one line of JSON, which is escaped to ASCII if standard output cannot encode it."""
    line = json.dumps(record, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(record)
    return line


def _prepare_run(workdir: Any, flags: argparse.Namespace) -> PredictFiles:
    """Check what is asked of a run, and return the function that answers."""
    _import_matplotlib()

    from headsteer_jax.prediction import (
        Request,
        check_request,
        load_reader,
        path_width,
        predict_run_files,
        table_head,
        table_rows,
        to_json,
    )

    request = Request(flags.steer, flags.alpha, flags.data)
    check_request(workdir, request)

    def predict(files: Sequence[Any]) -> Iterator[tuple[str, list[str]]]:
        reader, width = load_reader(workdir, request), path_width(files, request)
        if not len(reader.latent_classes):
            print(
                "note: latents are left out, because the stage sae is not done; compute it with headsteer run "
                f"--workdir={workdir.path} --stages=sae",
                file=sys.stderr,
            )
        if not flags.json:
            yield "", [table_head(reader, width)]
        for answer in predict_run_files(reader, files):
            if flags.json:
                yield answer.error, [_format_json(to_json(answer, reader))]
            else:
                yield answer.error, list(table_rows(answer, reader, width))

    return predict


def _prepare_deployed(flags: argparse.Namespace) -> PredictFiles:
    """Load a deployed model, and return the function that answers."""
    from headsteer_jax.deploy.predict import predict_files
    from headsteer_jax.deploy.store import load_deployed

    for name in ("steer", "alpha", "data"):
        if getattr(flags, name) is not None:
            raise HeadSteerError(
                f"--{name}: leave it out; {flags.model} is a deployed model, and only runs are steered"
            )
    model = load_deployed(flags.model)

    def predict(files: Sequence[Any]) -> Iterator[tuple[str, list[str]]]:
        width = max((len(str(file.path)) for file in files if not file.error), default=0)
        for answer in predict_files(model, files):
            row = f"{answer.path:<{width}}  {answer.probability:7.1%}  {answer.class_name}"
            yield answer.error, [_format_json(answer.to_json()) if flags.json else row]

    return predict


def command_page(arguments: Sequence[str]) -> None:
    """Write a run's pages again from what its stages saved: `headsteer page`."""
    parser = Parser("page", "Write the pages of a finished run again, from what its stages saved.")
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--output", metavar="DIR", help="where to write the pages and figures/ (default: RUN)")
    parser.add_argument("--data", metavar="PATH", help="the new path of the data, if they have moved since the run")
    parser.add_argument("--results", metavar="PAGE.md", help="write a results page for the documentation instead")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="with --results: the config that the run began with")
    flags = parser.parse_args(list(arguments))
    _import_jax()
    _import_matplotlib()

    from etils import epath

    from headsteer_jax.report.page import check_output, write_pages
    from headsteer_jax.report.results import check_results_page, write_results
    from headsteer_jax.runs import check_done, load_run_dataset, locate_run, read_config
    from headsteer_jax.runtime.hub import is_on_hub
    from headsteer_jax.stages import load_test_readings

    if is_on_hub(flags.run) and not (flags.output or flags.results):
        raise HeadSteerError(f"RUN={flags.run}: pages are not written to the hub; give --output=DIR")
    workdir = locate_run(flags.run, "RUN")
    config = read_config(workdir)
    for stage in ("steer", "report"):
        check_done(config, workdir, stage, "headsteer page")
    if flags.results:
        page = epath.Path(expand_path(flags.results, "--results"))
        check_results_page(page)
        write_results(workdir, page, flags.config, load_config(find_config(flags.config)))
        print(page)
        return
    _start()
    config, dataset = load_run_dataset(config, workdir, flags.data, "--data=PATH")
    output = epath.Path(expand_path(flags.output, "--output")) if flags.output else workdir.path
    if flags.output:
        check_output(output)
    write_pages(config, dataset, workdir, load_test_readings(config, dataset, workdir), output)
    print(output / "report.html")


def command_push(arguments: Sequence[str]) -> None:
    """Write a finished run to the Hugging Face hub: `headsteer push`."""
    parser = Parser(
        "push", "Write what is needed to steer, explore and report a finished run to the Hugging Face hub, in one "
        "commit.",
        "load_run(\"hf://owner/name\") and the commands that read a RUN read it again. docs/how-to/share.md lists\n"
        "what is written. The extra hub is needed, and a token: hf auth login.",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="the run's directory")
    parser.add_argument("address", metavar="hf://owner/name", help="the repository; it is made if there is none")
    parser.add_argument(
        "--private", action="store_true", help="make a private repository; the pages show images of the data"
    )
    parser.add_argument("--message", help="the message of the commit (default: Add the run NAME)")
    help_overwrite = "add the run to a repository that headsteer push did not write, replacing files of the same names"
    parser.add_argument("--overwrite", action="store_true", help=help_overwrite)
    flags = parser.parse_args(list(arguments))
    if flags.message is not None and not flags.message.strip():
        raise HeadSteerError("--message: must not be empty; leave it out for the default")
    _import_jax()
    _import_matplotlib()

    from headsteer_jax.runs import locate_run
    from headsteer_jax.runtime.hub import parse_address, upload_run
    from headsteer_jax.sharing import PushRequest, check_files, check_push, collect_files

    address = parse_address(flags.address, "hf://owner/name")
    workdir = locate_run(flags.run, "RUN")
    request = PushRequest(address, flags.private, flags.overwrite)
    repository = check_push(workdir, request)
    _start()
    files = collect_files(workdir, address)
    check_files(request, repository, files)
    print(upload_run(address, repository, files, flags.message or f"Add the run {workdir.name}", flags.private))


def command_config(arguments: Sequence[str]) -> None:
    """Show, explain or check a config, or write the reference of all fields: `headsteer config`."""
    parser = Parser(
        "config", "Show a config with its overrides, one field per line; or explain a field, or check the config."
    )
    parser.add_argument("--config", default=DEFAULT_CONFIG, help=CONFIG_HELP)
    parser.add_argument("--config.FIELD", metavar="VALUE", dest="placeholder", help="set any field of the config")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--explain", metavar="FIELD", help="explain a field, or every field of a section")
    action.add_argument("--check", action="store_true", help="only say whether the config is valid")
    action.add_argument("--reference", metavar="PAGE.md", help="write a page with every field")
    flags, overrides = parser.parse_with_overrides(arguments)
    if flags.explain:
        print(describe_field(flags.explain))
        return
    if flags.reference:
        from headsteer_jax.runtime.files import check_replaceable, make_directory, write_text

        page = Path(expand_path(flags.reference, "--reference", buckets=False))
        check_replaceable(page, "# Configuration\n\nThis page lists all fields of a config with their defaults.")
        make_directory(page.parent)
        write_text(page, render_reference() + "\n")
        print(page)
        return
    config = load_config(find_config(flags.config), overrides)
    _check_names(config)
    if flags.check:
        print(f"{flags.config}: valid")
        return
    for path, value in flatten(config).items():
        print(f"{path} = {json.dumps(value)}")


def command_compile(arguments: Sequence[str]) -> None:
    """Compile a run's programs for a machine and say what they take of it: `headsteer compile`."""
    parser = Parser(
        "compile", "Compile every large program of a run, for TPUs or GPUs that are not there or for this machine's "
        "devices, and say\nwhat each takes of them. Nothing is run; the data are read only for their sizes.",
        "docs/how-to/tpu.md explains the table.", "headsteer compile [flags] [--config.FIELD=VALUE ...]",
    )  # fmt: skip
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="a TPU slice, as v5e:2x4, or GPUs, as h100:8 (default: this machine's devices)",
    )
    parser.add_argument("--config", default=DEFAULT_CONFIG, help=CONFIG_HELP)
    parser.add_argument("--config.FIELD", metavar="VALUE", dest="placeholder", help="set any field of the config")
    parser.add_argument("--stages", metavar="A,B", help="only these stages' programs (default: those of headsteer run)")
    parser.add_argument("--images", type=int, metavar="N", help="instead of reading the data: its training images")
    parser.add_argument("--classes", type=int, metavar="C", help="with --images: the number of classes")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak, for the estimated hours (default: %(default)s)"
    )
    parser.add_argument("--out", metavar="FILE.json", help="write all figures to this file as well")
    flags, overrides = parser.parse_with_overrides(arguments)
    if not 0 < flags.mfu <= 1:
        raise HeadSteerError(f"--mfu={flags.mfu}: must be above 0 and at most 1")
    config = load_config(find_config(flags.config), overrides)
    _import_from_here()
    _import_jax()
    _import_matplotlib()

    from headsteer_jax.compilation.command import check_outcomes, compile_run
    from headsteer_jax.compilation.sizes import find_sizes
    from headsteer_jax.compilation.topology import describe_attached, describe_topology, prepare_compiler
    from headsteer_jax.runtime.files import make_directory, write_json
    from headsteer_jax.stages import parse_stages

    stages = parse_stages(flags.stages)
    out = Path(expand_path(flags.out, "--out", buckets=False)) if flags.out else None
    if flags.topology is not None:
        prepare_compiler(flags.topology)
    if out is not None:
        make_directory(out.parent)
    _start()
    dataset = find_sizes(config, flags.images, flags.classes)
    machine = describe_attached() if flags.topology is None else describe_topology(flags.topology)
    record, outcomes = compile_run(config, dataset, machine, stages, flags.mfu)
    if out is not None:
        write_json(out, record)
        print(out)
    check_outcomes(outcomes)


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "run": command_run, "study": command_study, "export": command_export, "deploy": command_deploy,
    "predict": command_predict, "page": command_page, "push": command_push, "config": command_config,
    "compile": command_compile,
}  # fmt: skip


def find_config(name: str, flag: str = "--config") -> Path:
    """Find a config: a file at this path, else a shipped config of this name (`double_digits`, also with `.py`).

    Raises:
      HeadSteerError: there is neither.
    """
    path = Path(expand_path(name, flag, buckets=False))
    if path.is_file():
        return path
    shipped = _shipped_configs()
    stem = Path(name).name.removesuffix(".py")
    if stem in shipped and name in (stem, f"{stem}.py", f"configs/{stem}.py"):
        return shipped[stem]
    raise HeadSteerError(f"{flag}={name}: no such file; the shipped configs are {', '.join(sorted(shipped))}")


def _shipped_configs() -> dict[str, Path]:
    """List the shipped configs by name: those in the wheel, else those in the clone that holds this package."""
    package = Path(str(importlib.resources.files("headsteer_jax")))
    in_wheel = package / "configs"
    directory = in_wheel if in_wheel.is_dir() else package.parent / "configs"
    return {file.stem: file for file in directory.glob("*.py") if file.stem != "__init__"}


def _check_names(config: Config) -> None:
    """Check the names of data sources and strategies, which the config itself cannot check.

    Raises:
      HeadSteerError: there is no such data source or strategy.
    """
    _import_jax()
    from headsteer_jax.data.sources import check_source
    from headsteer_jax.steer.catalogue import find_strategy

    _import_from_here()
    check_source(config.data)
    for name in config.steer.strategies:
        find_strategy(name)


def _import_matplotlib() -> None:
    """Import matplotlib without the user's settings, among them a file `matplotlibrc` in the current directory.

    A faulty one would end the program here.
    """
    os.environ |= {"MATPLOTLIBRC": os.devnull, "MPLBACKEND": "agg"}
    with suppress(FileNotFoundError), chdir("/"):  # the current directory may have been deleted
        importlib.import_module("matplotlib")


def _import_jax() -> None:
    """Import JAX, which reads its settings from the environment.

    Raises:
      HeadSteerError: a variable of the environment has a value that JAX does not know.
    """
    try:
        importlib.import_module("jax")
    except ValueError as error:
        variables = ", ".join(sorted(name for name in os.environ if name.startswith("JAX_")))
        raise HeadSteerError(f"JAX does not start ({error}); correct or unset one of {variables}") from None


def _import_from_here() -> None:
    """Let Python import from the current directory, last: a strategy `module:function` may lie beside the command."""
    with suppress(FileNotFoundError):  # the directory was deleted
        sys.path.append(os.getcwd())


def _start() -> None:
    """Open the devices, with this package's settings of JAX; keep compiled programs from run to run; show the log."""
    from headsteer_jax.runtime.compiled import keep_compiled_programs
    from headsteer_jax.runtime.progress import show_log
    from headsteer_jax.runtime.settings import apply_own_settings, open_devices

    show_log()
    apply_own_settings()
    open_devices()
    keep_compiled_programs()
