"""How one run's drive is put together from its parts."""

from __future__ import annotations

from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError
from mainspring_kit.identity import UserExecutionContext

from mainspring_execution.core.progress import Progress
from mainspring_execution.core.record import Envelope
from mainspring_execution.engine.attention import Attention
from mainspring_execution.engine.calls import Calls
from mainspring_execution.engine.catalog import PreparedAgent
from mainspring_execution.engine.deadlines import Deadlines
from mainspring_execution.engine.drive import Drive
from mainspring_execution.engine.ending import Ending
from mainspring_execution.engine.journal import Journal
from mainspring_execution.engine.surroundings import Grip, Surroundings
from mainspring_execution.engine.tree import Launcher, Tree


def make_drive(
    surroundings: Surroundings,
    context: UserExecutionContext,
    *,
    launcher: Launcher,
    agent: PreparedAgent | MainspringError,
    run: types_pb2.Run,
    state_id: str,
    arrived: float,
    lapses: int,
    progress: Progress,
) -> Drive:
    """A drive with its parts, at `progress`: how far the durable log has come. `agent`: an error the run fails with.

    `arrived`: when the start or the claim came, on the clock of perf_counter. `lapses`: of the lease, before the run's
    first append of this epoch was or is sent; where it has lapsed since, the first effect has to ask whose the run is.
    """
    attention = Attention()
    journal = Journal(
        surroundings.state.appends,
        Envelope(
            run.run_id,
            context.session_id,
            run.agent,
            context.trace_id,
            run.parent_run_id,
            run.root_run_id if run.parent_run_id else "",
        ),
        tenant_id=context.tenant_id,
        epoch=run.epoch,
        state_id=state_id,
        attention=attention,
    )
    deadlines = Deadlines(run)
    calls = Calls(
        journal, context, dispatcher=surroundings.dispatcher, catalog=surroundings.catalog, deadlines=deadlines
    )
    grip = Grip(surroundings, context, attention=attention, journal=journal, lapses=lapses)
    tree = Tree(surroundings, context, launcher=launcher, run=run, attention=attention, journal=journal, grip=grip)
    ending = Ending(journal, calls, tree=tree, attention=attention, arrived=arrived)
    drive = Drive(
        surroundings,
        context,
        agent=agent,
        run=run,
        attention=attention,
        journal=journal,
        calls=calls,
        ending=ending,
        tree=tree,
        grip=grip,
        deadlines=deadlines,
    )
    drive.resume(progress)
    return drive
