"""W1's look-up as a Restate service: two model steps and one tool step, each journalled by `run_typed`."""

from __future__ import annotations

import restate

lookup = restate.Service("lookup")


async def call_model(result: str | None = None) -> dict[str, str]:
    if result is None:
        return {"text": "I will look it up.", "tool": "echo"}
    return {"text": "Done.", "answer": result}


async def call_tool(value: str) -> str:
    return value


@lookup.handler()
async def run(context: restate.Context, value: str) -> str:
    await context.run_typed("model", call_model)
    result = await context.run_typed("tool", call_tool, value=value)
    done = await context.run_typed("model", call_model, result=result)
    return done["answer"]


app = restate.app(services=[lookup])
