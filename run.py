"""HeadSteer's command line: train a gated vision transformer, learn its concepts, steer its heads, report.

python run.py [--config=configs/NAME.py] [--workdir=DIR] [--stages=train,sae,steer,layers,report] [--export=FILE]
              [--export_sae=LIBRARY:DIR] [--distributed=auto] [--config.FIELD=VALUE ...]

Exit codes: 0; 2 after one line that says what is wrong; 75 when SIGTERM stopped it, and the same command goes on.
"""

import argparse
import json
import os
import sys
import threading
import traceback
from pathlib import Path

from etils import epath

from headsteer_jax import errors
from headsteer_jax.config import files
from headsteer_jax.runtime import preemption

STAGES = {
    "train": "the vision transformer: dense, then with head gates, then a dense control of the same length",
    "sae": "the sparse autoencoders of one layer's residual",
    "grid": "autoencoders of several k and learning rates side by side (only where it is named)",
    "steer": "every strategy, class and alpha on validation and test; the controls",
    "layers": "class steering of every gated layer by itself, and of all at once",
    "report": "summary.json, figures/ and report.html",
}


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Flags, and overrides of config fields: dotted path -> text.

    Raises:
      HeadSteerError: an unknown flag or stage.
    """
    parser = argparse.ArgumentParser(
        prog="run.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="stages:\n"
        + "\n".join(f"  {name:7} {meaning}" for name, meaning in STAGES.items())
        + "\n\nconfig fields (name, type, default, meaning):\n"
        + files.describe_fields(),
    )
    parser.add_argument("--config", default="configs/double_digits.py", help="the experiment (default: %(default)s)")
    parser.add_argument("--workdir", help="where everything is written (default: runs/<config's name>)")
    usual = ",".join(stage for stage in STAGES if stage != "grid")
    parser.add_argument("--stages", default=usual, help="which stages to run (default: %(default)s)")
    parser.add_argument("--seed", help="short for --config.seed")
    parser.add_argument(
        "--export", help="afterwards write the trained backbone and head to FILE.safetensors, as timm's"
    )
    parser.add_argument(
        "--export_sae",
        metavar="LIBRARY:DIR",
        help="afterwards write the autoencoders for another library: saelens:DIR or overcomplete:DIR",
    )
    parser.add_argument("--profile", action="store_true", help="short for --config.machine.profile=true")
    parser.add_argument(
        "--distributed",
        default="",
        metavar="auto|HOST:PORT,PROCESSES,PROCESS",
        help="join a cluster, by one process on each host with the same command; auto: as JAX finds it (TPU slice, "
        "SLURM, Open MPI, Kubernetes), which is also done where the environment says so",
    )
    parser.add_argument(
        "--distributed_timeout", type=int, default=300, metavar="SECONDS", help="to wait for all (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="make stages again whose config changed")
    flags, rest = parser.parse_known_args(arguments)
    overrides = {} if flags.seed is None else {"seed": flags.seed}
    if flags.profile:
        overrides["machine.profile"] = "true"
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not name.startswith("--config.") or not equals:
            raise errors.HeadSteerError(
                f"{argument}: no such flag; fields are set by --config.FIELD=VALUE (see --help)"
            )
        overrides[name.removeprefix("--config.")] = value
    for stage in flags.stages.split(","):
        if stage not in STAGES:
            raise errors.HeadSteerError(
                f"--stages={flags.stages}: there is no stage {stage!r}; allowed are {', '.join(STAGES)}"
            )
    return flags, overrides


def _speak_alone() -> None:
    """What goes wrong in libraries' threads is raised here and becomes one line; they need not print it as well."""
    sys.unraisablehook = lambda _: None
    shown = sys.excepthook
    sys.excepthook = lambda *error: shown(*error) if threading.current_thread() is threading.main_thread() else None


def main(arguments: list[str]) -> int:
    preemption.install_handler()
    _speak_alone()
    try:
        flags, overrides = parse(arguments)
        config = files.load_config(_found(flags.config), overrides)
        workdir = epath.Path(flags.workdir or Path("runs") / Path(flags.config).stem)
        sys.path.append(os.getcwd())  # a strategy `module:function` may be where the command is given
        from headsteer_jax import stages
        from headsteer_jax.deploy import export
        from headsteer_jax.runtime import compiled, hosts

        hosts.start(flags.distributed, flags.distributed_timeout)
        compiled.keep_compiled_programs()
        own = {name: value for name, value in vars(flags).items() if not name.startswith("distributed")}
        hosts.check_equal({f"--{name}": json.dumps(value) for name, value in own.items()})
        stages.run(config, workdir, tuple(flags.stages.split(",")), flags.overwrite)
        if flags.export:
            export.export(config, workdir, epath.Path(flags.export))
            print(flags.export)
        if flags.export_sae:
            export.export_saes(config, workdir, flags.export_sae)
            print(flags.export_sae)
        report = workdir / "report.html"
        if hosts.is_first_process() and report.exists():
            print(report)
    except errors.HeadSteerError as error:
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


def _found(path: str) -> Path:
    """A config's file as given, or beside this program: so that run.py works from any directory."""
    here = Path(__file__).parent / path
    return here if not Path(path).exists() and here.exists() else Path(path)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code:  # at once: libraries' threads and exit handlers would bury the line under their own tracebacks
        if "headsteer_jax.runtime.hosts" in sys.modules:
            sys.modules["headsteer_jax.runtime.hosts"].wait_before_exit()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
