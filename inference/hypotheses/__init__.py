"""Wrong couplings that ruin a drafter in silence, one family a file; a new family is one more entry of FAMILIES."""

from draftsmith.inference.hypotheses import (
    aux_ids,
    matrices,
    norms,
    precision,
    rotary,
    served_law,
    shifts,
    template,
    vocabulary_map,
    weights,
    window,
)
from draftsmith.inference.hypotheses.base import Family

# In the order of their prior: what is wrong most often is tried first.
FAMILIES: tuple[Family, ...] = (
    aux_ids.variants,
    shifts.variants,
    norms.variants,
    vocabulary_map.variants,
    matrices.variants,
    rotary.variants,
    template.variants,
    window.variants,
    weights.variants,
    served_law.variants,
    precision.variants,
)
