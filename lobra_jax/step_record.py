"""What is recorded of a joint step: where its time went, and what the plan foretold of it."""

from __future__ import annotations

from lobra_jax.engine import StepResult
from lobra_jax.feeder import PreparedStep
from lobra_jax.metrics import PhaseSeconds, StepRecord
from planner.cost import CostTable
from planner.plan import Plan


def step_record(
    step: int,
    prepared: PreparedStep,
    result: StepResult,
    *,
    plan: Plan,
    costs: CostTable,
    wait_s: float,
    issue_s: float,
    compilations: int,
) -> StepRecord:
    """The record of a finished step.

    Args:
      step: whole steps done with it.
      wait_s: the host waited for its dispatch and arrays.
      issue_s: the host took to hand it to the devices.
      compilations: programs compiled meanwhile.
    """
    device_seconds = plan.used_devices * result.total_s
    return StepRecord(
        step=step,
        tokens=prepared.batch.num_tokens,
        padded_tokens=prepared.padded_tokens,
        padding_share=1 - prepared.batch.num_tokens / prepared.padded_tokens,
        idle_share=1 - sum(result.busy_s) / device_seconds,
        gpu_seconds=device_seconds,
        seconds=PhaseSeconds(
            wait_dispatch=wait_s,
            issue=issue_s,
            host_wait=result.host_wait_s,
            execute=result.execute_s,
            sum_update=result.sum_update_s,
            total=result.total_s,
        ),
        dispatch_solve_s=prepared.dispatch.solve_s,
        predicted_s=tuple(prepared.dispatch.predicted_s),
        measured_s=result.replica_s,
        predicted_step_s=max(prepared.dispatch.predicted_s) + costs.step_overhead_s,
        num_micro_batches=tuple(len(own) for own in prepared.dispatch.replicas),
        compilations=compilations,
    )
