"""What a server tells of itself: metrics, traces, the journal of its decisions, and explanations.

May import: `routing`, `worker` and below. Begin with `metrics.py`: it and `tracing.py` observe a
router (`routing.observer`).
"""
