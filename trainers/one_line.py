"""Other libraries' errors about a config, in one line: which key, what is wrong, what was probably meant."""

import difflib
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import jsonargparse
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from draftsmith.inference.errors import InvalidValue, UserError

# lines of jsonargparse's nested reports that repeat what the others say
_NOISE = re.compile(
    r"^(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value( type)?: .*"
    r"|Expected a <class 'NoneType'>.*|Expected a path but .*)$"
)


@contextmanager
def one_line() -> Iterator[None]:
    """Turn errors about the config into InvalidValue; everything else passes."""
    try:
        yield
    except UserError:
        raise
    except jsonargparse.ArgumentError as e:
        raise InvalidValue(condense(str(e))) from e
    except OmegaConfBaseException as e:
        raise InvalidValue(f"config: {str(e).strip().splitlines()[0]}") from e
    except ValueError as e:  # how jsonargparse reports that a class refused its (well-typed) arguments
        if not str(e).startswith("Does not validate against any of"):
            raise
        raise InvalidValue(condense(str(e))) from e
    except MisconfigurationException as e:
        raise InvalidValue(f"trainer: {' '.join(str(e).split())}") from e
    except RuntimeError as e:
        if not str(e).startswith("Error(s) in loading state_dict"):
            raise
        faults = [line.strip() for line in str(e).splitlines()[1:]]
        raise InvalidValue(
            f"the checkpoint does not fit the network of this config ({faults[0].rstrip('.')}; {len(faults)} such): "
            "resume with the run's own config, or start another --run"
        ) from e


def condense(message: str) -> str:
    """The keys, the innermost reason and the nearest valid name out of a nested jsonargparse report."""
    keys: list[str] = []
    reasons: list[str] = []
    owner = ""
    for raw in message.splitlines():
        line = raw.strip().removeprefix("- ")
        if not line or _NOISE.match(line):
            continue
        if match := re.fullmatch(r'Parser key "([^"]+)":', line):
            keys.append(match[1])
        elif match := re.fullmatch(r"Problem with given class_path '([^']+)':", line):
            owner = match[1]
        else:
            reasons.append(line)
    reason = reasons[0] if reasons else " ".join(message.split())
    where = f"{'.'.join(keys)}: " if keys else ""
    return f"{where}{_plain(reason)}{_nearest(reason, owner)}"


def _plain(reason: str) -> str:
    reason = re.sub(r"<class '([^']+)'>", r"\1", reason)
    reason = re.sub(r"^(Option '[^']+' is not accepted|Group '\w+' does not accept option '[^']+')$", _unknown, reason)
    return re.sub(r"^unrecognized arguments: (.*)$", _unknown, reason)


def _unknown(match: re.Match[str]) -> str:
    return f"unknown key {_key(match[0])!r}"


def _key(reason: str) -> str:
    quoted = re.findall(r"(?:group|option) '([^']+)'", reason, flags=re.IGNORECASE)
    if quoted:
        return ".".join(quoted)
    given = reason.partition(": ")[2].split()
    return given[0].removeprefix("--").partition("=")[0] if given else reason


def _nearest(reason: str, owner: str) -> str:
    """A hint for an unknown key of the class `owner`, or of the trainer."""
    if not _plain(reason).startswith("unknown key"):
        return ""
    *path, last = _key(reason).split(".")
    if not owner and path == ["trainer"]:
        owner = "lightning.pytorch.Trainer"
    names = _parameters(owner, path if owner != "lightning.pytorch.Trainer" else [])
    if not owner and not path:
        names = ["trainer", "model", "data", "checkpoint", "seed_everything"]
    near = difflib.get_close_matches(last, names, n=1)
    return (
        f"; did you mean {'.'.join([*path, near[0]])!r}?" if near else f" (known: {', '.join(names)})" if names else ""
    )


def _parameters(owner: str, path: list[str]) -> list[str]:
    """Names that a class takes, or that the dataclass `path` below it takes."""
    if not owner:
        return []
    module, _, name = owner.rpartition(".")
    kind = getattr(import_module(module), name)
    for step in path:
        parameter = inspect.signature(kind).parameters.get(step)
        if parameter is None or not isinstance(parameter.annotation, type):
            return []
        kind = parameter.annotation
    return [p for p in inspect.signature(kind).parameters if p not in ("args", "kwargs")]
