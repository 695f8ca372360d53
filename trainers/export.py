"""`draftsmith export`: a run's checkpoint becomes a directory that loads anywhere, with a manifest and a parity seal.

Causal language models and drafters are written as ordinary Hugging Face directories with manifest.json beside, so that
`from_pretrained` and `generate(assistant_model=...)` take them as they are. Before the directory gets its name, a fresh
process loads it and decodes fixed tokens; over tolerance there is no export.

Shape letters: B batch, T time, V vocabulary.
"""

import copy
import inspect
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from draftsmith.inference import checkpoint, couplings
from draftsmith.inference import manifest as manifests
from draftsmith.inference.commands._args import CommandParser, parser
from draftsmith.inference.errors import InvalidState, InvalidValue, unknown_choice
from draftsmith.inference.manifest import Couplings, Manifest, Provenance, Seal, TargetCoupling
from draftsmith.inference.nets.eagle_head import EagleHead
from draftsmith.inference.portable import PortableNet
from draftsmith.inference.rng import uniform
from draftsmith.modules.export_spec import ExportSpec
from draftsmith.trainers import export_adapter, export_eagle, export_net, runs
from draftsmith.trainers.export_format import WRITABLE, export_as
from draftsmith.trainers.provenance import collect
from draftsmith.trainers.strategies import read_state

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEAL_ROWS, SEAL_TOKENS = 2, 48  # B and T of the fixed inputs
_SEAL_SECONDS = 3600.0  # a large model on a slow disk; a hung process must not hang the training run for ever
_SHARD = "5GB"


class Exportable(Protocol):
    """A LightningModule that can be exported."""

    def export_spec(self) -> ExportSpec: ...


def export_module(
    module: Exportable,
    out: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    provenance: Provenance | None = None,
) -> Manifest:
    """Export a module as it stands in memory; see `write`."""
    return write(module.export_spec(), out, dtype=dtype, overwrite=overwrite, provenance=provenance)


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    which: str | None = None,
    draft: str | None = None,
    dtype: str | None = None,
    kind: str | None = None,
    target: str | Path | None = None,
    adapter: bool = False,
    overwrite: bool = False,
) -> dict[Path, Manifest]:
    """Export a checkpoint of a run folder, rebuilt from the run's own config.yaml; returns what was written where.

    A run that trained several drafts gives one export per draft below `out`, and router.json beside them.

    Args:
        run: a run folder, or the id of one below runs/.
        which: "best", "last" or the path of a checkpoint; None: best, or last in a run that never validated.
        draft: one of several drafts; None: all of them.
        kind, target: instead of what the module says of itself.
        adapter: of a run with LoRA the adapter alone, in the PEFT layout; `target` is then its base model.
    """
    checkpoint.check_destination(Path(out), overwrite=overwrite)  # before minutes of work
    adapter = adapter or kind == "adapter"
    if adapter and (kind or "adapter") != "adapter":
        raise InvalidValue(f"--adapter writes kind 'adapter', not {kind!r}: leave --kind out")
    run = runs.existing(str(run))
    module = rebuild(run, which)
    if draft is None and not adapter and len(getattr(module, "draft_keys", ())) > 1:
        from draftsmith.trainers.export_drafts import export_drafts  # which imports this file

        if kind or target:
            raise InvalidValue("--kind and --target go with one draft: name it with --draft KEY")
        made = export_drafts(module, out, dtype=dtype, overwrite=overwrite, provenance=run_provenance(run))
        return {Path(out) / key: manifest for key, manifest in made.items()}
    spec = _spec(module, draft, adapter)
    spec = replace(spec, kind=kind or spec.kind, target_dir=str(target) if target else spec.target_dir)
    provenance = run_provenance(run)
    return {Path(out): write(spec, out, dtype=dtype, overwrite=overwrite, provenance=provenance)}


def write(
    spec: ExportSpec,
    out: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    provenance: Provenance | None = None,
) -> Manifest:
    """Write, seal and publish an export; returns its manifest. `out` appears whole and sealed, or not at all.

    Args: dtype: of the stored weights; None keeps the model's. provenance: of the run; None describes this process.
    Raises InvalidValue for what cannot be exported, InvalidState when the parity seal fails or the disk is full.
    """
    from transformers import PreTrainedModel

    model = spec.model
    if not isinstance(model, PreTrainedModel | EagleHead | PortableNet):
        raise InvalidValue(
            f"kind {spec.kind!r} is written from a transformers model or a net of ours, got {type(model).__name__}"
        )
    dtype = dtype or str(next(model.parameters()).dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise unknown_choice("dtype", dtype, DTYPES)
    draft = Manifest(
        kind=spec.kind,
        net=type(model).__name__,
        config={},
        dtype=dtype,
        files={},
        couplings=_couplings(spec, spec.vocab_size or _rows(model)),
        provenance=_completed(provenance or _provenance(collect(None)), spec),
        metrics=spec.metrics,
    )
    _refuse_broken_weights(model)
    final: list[Manifest] = []

    def writer(directory: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="draftsmith-seal-") as scratch:
            inputs = Path(scratch) / "inputs.safetensors"
            if isinstance(model, EagleHead):
                positions = min(SEAL_TOKENS, model.config.max_length - 2)
                tokens = seal_tokens(_rows(model), positions + 2)  # one more than pairs
                export_eagle.save(model, DTYPES[dtype], directory, inputs, tokens)
            elif isinstance(model, PortableNet):
                export_net.save(spec.model, DTYPES[dtype], directory, inputs)
            else:
                base = Path(str(spec.target_dir)) if spec.kind == "adapter" else None
                with _quiet_libraries():
                    _save(model, DTYPES[dtype], directory, inputs, base)
            _copy_tokenizer(spec.tokenizer_dir, directory)
            config = checkpoint.read_json(directory / manifests.KINDS[spec.kind].config)
            unsealed = replace(draft, config=config, files=checkpoint.hash_files(directory))
            _write_manifest(unsealed, directory)
            final.append(replace(unsealed, seal=run_seal(directory, inputs)))
            _write_manifest(final[0], directory)

    checkpoint.write_export(Path(out), writer, overwrite=overwrite)
    return final[0]


def rebuild(run: Path, which: str | None = None) -> Exportable:
    """The run's module with the weights of one of its checkpoints, in eval mode on the CPU.

    Raises InvalidValue (one line) for a checkpoint that is missing, damaged or of another network, and for a module
    that cannot be exported.
    """
    from draftsmith.trainers.cli import module_from_config

    config = run / runs.CONFIG
    path = _checkpoint_file(run, which)
    stored = _read_checkpoint(path)
    module = module_from_config(config)
    if not hasattr(module, "export_spec"):
        raise InvalidValue(f"{type(module).__name__} of {config} offers no export_spec(): it cannot be exported")
    module.configure_model()
    try:
        module.load_state_dict(stored["state_dict"])
    except RuntimeError as error:
        raise InvalidValue(f"{path} does not fit the network of {config}: {_squeeze(error)}") from error
    module.on_load_checkpoint(stored)
    exportable: Exportable = module.eval()
    return exportable


def run_seal(directory: Path, inputs: Path) -> Seal:
    """Measure the export in a fresh process. Raises InvalidState, one line, when it fails or is over tolerance."""
    command = [sys.executable, "-P", "-m", "draftsmith.inference.seal", str(directory), "--inputs", str(inputs)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SEAL_SECONDS)
    except subprocess.TimeoutExpired:
        raise InvalidState(
            f"parity seal: the fresh process did not end within {_SEAL_SECONDS:.0f} s; nothing was exported"
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        said = lines[-1].removeprefix("error: ")
        raise InvalidState(f"parity seal: the fresh process could not load the export ({said}); nothing was exported")
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    checks = [manifests.SealCheck(**check) for check in measured.pop("checks")]
    for check in checks:
        if not check.max_abs_difference <= check.tolerance:
            raise InvalidState(
                f"parity seal: in {check.compute_dtype} the export differs from {check.reference} by "
                f"{check.max_abs_difference:.3g}, the tolerance is {check.tolerance:.3g}; nothing was exported"
            )
    return Seal(**measured, checks=tuple(checks))


def seal_tokens(vocab_size: int, max_length: int) -> Tensor:
    """The fixed inputs of the seal: int64 [B, T], the same for the same sizes on every machine."""
    length = max(2, min(SEAL_TOKENS, max_length - 2))  # the replay needs two slots more
    rows, positions = torch.arange(SEAL_ROWS).unsqueeze(1), torch.arange(length).unsqueeze(0)
    return (uniform(0, rows, positions, 0) * vocab_size).long()


def run_provenance(run: Path) -> Provenance:
    """Provenance of a run by its own provenance.json; of this process where the run has none."""
    path = run / runs.PROVENANCE
    return _provenance(checkpoint.read_json(path) if path.is_file() else collect(None))


def _provenance(known: Mapping[str, Any]) -> Provenance:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Provenance(
        command=known["command"],
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        hardware=", ".join([known["hardware"], *gpus]),
        versions=known["versions"],
        git_commit=known["git_commit"],
        dirty=known["dirty"],
        seed=known["seed"],
        wall_seconds=known.get("wall_seconds"),
    )


def _completed(provenance: Provenance, spec: ExportSpec) -> Provenance:
    """With what only the exported part knows."""
    seed = provenance.seed if spec.seed is None else spec.seed
    return replace(provenance, seed=seed, steps=spec.steps, data_fingerprint=spec.data_fingerprint)


def _couplings(spec: ExportSpec, head_size: int) -> Couplings:
    """What the manifest states. Raises InvalidValue for a draft that its own target would refuse."""
    identity = couplings.tokenizer_identity(Path(spec.tokenizer_dir)) if spec.tokenizer_dir else None
    if spec.tokenizer_dir and identity is None:
        raise InvalidValue(f"{spec.tokenizer_dir} holds no tokenizer files: give the directory of the run's tokenizer")
    if identity is not None and identity.vocab_size > head_size:
        raise InvalidValue(
            f"the tokenizer of {spec.tokenizer_dir} has {identity.vocab_size} ids, the head only {head_size} rows"
        )
    if spec.kind not in manifests.KINDS:
        raise unknown_choice("kind", spec.kind, manifests.KINDS)
    target = None
    if "target" in manifests.KINDS[spec.kind].couplings:
        if spec.target_dir is None:
            raise InvalidValue(f"kind {spec.kind!r} is made for one target: name its directory with --target DIR")
        directory = Path(spec.target_dir)
        if not directory.is_dir():
            raise InvalidValue(f"no such target directory: {directory}")
        target = TargetCoupling(couplings.target_fingerprint(directory), directory.resolve().name)
        rows = checkpoint.read_json(directory / "config.json").get("vocab_size", head_size)
        couplings.shared_vocabulary(
            couplings.Side(directory, manifests.read(directory), rows, couplings.tokenizer_identity(directory)),
            couplings.Side(Path(spec.tokenizer_dir or "the draft"), None, head_size, identity),
        )
    return Couplings(
        vocab_size=identity.vocab_size if identity else head_size,
        tokenizer_hash=identity.hash if identity else None,
        vocab_map_hash=identity.vocab_map_hash if identity else None,
        target=target,
        aux_layers=spec.aux_layers,
        trained=spec.trained,
        decode_defaults=spec.decode_defaults,
    )


def _rows(model: Any) -> int:
    """Ids that a model's vocabulary has."""
    if isinstance(model, PortableNet):
        return model.spec.vocab_size
    rows: int = model.config.vocab_size if isinstance(model, EagleHead) else len(model.get_output_embeddings().weight)
    return rows


def _save(model: Any, dtype: torch.dtype, directory: Path, inputs: Path, base: Path | None = None) -> None:
    """Write the model into `directory`, and the seal's tokens with the training class's logits into `inputs`.

    base: write the adapters alone, which a reader puts onto the model of this directory.
    """
    from safetensors.torch import save_file

    name, served = type(model).__name__, str(dtype).removeprefix("torch.")
    positions = getattr(model.config, "max_position_embeddings", None) or SEAL_TOKENS + 2
    tokens = seal_tokens(model.get_output_embeddings().weight.shape[0], positions)
    trained = reference_logits(model, tokens)
    arrays, said = {"tokens": tokens, served: trained}, {served: f"{name} as trained"}
    if not model.dtype == dtype == torch.float32:
        # The logits above are to be met roughly, by what is served; those of the stored numbers tightly, in float32.
        # Parameters only are cast: `.to(dtype)` would round the rotary frequencies too, which no reader does.
        model = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()
        if base is not None:
            export_adapter.restore_base(model, base)
        arrays["float32"], said["float32"] = reference_logits(model, tokens), f"{name} with the stored weights"
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    save_file(arrays, inputs, metadata=said)
    if base is not None:
        export_adapter.save(model, base, directory)
        return
    with _for_generation(model):
        model.save_pretrained(directory, max_shard_size=_SHARD)


@torch.no_grad()
def reference_logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits of the training class, one plain pass without a cache: float32 [B, T, V] on the CPU."""
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(model.device.type, enabled=False):
            logits: Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits.float().cpu()
    finally:
        model.train(was_training)
    if not logits.isfinite().all():
        raise InvalidValue("the model's logits are not finite: its weights are broken, export an earlier checkpoint")
    return logits.contiguous()


@contextmanager
def _for_generation(model: Any) -> Iterator[None]:
    """Training switches the cache off in the config; what is written must have it on, or `generate` crawls."""
    before = model.config.use_cache
    model.config.use_cache = True
    try:
        yield
    finally:
        model.config.use_cache = before


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No progress bars, and no foreign line among our results.

    Where accelerate or peft is installed, saving imports DeepSpeed, whose logger writes its warnings to stdout.
    """
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _refuse_broken_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise InvalidValue(f"{name} holds NaN or infinity: export an earlier checkpoint (--checkpoint PATH)")


def _copy_tokenizer(source: str | None, directory: Path) -> None:
    """Byte by byte: saving it again could change its hash."""
    for name in couplings.TOKENIZER_FILES if source else ():
        path = Path(source or "") / name
        if path.is_file():
            shutil.copyfile(path, directory / name)


def _write_manifest(manifest: Manifest, directory: Path) -> None:
    (directory / manifests.MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")


def _spec(module: Exportable, draft: str | None, adapter: bool = False) -> ExportSpec:
    if adapter:
        if "adapter" not in inspect.signature(module.export_spec).parameters:
            raise InvalidValue(f"{type(module).__name__} trains no adapter: leave --adapter out")
        if draft is not None:
            raise InvalidValue(f"{type(module).__name__} has one adapter to export: leave --draft out")
        return module.export_spec(adapter=True)  # type: ignore[call-arg]  # modules with LoRA take it
    if draft is None:
        return module.export_spec()
    if "draft" not in inspect.signature(module.export_spec).parameters:
        raise InvalidValue(f"{type(module).__name__} has one part to export: leave --draft out")
    return module.export_spec(draft=draft)  # type: ignore[call-arg]  # modules with several drafts take it


def _checkpoint_file(run: Path, which: str | None) -> Path:
    if which in ("best", "last"):
        return runs.checkpoint(run, which)
    if which is not None:
        return Path(which)
    try:
        return runs.checkpoint(run, "best")
    except InvalidValue:  # a run that never validated
        return runs.checkpoint(run, "last")


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InvalidValue(f"no such checkpoint: {path} (give best, last or the path of a .ckpt file or directory)")
    lack = runs.missing_part(path, ("state_dict",))
    if lack is not None:
        raise InvalidValue(f"checkpoint {path} cannot be exported: {lack}; take an earlier one (--checkpoint PATH)")
    if path.is_dir():
        return read_state(path)
    stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return stored


def _squeeze(error: Exception) -> str:
    return f"{' '.join(str(error).split()):.300}"


def _parser() -> CommandParser:
    made = parser(
        "export",
        "Turn a checkpoint of a run into a directory that loads anywhere, with its manifest and parity seal.",
        "draftsmith export runs/my-draft exports/my-draft --dtype bfloat16",
    )
    made.add_argument("run", metavar="RUN", help="run folder that draftsmith fit made, or its id")
    made.add_argument("out", metavar="OUT", type=Path, help="directory to make")
    made.add_argument(
        "--checkpoint", metavar="best|last|PATH", help="which weights (default: best, or last where nothing validated)"
    )
    made.add_argument("--draft", metavar="KEY", help="one draft of a run that trained several (default: all)")
    made.add_argument("--dtype", choices=tuple(DTYPES), help="of the stored weights (default: as trained)")
    made.add_argument("--kind", choices=tuple(manifests.KINDS), help="default: what the run's module says")
    made.add_argument(
        "--target", metavar="DIR", help="kind drafter: the target that it was trained for; adapter: its base model"
    )
    made.add_argument("--adapter", action="store_true", help="of a run with LoRA the adapter alone (PEFT), not merged")
    made.add_argument("--format", choices=WRITABLE, help="write another engine's format (see draftsmith convert)")
    made.add_argument("--overwrite", action="store_true", help="replace an export that is already there")
    return made


def main(argv: list[str]) -> int:
    from draftsmith.inference.commands.show import summary

    given = _parser().parse_args(argv)
    options: dict[str, Any] = {
        "which": given.checkpoint,
        "draft": given.draft,
        "dtype": given.dtype,
        "kind": given.kind,
        "target": given.target,
        "adapter": given.adapter,
        "overwrite": given.overwrite,
    }
    if given.format is None:
        written = export_run(given.run, given.out, **options)
    else:
        written = export_as(given.run, given.out, given.format, **options)
    print("\n\n".join(summary(path, manifest) for path, manifest in written.items()))
    return 0
