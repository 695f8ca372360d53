"""Settings of the tree decoder, and the policy that they name."""

from dataclasses import dataclass, field
from pathlib import Path

from draftsmith.inference.costs import CostCurve
from draftsmith.inference.drafters.tree_base import TreePolicy
from draftsmith.inference.errors import InvalidValue, unknown_choice
from draftsmith.inference.sampling import SamplingParams
from draftsmith.inference.traversal_verification import RULES
from draftsmith.inference.tree_calibration import Calibration
from draftsmith.inference.tree_costs import node_value
from draftsmith.inference.tree_policies.chain import ChainPolicy
from draftsmith.inference.tree_policies.dyspec import DySpecPolicy, DySpecThresholdPolicy
from draftsmith.inference.tree_policies.eagle2 import Eagle2Policy
from draftsmith.inference.tree_policies.fixed_widths import FixedWidthsPolicy
from draftsmith.inference.tree_policies.sequoia import SequoiaPolicy
from draftsmith.inference.typical_acceptance import DELTA, EPSILON, check_typical

AUTO = "auto"
STOPS = ("budget", "cost")
_STOP_BY_COST = (AUTO, "dyspec", "dyspec_threshold")
POLICIES = (AUTO, "chain", "fixed", "sequoia", "dyspec", "dyspec_threshold", "eagle2")


@dataclass(frozen=True)
class TreeSettings:
    """Settings of the tree decoder."""

    policy: str = field(
        default=AUTO,
        metadata={
            "help": "how trees grow. auto: the drafter's own way, else dyspec. chain: one node a level. fixed: "
            "`widths` children a node. sequoia: the best fixed shape for the measured acceptance. dyspec: where the "
            "draft expects acceptance, node by node. dyspec_threshold: the same layer by layer, fewer draft calls. "
            "eagle2: the most confident paths, not drawn",
            "choices": POLICIES,
        },
    )
    nodes: int = field(default=16, metadata={"help": "most drafted nodes of a tree, its root excluded"})
    depth: int = field(default=8, metadata={"help": "most levels of a tree below its root"})
    widths: str = field(default="3-2-1-1", metadata={"help": "policy fixed: children of a node on each level"})
    replacement: bool = field(
        default=False,
        metadata={"help": "policy fixed: draw siblings independently (SpecInfer); equal ones then waste their nodes"},
    )
    verification: str = field(
        default="token",
        metadata={
            "help": "token: from the root, siblings one after the other. traversal: from the leaves, which accepts at "
            "least as many in expectation; greedy decoding gains nothing and keeps its rule",
            "choices": RULES,
        },
    )
    threshold: float = field(
        default=0.0,
        metadata={"help": "policy dyspec_threshold: draw what is worth this much or more; 0: 1 / nodes"},
    )
    adaptive: bool = field(
        default=False,
        metadata={
            "help": "policy dyspec_threshold: move the threshold so that trees have `nodes` nodes on average (twice as "
            "many at most); sampled ids then depend on batch-mates"
        },
    )
    min_value: float = field(
        default=0.0,
        metadata={"help": "policy dyspec: stop at nodes that are tested with less than this probability; 0: never"},
    )
    stop: str = field(
        default="budget",
        metadata={
            "help": "policies dyspec and dyspec_threshold. budget: at `nodes` nodes. cost: also where one more costs "
            "more time than it can save (min_value, or threshold, from measured costs)",
            "choices": STOPS,
        },
    )
    beam: int = field(default=10, metadata={"help": "policy eagle2: nodes expanded on each level"})
    calibration: str = field(
        default="",
        metadata={
            "help": "policies dyspec, dyspec_threshold and sequoia: the file that 'draftsmith calibrate' wrote; none: "
            "plain estimates (the command line takes the one beside the draft)"
        },
    )
    lossy_typical: bool = field(
        default=False,
        metadata={
            "help": "Medusa's typical acceptance: keep a token that the target gives more than min(epsilon, delta "
            "exp(-entropy)), and go on with the target's likeliest. NOT the target's law"
        },
    )
    typical_epsilon: float = field(default=EPSILON, metadata={"help": "lossy_typical: enough probability for any law"})
    typical_delta: float = field(default=DELTA, metadata={"help": "lossy_typical: the less, the more is kept"})
    draft_temperature: float = field(
        default=0.0,
        metadata={
            "help": "temperature of the draft's law; 0: the target's own, and with a greedy target the likeliest "
            "tokens are offered without drawing"
        },
    )

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise unknown_choice("policy", self.policy, POLICIES)
        if self.verification not in RULES:
            raise unknown_choice("verification", self.verification, RULES)
        if self.stop not in STOPS:
            raise unknown_choice("stop", self.stop, STOPS)
        if self.stop == "cost" and (self.policy not in _STOP_BY_COST or self.min_value or self.threshold):
            raise InvalidValue(
                f"stop=cost chooses min_value and threshold of the policies {', '.join(_STOP_BY_COST)}: leave them at "
                f"0; got policy {self.policy!r}, {self.min_value} and {self.threshold}"
            )
        for name in ("nodes", "depth", "beam"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (0.0 <= self.threshold < 1.0 and 0.0 <= self.min_value < 1.0):
            raise InvalidValue(
                f"threshold and min_value must be at least 0 and below 1, got {self.threshold} and {self.min_value}"
            )
        if self.lossy_typical and self.verification != "token":
            raise InvalidValue(
                f"lossy_typical has a rule of its own, without verification={self.verification!r}: choose one"
            )
        check_typical(self.typical_epsilon, self.typical_delta)
        if not 0.0 <= self.draft_temperature < float("inf"):
            raise InvalidValue(f"draft_temperature must be 0 (the target's) or more, got {self.draft_temperature}")
        self.level_widths()

    def level_widths(self) -> list[int]:
        """`widths` as numbers. Raises InvalidValue for text that is none."""
        parts = self.widths.split("-")
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise InvalidValue(f"widths must be numbers from 1 on, joined by '-', got {self.widths!r}: e.g. 3-2-1-1")
        return [int(part) for part in parts]


def make_policy(settings: TreeSettings, sampling: SamplingParams, costs: CostCurve | None = None) -> TreePolicy:
    """The policy that settings name, `auto` meaning the one for a language model as the draft.

    costs: what calls cost on this machine; Sequoia takes a smaller tree where it pays better. Raises InvalidValue for a
    calibration that was measured at other temperatures, and for stop=cost without costs.
    """
    least = 0.0
    if settings.stop == "cost":
        if costs is None:
            raise InvalidValue(
                "stop=cost needs measured costs: give costs=, or take 'draftsmith decode', which measures"
            )
        least = node_value(costs, settings.nodes)
    found = (
        Calibration.load(Path(settings.calibration), conditions(settings, sampling)) if settings.calibration else None
    )
    table = None if found is None else found.table
    nodes, depth = settings.nodes, settings.depth
    match settings.policy:
        case "chain":
            return ChainPolicy(min(nodes, depth))
        case "fixed":
            return FixedWidthsPolicy(settings.level_widths(), replacement=settings.replacement)
        case "sequoia":
            p = None if found is None else found.sequoia
            if costs is None:
                return SequoiaPolicy(nodes, depth, p=p)
            fixed = costs.draft_fixed + costs.overhead
            return SequoiaPolicy(
                nodes, depth, p=p, t_draft=costs.draft_step, t_target=lambda m: costs.t_verify(m) + fixed
            )
        case "dyspec_threshold":
            threshold = settings.threshold or least or None
            return DySpecThresholdPolicy(nodes, depth, threshold=threshold, adaptive=settings.adaptive, table=table)
        case "eagle2":
            return Eagle2Policy(nodes, depth, beam=settings.beam)
        case _:
            return DySpecPolicy(nodes, depth, table=table, min_value=settings.min_value or least)


def conditions(settings: TreeSettings, sampling: SamplingParams) -> dict[str, float | bool]:
    """What a calibration must have been measured at to hold for a decoder."""
    drawn = not sampling.greedy or settings.draft_temperature > 0
    draft = settings.draft_temperature or sampling.temperature
    return {"temperature": sampling.temperature, "draft_temperature": draft, "drawn": drawn}
