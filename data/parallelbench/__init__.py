"""ParallelBench: tasks whose token dependence is known, their scores and limits (docs/parallelbench.md)."""
