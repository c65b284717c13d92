"""How a plan with n-grams gets from the scheduler to the workers: as an attribute of the step's ``SchedulerOutput``.

vLLM has a field for the number of drafts, and none for more. Workers get the object itself, or a pickled copy with all that
it has.
"""

from __future__ import annotations

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_quantspec.draft_length import Plan

NAME = "quantspec_plan"


def set_plan(scheduler_output: SchedulerOutput, plan: Plan) -> None:
    """Give a step the plan of the drafts that follow it."""
    setattr(scheduler_output, NAME, plan)


def plan_of(scheduler_output: SchedulerOutput) -> Plan | None:
    """The plan of a step; None where n-grams are never drafted, and the number of drafts says all."""
    return getattr(scheduler_output, NAME, None)
