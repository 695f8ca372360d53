"""What `draftsmith fit`, `validate` and `test` do: LightningCLI on a run folder, and resume."""

import json
import logging
import os
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import yaml  # type: ignore[import-untyped]  # its stubs are not among our development tools
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from omegaconf import OmegaConf

from draftsmith.inference.errors import InvalidState, InvalidValue
from draftsmith.trainers import doctor, runs, slurm_job, strategies
from draftsmith.trainers.callbacks.checkpoint import (
    CheckpointConfig,
    RandomStates,
    StepCheckpoint,
    best_checkpoint,
)
from draftsmith.trainers.callbacks.progress import progress
from draftsmith.trainers.callbacks.stop_signals import Stopped, StopSignals
from draftsmith.trainers.callbacks.throughput import Throughput
from draftsmith.trainers.one_line import one_line
from draftsmith.trainers.provenance import Session
from draftsmith.trainers.strategies import global_rank, shut_down

if TYPE_CHECKING:
    from draftsmith.trainers.cli import Given

# With plain "omegaconf", ${model.dim} would be resolved per file, before the command line overrides model.dim.
_PARSER = {"parser_mode": "omegaconf+", "exit_on_error": False, "allow_abbrev": False}


class KeepConfig(SaveConfigCallback):
    """Writes the resolved config into the run folder (Lightning's own goes to the logger's), and the tokenizer.

    Only when training really starts: a config that does not fit the run's checkpoint must not replace its own.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass  # where Lightning's would save

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        run = Path(trainer.default_root_dir)
        self.parser.save(self.config, str(run / runs.CONFIG), skip_none=False, overwrite=True, multifile=False)
        directory = getattr(trainer.datamodule, "tokenizer_dir", None)
        if directory is not None:
            runs.keep_tokenizer(run, Path(directory))


class TrainingCLI(LightningCLI):
    """LightningCLI without subcommands: it parses config and overrides; the run folder is chosen outside."""

    def __init__(self, given: "Given", run: Path | None) -> None:
        self.given, self.run = given, run
        self.resumed: Path | None = None
        for config in given.configs:
            _check_yaml(config)
        args = [word for config in given.configs for word in ("--config", str(config))] + given.rest
        super().__init__(
            save_config_callback=KeepConfig if given.verb == "fit" else None,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            trainer_defaults={"use_distributed_sampler": False},  # our loaders know their rank
            seed_everything_default=0,
            parser_kwargs=_PARSER,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # modules save their own, plain hyper-parameters
            run=False,
            args=args,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(CheckpointConfig, "checkpoint")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        asked = self.config_init.trainer
        strategies.check(asked.strategy, asked.accelerator, asked.precision)
        callbacks: list[Callback] = [*(asked.callbacks or [])]
        forced: dict[str, Any] = {"callbacks": callbacks, "enable_model_summary": False}
        plugins = asked.plugins if isinstance(asked.plugins, list) else [asked.plugins] if asked.plugins else []
        chosen = any(isinstance(p, ClusterEnvironment) for p in plugins) or TorchElasticEnvironment.detect()
        by_srun = not chosen and SLURMEnvironment.detect()
        if by_srun:
            # Lightning's own requeue works inside the signal handler; ours is StopSignals
            forced["plugins"] = [*plugins, SLURMEnvironment(auto_requeue=False)]
        if asked.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(progress())
        if self.given.verb != "fit":
            forced |= {"logger": False, "enable_checkpointing": False}
            forced |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}  # only fit starts several processes
        elif not asked.fast_dev_run:
            forced["default_root_dir"] = str(self.run)
            if asked.logger in (None, True):
                forced["logger"] = self._tensorboard()
            callbacks.insert(0, RandomStates())  # before any other callback draws
            callbacks += self._fit_callbacks(
                saves=asked.enable_checkpointing is not False, logs=asked.logger is not False
            )
        try:
            trainer: pl.Trainer = super().instantiate_trainer(**forced, **kwargs)
        except ValueError as e:  # a strategy, accelerator or precision that does not exist
            raise InvalidValue(f"trainer: {' '.join(str(e).split())}") from e
        if by_srun and self.given.verb == "fit":
            slurm_job.check_tasks(trainer.num_devices, trainer.num_nodes)
        return trainer

    def _tensorboard(self) -> TensorBoardLogger:
        # events after the resumed step belong to a continuation that died: TensorBoard drops them
        step = None if self.resumed is None else runs.step_of(self.resumed)
        return TensorBoardLogger(str(self.run), name="tb", version="", purge_step=step)

    def _fit_callbacks(self, saves: bool, logs: bool) -> list[Callback]:
        assert self.run is not None
        made: list[Callback] = [Throughput()]
        if logs:
            made.append(LearningRateMonitor(logging_interval="step"))
        if saves:
            config: CheckpointConfig = self.config_init.checkpoint
            directory = self.run.absolute() / runs.CHECKPOINTS
            best, steps = best_checkpoint(directory, config), StepCheckpoint(directory, config)
            made += [StopSignals(steps), steps, *([best] if best is not None else [])]
        return made


def build_module(config: Path) -> pl.LightningModule:
    """The module of a config.yaml. Raises InvalidValue for a file that cannot be read or describes none."""
    module: pl.LightningModule = _build_part(config, "model", pl.LightningModule)
    return module


def build_data(config: Path) -> pl.LightningDataModule:
    """The data module of a config.yaml, nothing prepared yet. Raises InvalidValue as `build_module`."""
    data: pl.LightningDataModule = _build_part(config, "data", pl.LightningDataModule)
    return data


def _check_yaml(config: Path) -> dict[str, Any]:
    """The content of a YAML file. Raises InvalidValue, naming the file and the place, unless it is a mapping."""
    try:
        content = yaml.safe_load(config.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidValue(f"cannot read {config}: {e}") from e
    except yaml.YAMLError as e:
        place = getattr(e, "problem_mark", None)
        where = "" if place is None else f", line {place.line + 1}"
        raise InvalidValue(f"{config}{where}, is not YAML: {getattr(e, 'problem', None) or e}") from e
    if not isinstance(content, dict):
        raise InvalidValue(f"{config} is not a config: it holds no keys")
    return content


def _build_part(config: Path, part: str, base: type) -> Any:
    if not isinstance(_check_yaml(Path(config)).get(part), dict):
        raise InvalidValue(f"{config} has no {part}: part")
    with one_line():
        content: Any = OmegaConf.to_container(OmegaConf.load(config), resolve=True)
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_lightning_class_args(base, part, subclass_mode=True)
        return parser.instantiate(parser.parse_object({part: content[part]}))[part]


class ParseCLI(TrainingCLI):
    """Parses and builds nothing: `config` is what `fit` would work with."""

    def __init__(self, given: "Given") -> None:
        super().__init__(given, None)

    def instantiate_classes(self) -> None:
        pass


class FitCLI(TrainingCLI):
    """Parses first; then, before anything is built, takes the run folder and finds where to resume."""

    def __init__(self, given: "Given", run: Path, stack: ExitStack) -> None:
        self.stack = stack
        super().__init__(given, run)

    def before_instantiate_classes(self) -> None:
        assert self.run is not None
        if global_rank() == 0:
            self.stack.enter_context(runs.RunLock(self.run))
            doctor.warn_under_slurm(self, self.run)
        self.resumed = _resume_point(self.given, self.run)


def fit(given: "Given") -> int:
    """Train in a run folder; see the help page of `draftsmith fit`."""
    quiet()
    first = global_rank() == 0
    run = runs.folder(given.run, given.name)
    if not given.configs and not given.asks:
        if given.run is None:
            raise InvalidValue("nothing to train: give -c CONFIG (see 'draftsmith fit --help'), or --run ID to resume")
        given.configs.append(runs.existing(given.run) / runs.CONFIG)
    with ExitStack() as stack, one_line():
        cli = FitCLI(given, run, stack)
        ckpt = None if cli.resumed is None else str(cli.resumed)
        if cli.resumed is not None:
            strategies.check_resume(cli.trainer, cli.resumed, cli.config_init.checkpoint.elastic)
        if first:
            os.environ[runs.FOLDER_VARIABLE] = str(run)  # for the ranks that the trainer launches
            stack.callback(os.environ.pop, runs.FOLDER_VARIABLE, None)
            session = Session(run, cli.config.seed_everything, ckpt)
            _say(f"{run} {'starts' if cli.resumed is None else f'resumes {cli.resumed.name}'}")
        status = "failed"
        stopped: Stopped | None = None
        try:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt)
            status = "finished"
        except Stopped as stop:
            status, stopped = "requeued" if stop.requeues else "stopped", stop
        finally:
            metrics = {k: float(v) for k, v in cli.trainer.callback_metrics.items()}
            if first:
                session.end(status, cli.trainer.global_step, metrics=metrics)
            shut_down()
        if first and stopped is None:
            _report(run, cli.trainer.global_step, metrics)
    if stopped is None or not first:
        return 0  # the launcher would take another code for a crash and kill rank 0
    return _leave(stopped, given.run or str(run))


def _leave(stopped: Stopped, run: str) -> int:
    """What rank 0 says and returns after a stop; the run folder is free by now. A requeue ends the whole job step."""
    if not stopped.requeues:
        _say(f"{stopped}; to go on: draftsmith fit --run {run}")
        return 128 + stopped.signum
    _say(str(stopped))
    try:
        _say(f"requeued as job {slurm_job.requeue()}")
    except InvalidState as e:
        _say(str(e))
        return 128 + stopped.signum  # SLURM should not list it as completed
    return 0


def _resume_point(given: "Given", run: Path) -> Path | None:
    """The checkpoint to start from: the one asked for, else the run's newest whole one, else none."""
    if given.ckpt_path is None:
        with warnings.catch_warnings():
            if global_rank() != 0:  # one rank warns for all
                warnings.simplefilter("ignore", runs.TornCheckpoint)
            return runs.newest_checkpoint(run)
    path = runs.checkpoint(run, given.ckpt_path) if given.ckpt_path in ("best", "last") else Path(given.ckpt_path)
    if not path.exists():
        raise InvalidValue(f"no checkpoint {str(path)!r}")
    lack = runs.missing_part(path)
    if lack is not None:
        raise InvalidValue(f"cannot resume from {path}: {lack}")
    return path


def evaluate(given: "Given") -> int:
    """Validate or test one checkpoint in one process; see the help page of `draftsmith validate`."""
    quiet()
    run = None if given.run is None else runs.existing(given.run)
    if not given.configs:
        if run is None:
            raise InvalidValue(
                f"nothing to {given.verb}: give --run ID or -c CONFIG (see 'draftsmith {given.verb} --help')"
            )
        given.configs.append(run / runs.CONFIG)
    ckpt = _evaluated(given, run)
    with one_line():
        cli = TrainingCLI(given, run)
        check = cli.trainer.validate if given.verb == "validate" else cli.trainer.test
        path = None if ckpt is None else str(ckpt)
        with TemporaryDirectory(prefix="draftsmith-") as scratch:
            one = None if ckpt is None else strategies.single_file(ckpt, Path(scratch))
            results = check(cli.model, datamodule=cli.datamodule, ckpt_path=one, verbose=False)
    if not results or not results[0]:
        raise InvalidState(f"the data of this config has nothing to {given.verb}")
    figures = {"checkpoint": path, **results[0]}
    if given.json:
        print(json.dumps(figures))
    else:
        _table([(k, f"{v:.6g}" if isinstance(v, float) else str(v)) for k, v in figures.items()])
    return 0


def _evaluated(given: "Given", run: Path | None) -> Path | None:
    """The checkpoint to evaluate; None: the weights that the config itself names."""
    if given.ckpt_path in (None, "best", "last"):
        if run is None:
            if given.ckpt_path is None:
                return None
            raise InvalidValue(f"--ckpt_path {given.ckpt_path} needs --run ID")
        which = given.ckpt_path or ("best" if any((run / runs.CHECKPOINTS).glob("best-*.ckpt")) else "last")
        return runs.checkpoint(run, which)
    path = Path(given.ckpt_path)
    if not path.exists():
        raise InvalidValue(f"no checkpoint {str(path)!r}")
    lack = runs.missing_part(path, ("state_dict",))
    if lack is not None:
        raise InvalidValue(f"cannot evaluate {path}: {lack}")
    return path


def quiet() -> None:
    """Keep what libraries say to their own developers off the user's screen; each filter names one message."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"Checkpoint directory .* exists and is not empty", module="lightning.*")
    warnings.filterwarnings("ignore", r"The `srun` command is available", module="lightning.*")  # outside of jobs
    warnings.filterwarnings("ignore", r"`torch.distributed.*` is deprecated", FutureWarning)  # DeepSpeed calls them
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", module="lightning.*")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _report(run: Path, step: int, metrics: dict[str, float]) -> None:
    """What a finished run left, on stdout."""
    shown = [(k, f"{v:.6g}") for k, v in sorted(metrics.items()) if k.startswith(("train/loss", "val/"))]
    _table([("run", str(run)), ("steps", str(step)), *shown, ("next", f"draftsmith export {run} OUT")])


def _table(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")
