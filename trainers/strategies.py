"""How many processes train, and how they share the training state; the only file that imports deepspeed.

`trainer.strategy` takes "auto" (one process), "ddp" (NCCL on GPUs, gloo on CPUs), or DeepSpeed's ZeRO: "zero1",
"zero2", "zero3", "zero2-offload", "zero3-offload". For settings of your own:

    strategy: {class_path: draftsmith.trainers.strategies.ZeRO, init_args: {config: deepspeed/zero2}}

where `config` is a shipped name or the path of a DeepSpeed JSON file.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from draftsmith.inference.errors import InvalidState, InvalidValue, MissingExtra, unknown_choice
from draftsmith.modules.hf_model import Birth, FrozenTeacher, born
from draftsmith.modules.optim import full_shape
from draftsmith.trainers import shards, shipped

ZERO = ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
NAMES = ("auto", "ddp", *ZERO)
_FP16 = ("16", "16-true", "16-mixed")
# Keys of a DeepSpeed config that the trainer fills in, and where to say it instead.
_OURS = {
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "train_batch_size": "data.text.batch_size (rows per rank)",
    "train_micro_batch_size_per_gpu": "data.text.batch_size (rows per rank)",
    "gradient_clipping": "trainer.gradient_clip_val",
    "optimizer": "model.optim",
    "scheduler": "model.optim",
    "fp16": "trainer.precision",
    "bf16": "trainer.precision",
    "checkpoint": "checkpoint.elastic",
}
_KEPT = ("global_step", "epoch", "hyper_parameters", "pytorch-lightning_version")  # of what is read whole, and ours
_INSTALL = "pip install 'draftsmith[deepspeed]'"


class Float32Inputs(DeepSpeedPrecision):
    """Parameters in the asked precision; batches as the loaders made them.

    Lightning's plugin casts every float of a batch: in bf16 a time of 0.999 would arrive as 1.0 (contract 12).
    """

    def convert_input(self, data: Any) -> Any:
        return data


@dataclass(eq=False)
class _Zero3:
    """Tells transformers that parameters come in pieces, so that it fills those. Its own class wants accelerate."""

    config: dict[str, Any]

    def is_zero3(self) -> bool:
        return True


class ZeRO(DeepSpeedStrategy):
    """DeepSpeed's ZeRO on GPUs (NCCL) and, the same code, on CPUs (gloo)."""

    def __init__(
        self, config: str = "deepspeed/zero2", timeout_minutes: float = 30.0, partition_teacher: bool = False
    ) -> None:
        """Args:
        config: a shipped DeepSpeed config, or the path of a JSON file.
        timeout_minutes: how long a rank waits for the others in one collective call.
        partition_teacher: under ZeRO-3, share the frozen teacher's body among the ranks too (its head stays whole on
            each), for one that does not fit; every step then gathers it layer by layer.

        Raises MissingExtra without deepspeed, InvalidValue for a config that cannot be read or sets what is ours.
        """
        need_deepspeed("a ZeRO strategy")
        settings = read_config(config)
        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported, which the next line does
        super().__init__(config=settings, timeout=timedelta(minutes=timeout_minutes))
        self.elastic = False  # whether a checkpoint of another number of ranks may be taken
        self.partition_teacher = partition_teacher

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and type(plugin) is DeepSpeedPrecision:
            plugin = Float32Inputs(plugin.precision)
        self._precision_plugin = plugin

    # --- what Lightning's class does on GPUs only

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        import deepspeed

        # On CPUs it would compile a kernel first (half a minute, a compiler), and a rank that is killed meanwhile
        # leaves a lock for which every later run waits for ever. Plain gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        import deepspeed

        engine, wrapped, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.root_device.index or 0),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, wrapped

    # --- set-up

    @property
    def stage(self) -> int:
        """1, 2 or 3."""
        return int(cast(dict[str, Any], self.config)["zero_optimization"]["stage"])

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Under ZeRO-3 networks that train are cut to pieces as they are built: no rank ever holds one whole."""
        self._init_config_if_needed()
        if self.stage < 3:
            yield
            return
        import deepspeed

        teacher = self._sharded_birth if self.partition_teacher else nullcontext
        gathered = deepspeed.zero.GatheredParameters
        with born(Birth(trained=self._sharded_birth, teacher=teacher, gathered=gathered)):
            yield

    @contextmanager
    def _sharded_birth(self) -> Iterator[None]:
        """Random weights come out as in a network that is built whole; weights of a directory are read piece by piece.

        transformers initialises a network after it was built, when its parameters are cut already. Its own way around
        that draws other numbers, on rank 0 alone, so that no run under ZeRO-3 would start as one process does.
        """
        import deepspeed
        from transformers import PreTrainedModel
        from transformers.integrations import deepspeed as hf_deepspeed
        from transformers.modeling_utils import set_zero3_state

        initialise = PreTrainedModel._initialize_weights

        def whole(model: PreTrainedModel, module: nn.Module, *rest: Any) -> None:
            parts = [module, *module.children()]  # some look into their children
            own = [p for part in parts for p in part.parameters(recurse=False)]
            with deepspeed.zero.GatheredParameters(own, modifier_rank=0):
                initialise(model, module, *rest)

        told = _Zero3(cast(dict[str, Any], self.config))  # transformers keeps a weak reference, so this name keeps it
        hf_deepspeed.set_hf_deepspeed_config(told)
        PreTrainedModel._initialize_weights = whole
        try:
            with (
                hf_deepspeed.prevent_arange_dtype_change(),
                deepspeed.zero.Init(config_dict_or_path=self.config),
                set_zero3_state(),  # our `zero.Init` is the one
            ):
                yield
        finally:
            PreTrainedModel._initialize_weights = initialise
            hf_deepspeed.unset_hf_deepspeed_config()

    def setup(self, trainer: pl.Trainer) -> None:
        drafts = getattr(trainer.lightning_module, "draft_keys", ())
        if len(drafts) > 1:
            raise InvalidValue(
                f"several drafts ({', '.join(drafts)}) under DeepSpeed: its optimizer would move the idle ones too; "
                "set trainer.strategy to ddp, or train one draft per run"
            )
        source = getattr(trainer.lightning_module, "source", "teacher")
        if self.stage == 3 and source != "teacher":
            raise InvalidValue(
                f"model.source {source!r} decodes in the training step, which ZeRO-3 cannot (ranks would gather "
                "parameters unequally often): set trainer.strategy to zero2 or model.source to teacher"
            )
        if self.partition_teacher and self.stage < 3:  # not in __init__: the config's parser would hide the reason
            raise InvalidValue(
                f"partition_teacher needs ZeRO-3, and this is stage {self.stage}: take deepspeed/zero3, or leave it out"
            )
        super().setup(trainer)
        if self.stage == 3:
            self._share_heads(trainer.lightning_module)
        if self.partition_teacher:
            self._serve_pieces(trainer)

    def _share_heads(self, module: nn.Module) -> None:
        """The chunked head reads the head's weight outside of the head's own forward: gather it for the whole step."""
        import deepspeed

        for part in module.modules():
            find_head: Any = getattr(part, "get_output_embeddings", None)
            head = None if find_head is None else find_head()
            for parameter in head.parameters() if isinstance(head, nn.Module) else ():
                deepspeed.zero.register_external_parameter(module, parameter)

    def _serve_pieces(self, trainer: pl.Trainer) -> None:
        """Let the teacher's body gather its layers as it runs; the head, which the losses read, becomes whole again."""
        import deepspeed

        module = trainer.lightning_module
        teacher: FrozenTeacher | None = getattr(module, "teacher", None)
        if teacher is None:
            raise InvalidValue(f"partition_teacher is set, and {type(module).__name__} has no teacher: remove it")
        from draftsmith.trainers.callbacks.acceptance import AcceptanceEval  # which imports this file

        if any(isinstance(callback, AcceptanceEval) for callback in trainer.callbacks):
            raise InvalidValue(
                "AcceptanceEval decodes with the teacher, on each rank as long as its prompts take, which a teacher in "
                "pieces cannot: remove the callback, or set partition_teacher to false"
            )
        head = teacher.model.get_output_embeddings()
        for name, parameter in list(head.named_parameters()):
            with deepspeed.zero.GatheredParameters([parameter]):
                value = parameter.detach().clone()
            setattr(head, name, nn.Parameter(value, requires_grad=False))  # tied embeddings stay in pieces
        keys = ("train_micro_batch_size_per_gpu", "zero_optimization", "bf16", "fp16")
        config = {key: value for key, value in cast(dict[str, Any], self.config).items() if key in keys}
        teacher.parts, *_ = deepspeed.initialize(
            model=teacher.model.base_model, config=config, dist_init_required=False
        )

    # --- checkpoints (trainers/shards.py says what is in one)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """A directory, or for weights alone the single file that other strategies write."""
        path = Path(self.broadcast(filepath))
        if "optimizer_states" not in checkpoint:
            weights = self.full_weights(cast(nn.Module, self.lightning_module))
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint({**checkpoint, "state_dict": weights}, path)
            self.barrier()
            return
        own = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        if self.is_global_zero:
            shards.clear(path.parent)
        self.barrier()
        temporary = shards.temporary(path)
        self.deepspeed_engine.save_checkpoint(str(temporary), client_state=own, tag=shards.TAG)
        self.barrier()
        if self.is_global_zero:
            shards.publish(temporary, path, world_size=self.world_size, stage=self.stage, network=self._network())
        self.barrier()

    def _network(self) -> str:
        parameters = cast(nn.Module, self.lightning_module).named_parameters()
        return shards.network_hash((name, full_shape(parameter)) for name, parameter in parameters)

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero and Path(filepath).is_dir():
            shards.remove(Path(filepath))
        else:
            super().remove_checkpoint(filepath)

    def check_shards(self, path: Path, world_size: int) -> shards.Shards:
        """What it says. Raises InvalidState for another stage, or for another number of ranks if not elastic."""
        told = shards.read(path)
        if told.stage != self.stage:
            raise InvalidState(f"{path} was saved by zero{told.stage}: resume with that strategy, not zero{self.stage}")
        if told.world_size != world_size and not self.elastic:
            raise InvalidState(
                f"{path} was saved by {told.world_size} ranks and this run has {world_size}: start it with "
                f"{told.world_size}, or allow another number with --checkpoint.elastic true"
            )
        return told

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Put a directory's state into the engine. Raises InvalidState for one of another number of ranks or stage."""
        path = Path(checkpoint_path)
        told = self.check_shards(path, self.world_size)
        if told.network != self._network():
            raise InvalidState(f"{path} holds another network than this config describes: resume with the run's config")
        engine, fitting = self.deepspeed_engine, self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        tag, directory = shards.TAG, path
        if told.world_size != self.world_size:
            directory = shards.temporary(path).with_suffix(".universal")
            if self.is_global_zero:
                to_universal(path, directory)
            self.barrier()
            engine._config.load_universal_checkpoint = True
        groups = [dict(group) for group in engine.optimizer.param_groups] if fitting else []
        _, client = engine.load_checkpoint(
            str(directory), tag=tag, load_optimizer_states=fitting, load_lr_scheduler_states=False
        )
        if directory != path and client is not None:
            # DeepSpeed gives every group the first one's values: norms would begin to decay
            for group, own in zip(engine.optimizer.param_groups, groups, strict=True):
                group.update({key: own[key] for key in own if key not in ("params", "lr")})
            for state in engine.optimizer.optimizer.state.values():  # and all of them one counter, which each advances
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].clone()
        engine._config.load_universal_checkpoint = False
        self.barrier()
        if directory != path and self.is_global_zero:
            shards.remove(directory)
        if client is None:
            raise InvalidState(f"DeepSpeed could not load {path}: take an earlier checkpoint (--ckpt_path)")
        return cast(dict[str, Any], client)

    # --- whole tensors

    def full_weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The float32 state of a module on the CPU, gathered; every rank must call it, rank 0 alone gets it."""
        state: dict[str, Tensor] = {}
        seen: dict[int, Tensor] = {}  # tied parameters stay tied
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name, value in module.state_dict(keep_vars=True).items():
            if name not in parameters:
                state[name] = value.detach().cpu()
            else:
                if id(value) not in seen:
                    seen[id(value)] = _full(value)
                state[name] = seen[id(value)]
        return state if self.is_global_zero else {}

    def write(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Overwrite a network, master weights too, and forget the optimizer's moments; every rank must call it."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                parameter.data.copy_(weights[name])
            safe_set_full_fp32_param(parameter, weights[name].to(parameter.device, torch.float32))
        for state in self.optimizers[0].optimizer.state.values():  # ZeRO's wraps torch's
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()


@contextmanager
def gathered(trainer: pl.Trainer, module: nn.Module) -> Iterator[None]:
    """Within, `module` has whole parameters on every rank (which all must enter it); only ZeRO-3 has work to do."""
    strategy = trainer.strategy
    if not isinstance(strategy, ZeRO) or strategy.stage < 3:
        yield
        return
    import deepspeed

    optimizer = strategy.deepspeed_engine.optimizer
    optimizer.checkpoint_event_prologue()  # parameters fetched ahead are in flight: they land, and go
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield
    optimizer.checkpoint_event_epilogue()


def roll_back(trainer: pl.Trainer, net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put earlier weights into a network that trains, and forget its moments; every rank must call it."""
    if isinstance(trainer.strategy, ZeRO):
        trainer.strategy.write(net, weights)
        return
    net.load_state_dict(weights)
    for parameter in net.parameters():
        trainer.optimizers[0].state.pop(parameter, None)


def full_size(parameter: nn.Parameter) -> int:
    """Its elements over all ranks."""
    return math.prod(full_shape(parameter))


def _full(parameter: nn.Parameter) -> Tensor:
    """A parameter's master weight, whole, on the CPU (a collective call)."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if whole is None:
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = parameter.detach().clone()
    return whole.detach().to("cpu", torch.float32).reshape(full_shape(parameter))


def read_state(path: Path) -> dict[str, Any]:
    """A sharded checkpoint as one: what Lightning and our callbacks stored, and the whole float32 `state_dict`.

    Unpickles: for checkpoints of your own only. Raises MissingExtra without deepspeed.
    """
    need_deepspeed(f"reading {path}")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    first = next(iter(sorted((path / shards.TAG).glob("*mp_rank_00_model_states.pt"))))
    with _silent():
        weights = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=shards.TAG)
    stored: dict[str, Any] = torch.load(first, map_location="cpu", weights_only=False)
    kept = {key: value for key, value in stored.items() if key in _KEPT or key.startswith("draftsmith")}
    return {**kept, "state_dict": dict(weights)}


def single_file(path: Path, scratch: Path) -> Path:
    """The checkpoint itself, or for a directory its weights as one file in `scratch`."""
    if not path.is_dir():
        return path
    torch.save(read_state(path), scratch / path.name)
    return scratch / path.name


def to_universal(path: Path, out: Path) -> None:
    """Convert a sharded checkpoint to DeepSpeed's universal form, which any number of ranks can load."""
    from deepspeed.checkpoint import ds_to_universal

    with _silent():
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(path / shards.TAG),
                output_folder=str(out / shards.TAG),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )


@contextmanager
def _silent() -> Iterator[None]:
    """DeepSpeed's converters print their progress; ours is on stderr, and stdout is for results."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def check_resume(trainer: pl.Trainer, path: Path, elastic: bool) -> None:
    """Raises InvalidValue or InvalidState when this trainer cannot go on from a checkpoint, before any rank starts."""
    strategy = trainer.strategy
    if not isinstance(strategy, ZeRO):
        if path.is_dir():
            stage = shards.read(path).stage
            raise InvalidValue(f"{path} was saved under ZeRO: resume it with --trainer.strategy zero{stage}")
        return
    strategy.elastic = elastic
    strategy.check_shards(path, trainer.num_devices * trainer.num_nodes)


def need_deepspeed(what: str) -> None:
    """Raises MissingExtra unless deepspeed is installed."""
    if find_spec("deepspeed") is None:
        raise MissingExtra(f"{what} needs deepspeed, which is not installed: {_INSTALL}")


def read_config(name: str) -> dict[str, Any]:
    """The DeepSpeed config of a shipped name or a path. Raises InvalidValue for one that cannot be used, saying why."""
    path = shipped.resolve(name, ".json")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise InvalidValue(f"cannot read the DeepSpeed config {path}: {e}") from e
    if not isinstance(content, dict):
        raise InvalidValue(f"{path} is no DeepSpeed config: it holds no keys")
    for key, instead in _OURS.items():
        if key in content:
            raise InvalidValue(f"{path} sets {key}, which comes from {instead}: remove it there")
    stage = (content.get("zero_optimization") or {}).get("stage")
    if stage not in (1, 2, 3):
        raise InvalidValue(f"{path} has zero_optimization.stage {stage!r}: choose 1, 2 or 3 (without ZeRO use ddp)")
    return content


def check(strategy: str | Strategy, accelerator: object, precision: object) -> None:
    """Raises InvalidValue for a strategy that does not exist, and for fp16 on a CPU."""
    if isinstance(strategy, str) and strategy not in NAMES and strategy not in StrategyRegistry:
        raise unknown_choice("trainer.strategy", strategy, NAMES)
    if isinstance(strategy, str) and strategy.startswith("deepspeed"):
        raise InvalidValue(f"trainer.strategy {strategy!r} is Lightning's own, which cannot resume here: take zero1-3")
    on_cpu = accelerator == "cpu" or not torch.cuda.is_available()
    if on_cpu and str(precision) in _FP16:
        raise InvalidValue(
            f"trainer.precision {str(precision)!r} on a CPU: float16 overflows there and is slow; take bf16-mixed or "
            "32-true"
        )
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"


for _name in ZERO:
    StrategyRegistry.register(_name, ZeRO, f"DeepSpeed {_name}", override=True, config=f"deepspeed/{_name}")


def global_rank() -> int:
    """This process's rank as the environment tells it, before any Trainer exists."""
    rank: int = getattr(rank_zero_only, "rank", 0)
    return rank


def shut_down() -> None:
    """Leave the process group, if there is one: a rank that exits inside it aborts at interpreter exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
