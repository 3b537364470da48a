"""W1's look-up as a Temporal workflow: two activities for the model's steps, one for the tool."""

from __future__ import annotations

from datetime import timedelta

from temporalio import activity, workflow

STEP_SECONDS_MAX = timedelta(seconds=60)


@activity.defn
async def call_model(result: str) -> dict[str, str]:
    if not result:
        return {"text": "I will look it up.", "tool": "echo"}
    return {"text": "Done.", "answer": result}


@activity.defn
async def call_tool(value: str) -> str:
    return value


@workflow.defn
class LookUp:
    """The run."""

    @workflow.run
    async def run(self, value: str) -> str:
        await workflow.execute_activity(call_model, "", start_to_close_timeout=STEP_SECONDS_MAX)
        result = await workflow.execute_activity(call_tool, value, start_to_close_timeout=STEP_SECONDS_MAX)
        done = await workflow.execute_activity(call_model, result, start_to_close_timeout=STEP_SECONDS_MAX)
        return done["answer"]
